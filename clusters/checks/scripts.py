"""Rules for shell scripts that start Ray by hand: Slurm's, and what a SkyPilot task runs."""

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

from clusters.checks.documents import Fault

START = re.compile(r"\bray start\b(?:[^\n;|&\\]|\\\n)*")


def syntax(field: str, text: str) -> Iterator[Fault]:
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    if checked.returncode:
        yield Fault(field, f"bash cannot read it: {checked.stderr.strip().splitlines()[0]}")


def ray_nodes(field: str, text: str) -> tuple[dict[str, float], dict[str, float], list[Fault]]:
    """The custom resources of the head and of the other nodes, from the two `ray start` of a script."""
    starts = START.findall(text)
    heads = [start for start in starts if "--head" in start]
    others = [start for start in starts if "--head" not in start]
    if len(heads) != 1 or len(others) != 1:
        return {}, {}, [Fault(field, f"expected a `ray start --head` and a `ray start --address`, found {len(starts)}")]
    wrong = []
    if "--dashboard-host 127.0.0.1" not in heads[0] and "--include-dashboard=false" not in heads[0]:
        wrong.append(Fault(field, "where the dashboard listens is left open; expected --dashboard-host 127.0.0.1"))
    if re.search(r"\bray stop\b", text):
        wrong.append(Fault(field, "`ray stop` ends every Ray of the machine, that of others too"))
    tags = []
    for start in (heads[0], others[0]):
        found = re.search(r"--resources[= ]'([^']*)'", start)
        try:
            tags.append(json.loads(found[1]) if found else {})
        except json.JSONDecodeError as error:
            tags.append({})
            wrong.append(Fault(field, f"--resources is no JSON: {error}"))
        if not tags[-1]:
            wrong.append(Fault(field, f"--resources is missing from `{start.split(chr(10))[0].strip()}`"))
    return tags[0], tags[1], wrong


def without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def whole(value: Any) -> float:
    """A number that may have a plus sign: at least so many."""
    return float(str(value).rstrip("+"))
