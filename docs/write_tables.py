"""Writes the generated tables of configuration.md and metrics.md from the code: `python docs/write_tables.py`.

A table stands between two comment lines, `<!-- table: NAME -->` and `<!-- end -->`; everything else is written by hand.
"""

import re
from pathlib import Path

from pydantic import BaseModel

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


def filled(text: str) -> str:
    """The page with its tables as the code says."""
    tables = {"run file": key_table(RunConfig), "cluster file": key_table(Cluster), "metrics": metric_table()}
    pattern = re.compile(r"(<!-- table: ([a-z ]+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: match.group(1) + tables[match.group(2)] + match.group(3), text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    for name in ("configuration.md", "metrics.md"):
        page = FOLDER / name
        page.write_text(filled(page.read_text()))
