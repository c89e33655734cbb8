"""Parts of a PPO run on Ray die one by one, and then its driver: real Ray, real signals, the real command line.

The transformers engine and float32 sums, so that the end can be compared bitwise. Not covered: several machines, GPUs,
the death of Ray's own processes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlhf.buffer.schema import FILE_NAME, read_meta, reader
from rlhf.cli.inspect import standing

RLHF = [sys.executable, "-m", "rlhf.cli.main"]
PLAIN = {
    "seed": 5,
    "model": {"name": "tiny"},
    "algorithm": {"name": "ppo", "samples_per_prompt": 2, "kl": {"coef": 0.02}, "critic": {"lr": 1e-3}},
    "data": {"path": "prompts.jsonl", "heldout": 2},
    "loop": {"num_steps": 300, "groups_per_step": 4, "checkpoint_every": 6},
    "generation": {"engine": "transformers", "max_new_tokens": 8, "temperature": 0.9},
    "learner": {"engine": "torch", "lr": 1e-3},
    "reward": {"function": "reward.py:reward", "timeout_s": 60},
}
REWARD = """
def reward(prompts, completions, **columns):
    return [float(text.count("e")) for text in completions]
"""
DEADLINE_S = 240


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with prompts, a reward function and a run file."""
    rows = [json.dumps({"prompt": f"Tell me about number {n}."}) for n in range(40)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(PLAIN))
    (tmp_path / "cluster.yaml").write_text("threads_per_role: 1\n")
    return tmp_path


