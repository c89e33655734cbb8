"""`rlhf run` with a reward model: in one process, and what is refused before anything starts.

Not covered: the same on Ray, where the judge is hosted like a reward function.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.config import ModelConfig
from rlhf.models.load import load_tokenizer
from rlhf.models.score import start_score_model


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """A run file that names the reward model beside it."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Count to {n}."}) + "\n" for n in range(6)))
    model = start_score_model(ModelConfig(name="tiny"), "float32", 0)
    model.save_pretrained(tmp_path / "judge")
    load_tokenizer("tiny", trust_remote_code=False).save_pretrained(tmp_path / "judge")
    return {
        "model": {"name": "tiny"},
        "algorithm": {"name": "rloo", "samples_per_prompt": 2, "kl": {"coef": 0.0}},
        "data": {"path": "prompts.jsonl", "heldout": 1},
        "loop": {"num_steps": 1, "groups_per_step": 2},
        "generation": {"engine": "transformers", "max_new_tokens": 4},
        "learner": {"engine": "torch"},
        "reward": {"model": "./judge"},
    }


def run(folder: Path, content: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return subprocess.run(
        [sys.executable, "-m", "rlhf.cli.main", "run", "run.yaml", "--in-process", "--run-dir", "out"],
        cwd=folder, capture_output=True, text=True, timeout=240, check=False, env=dict(os.environ),
    )  # fmt: skip


def test_a_run_is_rewarded_by_a_model(content: dict[str, Any], tmp_path: Path) -> None:
    """One step, rewarded and evaluated by the folder beside the run file."""
    finished = run(tmp_path, content)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    (step,) = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert step["reward/std"] > 0 and step["faults/unscorable"] == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"reward": {"model": "tiny"}}, "reward.model: tiny is a language model"),
        ({"reward": {"model": "./nowhere"}}, "reward.model"),
        ({"reward": {"model": "./judge", "timeout_s": 3}}, "timeout_s would do nothing"),
        ({"reward": {}}, "exactly one of function and model"),
    ],
)
def test_bad_input_is_refused(content: dict[str, Any], tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    """Exit code 2, a message with the key, no run directory."""
    refused = run(tmp_path, content | changes)
    assert refused.returncode == 2 and named in refused.stdout + refused.stderr
    assert not (tmp_path / "out").exists()
