"""A whole run on Ray whose engine is two processes, one of which is killed: the run ends, its ledger is clean.

Tiny model, CPU, real vLLM. Not covered: GPUs, several nodes.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.soak]

LONG_S = 1800.0
STEPS = 6
RUN = {
    "seed": 3,
    "model": {"name": "tiny"},
    "algorithm": {"name": "rloo", "samples_per_prompt": 2, "kl": {"coef": 0.0}},
    "data": {"path": "prompts.jsonl"},
    "loop": {"num_steps": STEPS, "groups_per_step": 4, "wait_timeout_s": 900, "heartbeat_timeout_s": 600},
    "generation": {"engine": "vllm", "max_new_tokens": 24, "cache_gib": 0.1, "mismatch_stop": 1e-4},
    "learner": {"engine": "torch", "lr": 1e-3},
    "reward": {"function": "reward.py:reward"},
}
CLUSTER = {"rollout": {"tensor_parallel": 2}, "object_store_gib": 0.5}
REWARD = "def reward(prompts, completions, **columns):\n    return [float(text.count('e')) for text in completions]\n"


@pytest.fixture
def run(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    rows = [json.dumps({"prompt": f"Tell me about number {n}."}) for n in range(2 * STEPS * 4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    command = [sys.executable, "-m", "rlhf.cli.main", "run", "run.yaml", "--cluster", "cluster.yaml"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--run-dir", "run"], cwd=tmp_path, stdout=log, stderr=log)
        yield process
        process.terminate()
        process.wait(timeout=LONG_S)


def ranks(run: int) -> list[psutil.Process]:
    """The processes of engines below a run: what vLLM's worker calls itself."""
    found = []
    for process in psutil.Process(run).children(recursive=True):
        try:
            if any("Worker_TP" in part for part in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.timeout(LONG_S)
def test_a_run_outlives_a_process_of_its_engine(run: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    """Trainer and engine agree at every step, before and after; nothing is lost or trained twice; no process stays."""
    metrics, log = tmp_path / "run" / "metrics.jsonl", tmp_path / "log"
    while not metrics.exists() or not metrics.read_text().count("\n"):
        assert run.poll() is None, log.read_text()
        time.sleep(0.2)
    first = ranks(run.pid)
    assert len(first) == 2, first
    first[1].kill()
    assert run.wait(timeout=LONG_S) == 0, log.read_text()
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(STEPS))
    assert sum(step.get("faults/workers_died", 0) for step in steps) == 1, steps
    command = [sys.executable, "-m", "rlhf.cli.main", "verify", "run", "--json"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=dict(os.environ))
    ledger = json.loads(said.stdout)["ledger"]
    assert (ledger["trained"], ledger["lost"], ledger["duplicated"]) == (STEPS * 4, 0, 0)
    _, alive = psutil.wait_procs(first, timeout=60.0)
    assert not alive
