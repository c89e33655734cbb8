"""Every run file for the tiny model trains two steps, in this process.

Not covered: SmolLM2 (the demo, minutes each); vLLM, DeepSpeed and Ray, which the tests of whole runs cover.
"""

import json
from pathlib import Path

import pytest
import yaml

from rlhf.cli.main import main

ROOT = Path(__file__).parents[1]
TINY = sorted(path.name for path in (ROOT / "configs").glob("*_tiny.yaml"))


@pytest.mark.parametrize("name", TINY)
def test_a_run_file_of_the_tiny_model_trains_two_steps(name: str, tmp_path: Path) -> None:
    config = ROOT / "configs" / name
    settings = ["loop.num_steps=2", "loop.groups_per_step=4", "data.heldout=2", "learner.engine=torch"]
    if "generation" in yaml.safe_load(config.read_text()):
        settings += ["generation.engine=transformers", "generation.max_new_tokens=8"]
    run_dir = str(tmp_path / "run")
    assert main(["run", str(config), *settings, "--in-process", "--run-dir", run_dir]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [0, 1] and all(step["tokens/trained"] > 0 for step in steps)
    assert main(["verify", run_dir]) == 0
