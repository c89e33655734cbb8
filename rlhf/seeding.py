"""Random numbers are addressed, not drawn: a seed is a hash of what it is for.

The same address gives the same seed in every process, on every machine and after every restart, so arrival order,
pool size and restarts do not change a result. Nothing here touches a global generator."""

import hashlib


def seed_for(run_seed: int, purpose: str, *address: int) -> int:
    """A 63-bit seed for one use of randomness.

        seed = first 8 bytes of blake2b(run_seed / purpose / address), top bit cleared

    Args: run_seed, the run file's `seed`; purpose, a word such as "sample"; address, whole numbers such as (prompt id,
    sample index). 63 bits because torch and vLLM take signed 64-bit seeds.
    """
    text = "/".join([str(run_seed), purpose, *map(str, address)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
