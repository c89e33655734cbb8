"""examples/helpful: its stages on the tiny model, and what it measures with.

Not covered: whether anything is learnt (docs/results/helpful.md has a run on SmolLM2)."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from examples.helpful import evaluate, stages
from rlhf.models.resolve import resolve

PROJECT = Path(__file__).parents[1]
SPIN = (
    "import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', 'while 1: pass']); sys.stdin.read(); c.kill()"
)


def test_cpu_time_is_that_of_all_processes_of_a_run() -> None:
    """The parent only waits; its child computes."""
    with subprocess.Popen([sys.executable, "-c", SPIN], stdin=subprocess.PIPE) as parent:
        try:
            deadline = time.monotonic() + 60
            while sum(stages.cpu_seconds(parent.pid).values()) < 0.5:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert len(stages.cpu_seconds(parent.pid)) == 2
        finally:
            assert parent.stdin is not None
            parent.stdin.close()
    assert stages.cpu_seconds(parent.pid) == {}


def test_logprob_of_an_answer_is_that_of_its_tokens_one_by_one() -> None:
    policy = evaluate.Policy(resolve("tiny"))
    ((text, ids),) = policy.answers(["say a"])
    assert text == policy._tokenizer.decode(ids, skip_special_tokens=True)
    read, total = evaluate.asked(policy._tokenizer, "say a"), 0.0
    for token in ids:
        with torch.no_grad():
            total += float(policy._model(torch.tensor([read])).logits[0, -1].log_softmax(-1)[token])
        read.append(token)
    assert policy.logprob("say a", ids) == pytest.approx(total, abs=1e-3)


def test_means_and_halves() -> None:
    assert evaluate.mean([1.0, 2.0, 3.0, 4.0]) == "2.50 ± 1.27", "1.96 x 1.291 / 2"
    assert [evaluate.half(1.0, 2.0), evaluate.half(2.0, 2.0), evaluate.half(3.0, 2.0)] == [0.0, 0.5, 1.0]


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_stages_one_after_the_other_and_again(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"count to {n % 30}", "chosen": f"{n} " * (2 + n % 3), "rejected": f"no {n}"} for n in range(120)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def stage(*words: str) -> str:
        command = [sys.executable, "-m", "examples.helpful.stages", *words, "--root", str(tmp_path / "root")]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    stage("data", "--pairs", str(pairs), "--heldout", "5")
    short = ("loop.num_steps=2", "loop.checkpoint_every=1")
    told = stage("reward_model", "--model", "tiny", *short)
    assert "20 held-out pairs: reward model" in told
    stage("sft", "--model", "tiny", *short)
    for name in stages.POLICIES:
        stage(name, "--cpu-minutes", "0", *short)
    spent = json.loads((tmp_path / "root/dpo/used.json").read_text())
    assert spent["cpu_minutes"] > 0
    assert "has used its" in stage("dpo", "--cpu-minutes", str(spent["cpu_minutes"]), *short)
    # The budget ends a run that has steps left, at a step, with its state saved.
    stage("rloo", "--cpu-minutes", "1000", "loop.num_steps=3", "loop.checkpoint_every=1")
    before = json.loads((tmp_path / "root/rloo/used.json").read_text())["cpu_minutes"]
    # `before` is that of two starts and three steps, so the same again is enough for one start and more than a step.
    stage("rloo", "--cpu-minutes", str(2 * before), "loop.num_steps=100000", "loop.checkpoint_every=0")
    rloo = (tmp_path / "root/rloo/metrics.jsonl").read_text().splitlines()
    assert 3 < len(rloo) < 100000
    lines = stage("table").splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["policy", "---", "SFT", "DPO", "RSO", "RLOO"]
    assert (tmp_path / "root/table.md").exists()
