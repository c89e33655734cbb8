"""Writes the generated tables of the pages from the code: `python docs/write_tables.py`.

A table stands between two comment lines, `<!-- table: NAME -->` and `<!-- end -->`; everything else is written by hand.
"""

import re
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from rlhf.chaos.plan import KINDS, When
from rlhf.chaos.points import MESSAGES, MOMENTS
from rlhf.cluster import Cluster
from rlhf.config import RunConfig
from rlhf.config_keys import all_keys
from rlhf.metric_names import METRICS

FOLDER = Path(__file__).resolve().parent


def key_table(kind: type[BaseModel]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in all_keys(kind):
        if key.is_section and key.type == "section":
            continue
        default = key.default if key.default == "required" else f"`{key.default}`"
        lines.append(f"| `{key.name}` | {_cell(key.type)} | {default} | {_cell(key.meaning)} |")
    return "\n".join(lines)


def metric_table() -> str:
    lines = ["| metric | unit | merged by | meaning |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {m.unit} | {m.reducer} | {_cell(m.meaning)} |" for name, m in METRICS.items()]
    return "\n".join(lines)


def fault_table() -> str:
    lines = ["| kind | what happens | its other keys |", "|---|---|---|"]
    for kind in KINDS:
        (name,) = get_args(kind.model_fields["kind"].annotation)
        own = [key for key in all_keys(kind) if "." not in key.name and key.name not in ("kind", "when")]
        keys = "; ".join(f"`{key.name}` ({key.default}): {key.meaning}" for key in own)
        lines.append(f"| `{name}` | {_cell(kind.model_fields['kind'].description or '')} | {_cell(keys)} |")
    return "\n".join(lines)


def moment_table() -> str:
    lines = ["| point | where: what has happened |", "|---|---|"]
    return "\n".join(lines + [f"| `{name}` | {_cell(meaning)} |" for name, meaning in {**MOMENTS, **MESSAGES}.items()])


def filled(text: str) -> str:
    """The page with its tables as the code says."""
    tables = {
        "run file": key_table(RunConfig),
        "cluster file": key_table(Cluster),
        "metrics": metric_table(),
        "faults": fault_table(),
        "when": key_table(When),
        "moments": moment_table(),
    }
    pattern = re.compile(r"(<!-- table: ([a-z ]+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: match.group(1) + tables[match.group(2)] + match.group(3), text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    for name in ("configuration.md", "metrics.md", "reliability.md"):
        page = FOLDER / name
        page.write_text(filled(page.read_text()))