class Run:
    """A run in a session of its own, as a supervisor starts it; nothing of it outlives the test."""

    def __init__(self, folder: Path, *settings: str) -> None:
        command = [*RLHF, "run", "plain.yaml", *settings, "--cluster", "cluster.yaml", "--run-dir", "run"]
        self._log = (folder / "log.txt").open("ab")
        self.process = subprocess.Popen(
            command, cwd=folder, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.run_dir = folder / "run"

    def said(self) -> str:
        return (self.run_dir.parent / "log.txt").read_text()

    def rows(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, condition: Callable[[], bool]) -> None:
        """Fails when the run ends before, or after a generous while."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.poll() is None, self.said()[-3000:]
            assert time.monotonic() < deadline, self.said()[-3000:]
            time.sleep(0.02)

    def below(self) -> list[psutil.Process]:
        """All processes of the run but the driver."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def actors(self, role: str) -> list[int]:
        return sorted(p.pid for p in self.below() if title(p).startswith(f"ray::{role}"))

    def kill(self, role: str) -> None:
        os.kill(self.actors(role)[0], signal.SIGKILL)

    def wait(self) -> int:
        return self.process.wait(timeout=DEADLINE_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()


@pytest.fixture
def start(workplace: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def build(*settings: str) -> Run:
        runs.append(Run(workplace, *settings))
        return runs[-1]

    yield build
    for run in runs:
        run.close()


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def ended(process: psutil.Process) -> bool:
    """A zombie has ended; who should have reaped it does not matter here."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def rlhf(folder: Path, *arguments: str) -> str:
    done = subprocess.run([*RLHF, *arguments], cwd=folder, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def ledger(run_dir: Path) -> dict[str, int]:
    """The ledger's counts by `rlhf verify`, which fails when anything is wrong with it."""
    counts: dict[str, int] = json.loads(rlhf(run_dir.parent, "verify", str(run_dir), "--json"))["ledger"]
    return counts


def trained(run_dir: Path, updates: int) -> dict[str, torch.Tensor]:
    """Policy and critic with their optimizers."""
    folder = run_dir / "checkpoints" / f"step-{updates:06d}"
    files = sorted(folder.rglob("*.safetensors"))
    assert {path.parent.name for path in files} == {"policy", "trainer", "critic"}
    return {f"{path.parent.name} {name}": t for path in files for name, t in load_file(path).items()}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trainer_buffer_and_driver_die_and_the_end_is_that_of_an_undisturbed_run(
    workplace: Path, start: Callable[..., Run]
) -> None:
    """A policy rank, a critic rank, then the buffer actor: the others stay the processes that they were, and no prompt
    is leased twice, so that nothing was generated for the steps that were replayed. With a rank of either, policy and
    critic go back to the checkpoint together. Then SIGKILL to the driver while an engine is stopped: no process is
    left, and the next run starts at once. That one gets SIGTERM, as a supervisor sends it, to the whole process
    group."""
    run = start()
    run.until(lambda: len(run.rows()) % 6 > 2)  # some steps behind a checkpoint
    engine, judges = run.actors("Rollout"), run.actors("JudgeHost")
    for count, role in enumerate(("PolicyRank", "CriticRank"), start=1):
        before = {*run.actors("PolicyRank"), *run.actors("CriticRank")}
        run.kill(role)
        run.until(lambda count=count: any(row["faults/trainer_restarts"] == count for row in run.rows()))
        steps = len(run.rows())
        run.until(lambda steps=steps: len(run.rows()) > max(steps, 7))
        assert not before & {*run.actors("PolicyRank"), *run.actors("CriticRank")}
    assert "critic rank 0" in run.said()
    run.kill("ExperienceBuffer")
    run.until(lambda: [row["faults/buffer_restarts"] for row in run.rows()].count(1) > 2)
    assert run.actors("Rollout") == engine and run.actors("JudgeHost") == judges
    with reader(run.run_dir / FILE_NAME) as connection:
        meta = read_meta(connection)
    assert int(meta["ticket"]) == int(meta["issued"]) >= 9 * 4  # one lease a prompt
    assert run.rows()[-1]["faults/restarts"] == 0 and "trainer alone is built again" in run.said()

    os.kill(engine[0], signal.SIGSTOP)
    run.until(lambda: "waiting for groups" in str((standing(run.run_dir)["status"] or {}).get("doing")))
    below = run.below()
    session = next(word for p in below for word in title(p).split() if word.startswith("--session_dir="))
    run.process.kill()
    run.process.wait()
    status = standing(run.run_dir)["status"]
    assert status["pid"] == run.process.pid and status["alive"] is False
    again, before = start(), len(run.rows())
    deadline = time.monotonic() + DEADLINE_S
    while left := [p for p in psutil.process_iter() if (p in below or session in title(p)) and not ended(p)]:
        assert time.monotonic() < deadline, [title(p) for p in left]
        time.sleep(0.1)

    again.until(lambda: len(again.rows()) > before + 1)
    os.killpg(again.process.pid, signal.SIGTERM)
    assert again.wait() == 130, again.said()[-3000:]
    steps = len(again.rows())
    assert (again.run_dir / f"checkpoints/step-{steps:06d}/manifest.json").exists()
    settings = [f"loop.num_steps={steps}", "--cluster", "cluster.yaml", "--run-dir", "straight", "--in-process"]
    rlhf(workplace, "run", "plain.yaml", *settings)
    disturbed, undisturbed = trained(run.run_dir, steps), trained(workplace / "straight", steps)
    assert all(torch.equal(tensor, undisturbed[name]) for name, tensor in disturbed.items())
    assert ledger(run.run_dir)["trained"] == ledger(workplace / "straight")["trained"] == steps * 4


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("role", "replicas"), [("PolicyRank", "trainer"), ("CriticRank", "critic")])
def test_one_of_two_deepspeed_ranks_dies_and_both_are_built_again(
    workplace: Path, start: Callable[..., Run], role: str, replicas: str
) -> None:
    """Two of the policy beside one of the critic, and the other way round. What the other rank sees is a broken
    connection; what the run says is that the trainer died."""
    (workplace / "cluster.yaml").write_text(f"{replicas}: {{replicas: 2}}\nthreads_per_role: 1\n")
    run = start("learner.engine=deepspeed", "learner.zero_stage=2", "loop.num_steps=14")
    run.until(lambda: len(run.rows()) > 7)
    ranks, engine = run.actors(role), run.actors("Rollout")
    os.kill(ranks[1], signal.SIGKILL)
    run.until(lambda: any(row["faults/trainer_restarts"] == 1 for row in run.rows()))
    assert run.actors("Rollout") == engine and not set(run.actors(role)) & set(ranks)
    assert run.wait() == 0, run.said()[-3000:]
    assert ledger(run.run_dir)["trained"] == 14 * 4 and run.rows()[-1]["faults/restarts"] == 0


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_trainer_rank_and_a_buffer_that_are_stopped_for_good_are_replaced_alone(
    workplace: Path, start: Callable[..., Run]
) -> None:
    """SIGSTOP without an end: no process ends by itself, and the deadlines are ten minutes. Each is found by its
    missing signs of life and killed; the others stay the processes that they were, and nothing is generated again."""
    run = start("loop.heartbeat_timeout_s=8")
    run.until(lambda: len(run.rows()) > 4)
    engine, judges = run.actors("Rollout"), run.actors("JudgeHost")
    for role, fault in (("PolicyRank", "faults/trainer_restarts"), ("ExperienceBuffer", "faults/buffer_restarts")):
        (stopped,) = run.actors(role)
        os.kill(stopped, signal.SIGSTOP)
        run.until(lambda fault=fault: any(row[fault] == 1 for row in run.rows()[-2:]))
        run.until(lambda stopped=stopped: stopped not in {process.pid for process in run.below()})
    done = len(run.rows())
    run.until(lambda: len(run.rows()) > done + 3)
    assert "has shown no sign of life for" in run.said()
    assert run.actors("Rollout") == engine and run.actors("JudgeHost") == judges
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.wait() == 130, run.said()[-3000:]
    with reader(run.run_dir / FILE_NAME) as connection:
        meta = read_meta(connection)
    assert int(meta["ticket"]) == int(meta["issued"])  # one lease a prompt
    counts = ledger(run.run_dir)
    assert counts["trained"] == len(run.rows()) * 4 and not counts["dropped"]
