"""Secrets inside of addresses: what a run or cluster file, or a command, is refused for.

An address goes into config.yaml, cluster.yaml, logs, messages and process lists. A secret in it would go there too, so
it is refused where it is read. Imports neither torch nor ray.
"""

import re
from urllib.parse import parse_qsl, urlsplit

from rlhf.errors import BadInput

HIDDEN = "***"
REMEDY = (
    "it would be written into the run directory, logs and messages. Next: take it out of the address; a server's token "
    "belongs into the environment variable that reward.token_env names, those of storage and hubs into the variables "
    "or files of their own packages"
)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*")
_SECRET_NAME = re.compile(r"token|secret|passw|pwd|api.?key|access.?key|^key$|auth|credential|^sig$|signature", re.I)


def refuse_credentials(text: str, where: str) -> None:
    """Raises BadInput, without the secret, for an address that holds a password or a query with a secret's name.

    Sees whole addresses (`scheme://…`, fsspec's chained ones too), not those inside of a longer text."""
    shown = without_credentials(text)
    if shown != text:
        raise BadInput(f"{where}: {shown} holds a secret: {REMEDY}")


def without_credentials(text: str) -> str:
    """The address with *** in place of its secrets; any other text as it is."""
    return "::".join(_one_without(part) if _ADDRESS.fullmatch(part) else part for part in text.split("::"))


def _one_without(address: str) -> str:
    parts = urlsplit(address)
    user, at, _ = parts.netloc.rpartition("@")
    name, colon, password = user.partition(":")
    # A user alone is no secret, and a part of some addresses (abfs://container@account); on the web it is a token.
    if at and parts.scheme in ("http", "https"):
        address = address.replace(f"//{user}@", f"//{HIDDEN}@", 1)
    elif colon and password:
        address = address.replace(f"//{user}@", f"//{name}:{HIDDEN}@", 1)
    if any(_SECRET_NAME.search(key) for key, _ in parse_qsl(parts.query)):
        address = address.replace(f"?{parts.query}", f"?{HIDDEN}", 1)
    return address
