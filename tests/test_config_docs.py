"""The pages on keys and metrics say what the code says.

Not covered: the sentences around the tables, and metric names that are put together at run time other than time/*.
"""

import importlib.util
import re
from pathlib import Path

import pytest

from rlhf.metric_names import METRICS

ROOT = Path(__file__).resolve().parent.parent
# First words of metric names.
FAMILIES = (
    "advantage|clip|completion|faults|group|groups|kl|logps|loss|mismatch|off_policy|pairs|ranker|rejection|reward|rewards"
    "|staleness|sync|time|tokens|value"
)


@pytest.mark.parametrize("page", ["configuration.md", "metrics.md", "reliability.md"])
def test_tables_are_those_of_the_code(page: str) -> None:
    """When this fails: python docs/write_tables.py."""
    spec = importlib.util.spec_from_file_location("write_tables", ROOT / "docs" / "write_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "docs" / page).read_text()
    assert text == module.filled(text)


def test_metric_names_in_the_code_are_documented() -> None:
    """Every string in the library that looks like a metric's name is in the list."""
    pattern = re.compile(rf'"((?:{FAMILIES})/[a-z0-9_]+)"')
    files = [path for package in ("rlhf", "actors") for path in (ROOT / package).rglob("*.py")]
    found = {name for path in files for name in pattern.findall(path.read_text())}
    assert found - {"tokens/s"} <= METRICS.keys()
