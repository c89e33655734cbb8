"""The comparison of speed with TRL: its arithmetic, and (soak) that all three take their steps.

Not covered: how fast anything is. No test asserts a time.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from examples.speed.against_trl import Step, table

PROJECT = Path(__file__).resolve().parents[1]


def test_ratios_are_of_seconds_by_token_so_that_short_answers_win_nothing() -> None:
    """Twice as many tokens in the same time is twice as fast; the same tokens a second are as fast, however few."""
    steps = {
        "TRL": [Step(2.0, 100), Step(4.0, 200), Step(2.0, 100)],
        "long": [Step(2.0, 200)] * 3,
        "short": [Step(0.2, 10)] * 2,
    }
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(steps).splitlines()[2:]]
    assert rows == [
        ["TRL", "3", "2.00", "2.00 to 4.00", "133", "50", "1.00"],
        ["long", "3", "2.00", "2.00 to 2.00", "200", "100", "2.00"],
        ["short", "2", "0.20", "0.20 to 0.20", "10", "50", "1.00"],
    ]


@pytest.mark.parametrize("flag", ["--steps", "--rounds", "--tokens"])
def test_none_of_anything_is_refused_before_anything_starts(flag: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.speed.against_trl", "--root", str(tmp_path / "kept"), flag, "0"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith(f"error: argument {flag}: expected 1 or more, found 0\n")
    assert not (tmp_path / "kept").exists()


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_each_of_the_three_trains(tmp_path: Path) -> None:
    words = ["--root", str(tmp_path), "--model", "tiny", "--rounds", "1", "--steps", "2", "--tokens", "8"]
    command = [sys.executable, "-m", "examples.speed.against_trl", *words]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    written = (tmp_path / "tiny-8-bfloat16.md").read_text().splitlines()[2:]
    assert [row.split("|")[1].strip() for row in written] == ["TRL", "in one process", "Ray, vLLM, DeepSpeed"]
    assert all(row.split("|")[2].strip() == "2" for row in written)
