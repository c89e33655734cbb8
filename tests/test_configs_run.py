"""Every run file in configs/ trains two steps, in this process.

Replaced in all of them: the number of steps and of prompts, trained and held out; the engines (transformers and torch
for vLLM and DeepSpeed); the length of completions. In those that are not for the tiny model (SmolLM2: the demo and its
longer form) also the model, by the tiny one. Reward function, data, algorithm and precision are the file's.

Not covered: SmolLM2 (`make demo`, minutes); vLLM, DeepSpeed and Ray, which the tests of whole runs cover.
"""

import json
from pathlib import Path

import pytest
import yaml

from rlhf.cli.main import main

ROOT = Path(__file__).parents[1]
FILES = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


RUNS = [(name, []) for name in FILES]
# What no run file has: another rejection and another reference.
RUNS.append(
    (
        "rso_tiny.yaml",
        ["algorithm.rejection.mode=exact", "algorithm.rejection.reward_units=raw", "algorithm.reference=sampler"],
    )
)


@pytest.mark.parametrize(("name", "others"), RUNS)
def test_a_run_file_trains_two_steps(name: str, others: list[str], tmp_path: Path) -> None:
    config = ROOT / "configs" / name
    settings = ["loop.num_steps=2", "loop.groups_per_step=4", "data.heldout=2", "learner.engine=torch", *others]
    content = yaml.safe_load(config.read_text())
    if not name.endswith("_tiny.yaml"):
        settings.append("model.name=tiny")
    if "generation" in content:
        settings += ["generation.engine=transformers", "generation.max_new_tokens=8"]
    run_dir = str(tmp_path / "run")
    assert main(["run", str(config), *settings, "--in-process", "--run-dir", run_dir]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [0, 1] and all(step["tokens/trained"] > 0 for step in steps)
    assert main(["verify", run_dir]) == 0
