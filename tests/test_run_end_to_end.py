"""Whole runs through the real command line, on the tiny model: real Ray, real vLLM, real DeepSpeed, real signals.

Not covered: several machines, GPUs, SmolLM2 (examples and the demo), long runs.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlhf.buffer.audit import ExperienceView
from rlhf.cli.skipped import refuse_unmoved
from rlhf.errors import RunFailed

ROOT = Path(__file__).parents[1]
RLHF = [sys.executable, "-m", "rlhf.cli.main"]

# One config for most tests here: no vLLM, so that every sum is taken in the same order in and out of Ray.
PLAIN = {
    "seed": 3,
    "model": {"name": "tiny"},
    "algorithm": {"name": "rloo", "samples_per_prompt": 2, "kl": {"coef": 0.02}},
    "data": {"path": "prompts.jsonl", "heldout": 2},
    "loop": {"num_steps": 4, "groups_per_step": 4, "checkpoint_every": 2},
    "generation": {"engine": "transformers", "max_new_tokens": 8, "temperature": 0.9},
    "learner": {"engine": "torch", "lr": 1e-3},
    "reward": {"function": "reward.py:reward", "timeout_s": 5},
}
REWARD = """
def reward(prompts, completions, **columns):
    return [float(text.count("e")) for text in completions]
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with prompts, a reward function and the plain run file."""
    rows = [json.dumps({"prompt": f"Tell me about number {n}."}) for n in range(40)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(PLAIN))
    return tmp_path


def rlhf(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*RLHF, *arguments], cwd=folder, capture_output=True, text=True, timeout=280, check=False)


def done(finished: "subprocess.CompletedProcess[str]") -> None:
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]


def verified(run_dir: Path) -> Mapping[str, int]:
    """The ledger by `rlhf verify`; fails the test when anything is wrong with it."""
    answer = rlhf(run_dir.parent, "verify", str(run_dir), "--json")
    report = json.loads(answer.stdout)
    assert answer.returncode == 0 and report["ok"] and report["ledger"]["lost"] == report["ledger"]["duplicated"] == 0
    return report["ledger"]


def policy(run_dir: Path, updates: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{updates:06d}" / "policy" / "model.safetensors")


def critic(run_dir: Path, updates: int) -> dict[str, torch.Tensor]:
    """Parameters and optimizer of the critic; nothing of a run without one."""
    folder = run_dir / "checkpoints" / f"step-{updates:06d}" / "trainer" / "critic"
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_bitwise_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"{len(different)} of {len(left)} tensors differ: {different[:3]}"


def rows(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.slow
def test_rloo_on_ray_with_vllm_and_deepspeed_learns_and_loses_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done(rlhf(ROOT, "run", "configs/rloo_tiny.yaml", "--run-dir", str(run_dir)))
    steps = rows(run_dir)
    first, last = (sum(row["reward/mean"] for row in part) / 5 for part in (steps[:5], steps[-5:]))
    assert last > first + 3 * steps[0]["reward/std"], (first, last)
    assert max(row["mismatch/logprob_abs_max"] for row in steps) < 1e-4
    ledger = verified(run_dir)
    assert ledger["trained"] == ledger["issued"] == len(steps) * 16
    assert (run_dir / "report.html").stat().st_size > 0 and list((run_dir / "tensorboard").iterdir())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("engine", "algorithm"), [("torch", "rloo"), ("deepspeed", "ppo")])
def test_in_process_and_on_ray_end_with_the_same_parameters(workplace: Path, engine: str, algorithm: str) -> None:
    """Bitwise, with the transformers engine in float32 and one thread count. The runs have another number of
    processes: PPO's critic learns in its own while the policy does. PPO with the torch engine: test_recovery.py."""
    cluster = workplace / "cluster.yaml"
    cluster.write_text("threads_per_role: 1\n")
    settings = [f"learner.engine={engine}", "--cluster", str(cluster)]
    if algorithm == "ppo":
        settings += ["algorithm={name: ppo, samples_per_prompt: 2, critic: {lr: 1.0e-3}}", "learner.minibatches=2"]
    done(rlhf(workplace, "run", "plain.yaml", *settings, "--run-dir", "ray"))
    done(rlhf(workplace, "run", "plain.yaml", *settings, "--run-dir", "local", "--in-process"))
    assert_bitwise_equal(policy(workplace / "ray", 4), policy(workplace / "local", 4))
    states = [critic(workplace / name, 4) for name in ("ray", "local")]
    assert_bitwise_equal(*states)
    for name in ("ray", "local"):  # held out prompts are answered before the first step and after the last
        times = [row["time/evaluate_s"] for row in rows(workplace / name)]
        assert times[0] > 0 and not any(times[1:])
    assert bool(states[0]) == (algorithm == "ppo")
    assert [row["reward/mean"] for row in rows(workplace / "ray")] == [
        r["reward/mean"] for r in rows(workplace / "local")
    ]


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_and_two_engines_agree_for_three_steps(workplace: Path, stage: int) -> None:
    """Each engine verifies the fingerprint and the probe of every version, or the run would end with exit code 4."""
    cluster = workplace / "cluster.yaml"
    cluster.write_text("trainer: {replicas: 2}\nrollout: {replicas: 2}\nthreads_per_role: 1\n")
    settings = ["loop.num_steps=3", "generation.engine=vllm", "generation.cache_gib=0.3", "learner.engine=deepspeed"]
    done(rlhf(workplace, "run", "plain.yaml", *settings, f"learner.zero_stage={stage}", "--cluster", str(cluster)))
    steps = rows(workplace / "runs" / "plain")
    assert len(steps) == 3 and max(row["mismatch/logprob_abs_max"] for row in steps) < 1e-4
    assert all(row["sync/engines"] == 2 and row["sync/probe_abs_max"] < 1e-3 for row in steps)
    assert verified(workplace / "runs" / "plain")["trained"] == 12


def actors_of(process: "subprocess.Popen[str]") -> dict[int, str]:
    """The actors of a run by process id: their class names."""

    def title(child: psutil.Process) -> str:
        try:
            return " ".join(child.cmdline())
        except psutil.Error:  # it has just ended
            return ""

    found = {child.pid: title(child) for child in psutil.Process(process.pid).children(recursive=True)}
    roles = ("Rollout", "PolicyRank", "CriticRank", "JudgeHost", "ExperienceBuffer")
    return {pid: role for pid, line in found.items() for role in roles if line.startswith(f"ray::{role}")}


def disturb(process: "subprocess.Popen[str]", run_dir: Path, role: str, number: signal.Signals, fault: str) -> None:
    """A signal to one actor of a role, in the middle of the run; returns when the metric of the fault has grown and
    three more steps are done. No other actor may have been replaced."""

    def count() -> float:
        return sum(row[fault] for row in rows(run_dir))

    def steps() -> int:
        return len(rows(run_dir))

    wait_for(lambda: (run_dir / "metrics.jsonl").exists() and steps() > 0, process)
    before, counted = actors_of(process), count()
    victim = min(pid for pid, name in before.items() if name == role)
    assert "CriticRank" not in before.values(), "RLOO has no critic"
    os.kill(victim, number)
    wait_for(lambda: count() > counted, process)
    goal = steps() + 3
    wait_for(lambda: steps() >= goal, process)
    wait_for(lambda: victim not in actors_of(process), process)
    assert {pid: name for pid, name in before.items() if pid != victim}.items() <= actors_of(process).items()


@pytest.mark.ray
@pytest.mark.slow
def test_an_engine_or_judge_that_dies_or_hangs_is_replaced_alone_and_the_run_ends_as_an_undisturbed_one(
    workplace: Path,
) -> None:
    """One of two engines gets SIGKILL, then the judge's host, then an engine SIGSTOP. Same parameters, bitwise, and the
    same ledger as the run in one process that nobody disturbs."""
    (workplace / "cluster.yaml").write_text("rollout: {replicas: 2}\nthreads_per_role: 1\n")
    settings = ["plain.yaml", "loop.heartbeat_timeout_s=20", "--cluster", "cluster.yaml"]
    command = [*RLHF, "run", *settings, "loop.num_steps=300", "--run-dir", "killed"]
    process = subprocess.Popen(command, cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    disturb(process, workplace / "killed", "Rollout", signal.SIGKILL, "faults/workers_died")
    disturb(process, workplace / "killed", "JudgeHost", signal.SIGKILL, "faults/workers_died")
    disturb(process, workplace / "killed", "Rollout", signal.SIGSTOP, "faults/workers_hung")
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 130, told
    steps = rows(workplace / "killed")
    assert not sum(row["faults/prompts_set_aside"] + row["faults/restarts"] for row in steps), told
    straight = [*settings, f"loop.num_steps={len(steps)}", "--run-dir", "straight", "--in-process"]
    done(rlhf(workplace, "run", *straight))
    assert_bitwise_equal(policy(workplace / "straight", len(steps)), policy(workplace / "killed", len(steps)))
    ledgers = [verified(workplace / name) for name in ("killed", "straight")]  # one holds leases: it was interrupted
    assert ledgers[0]["trained"] == ledgers[1]["trained"] == len(steps) * 4 and not ledgers[0]["dropped"]
    trained = [ExperienceView(workplace / name / "experience.db").history() for name in ("killed", "straight")]
    assert [step.prompt_ids for step in trained[0]] == [step.prompt_ids for step in trained[1]]


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.soak
def test_one_of_two_vllm_engines_is_killed_and_only_it_is_replaced(workplace: Path) -> None:
    """The ledger is that of the undisturbed run; with vLLM the samples need not be bitwise the same."""
    (workplace / "cluster.yaml").write_text("rollout: {replicas: 2}\nthreads_per_role: 1\n")
    settings = ["plain.yaml", "generation.engine=vllm", "generation.cache_gib=0.3", "loop.num_steps=40"]
    command = [*RLHF, "run", *settings, "--cluster", "cluster.yaml", "--run-dir", "killed"]
    process = subprocess.Popen(command, cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    disturb(process, workplace / "killed", "Rollout", signal.SIGKILL, "faults/workers_died")
    told, _ = process.communicate(timeout=280)
    assert process.returncode == 0, told
    ledger = verified(workplace / "killed")
    assert ledger["trained"] == ledger["issued"] == 160 and rows(workplace / "killed")[-1]["sync/engines"] == 2, told
    steps = ExperienceView(workplace / "killed" / "experience.db").history()
    assert [step.prompt_ids for step in steps] == [tuple(range(n, n + 4)) for n in range(0, 160, 4)]


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_and_deepspeed_share_one_process(workplace: Path) -> None:
    settings = ["generation.engine=vllm", "generation.cache_gib=0.3", "learner.engine=deepspeed", "loop.num_steps=2"]
    done(rlhf(workplace, "run", "plain.yaml", *settings, "--in-process", "--run-dir", "shared"))
    assert verified(workplace / "shared")["trained"] == 8


@pytest.mark.slow
def test_an_interrupted_run_saves_its_state_and_goes_on(workplace: Path) -> None:
    command = [*RLHF, "run", "plain.yaml", "--in-process", "--run-dir", "stopped", "loop.num_steps=30"]
    process = subprocess.Popen(command, cwd=workplace, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (workplace / "stopped/metrics.jsonl").exists() and len(rows(workplace / "stopped")) >= 3, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    saved = len(rows(workplace / "stopped"))
    assert (workplace / f"stopped/checkpoints/step-{saved:06d}/manifest.json").exists()
    going_on = rlhf(workplace, *command[3:-1], f"loop.num_steps={saved + 1}")
    done(going_on)
    assert f"step-{saved:06d}" in going_on.stdout and len(rows(workplace / "stopped")) == saved + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("    raise KeyError('no such word')", "no such word"),
        ("    while True: pass", "1 s"),
        ("    return [1.0]", "1 value"),
        ("    return [float('nan')] * len(completions)", "nan"),
    ],
    ids=["raises", "hangs", "wrong number", "nan"],
)
def test_a_faulty_reward_function_stops_the_run_and_loses_nothing(workplace: Path, body: str, said: str) -> None:
    """Mended, the run goes on; what was generated is judged and not generated again."""
    (workplace / "reward.py").write_text(f"def reward(prompts, completions, **columns):\n{body}\n")
    arguments = ["run", "plain.yaml", "--in-process", "--run-dir", "faulty", "loop.num_steps=2", "reward.timeout_s=1"]
    failed = rlhf(workplace, *arguments)
    assert failed.returncode == 4 and said in failed.stdout + failed.stderr, failed.stdout + failed.stderr
    held = verified(workplace / "faulty")
    (workplace / "reward.py").write_text(REWARD)
    mended = rlhf(workplace, *arguments)
    done(mended)
    assert "none of them is generated again" in mended.stdout
    assert verified(workplace / "faulty")["trained"] == 8 and held["trained"] == 0


def test_a_run_whose_steps_were_all_skipped_is_no_success(workplace: Path) -> None:
    """A price of infinity in float32. Said of each step, exit code 4 at the end, and again when it goes on."""
    arguments = ["run", "plain.yaml", "--in-process", "--run-dir", "skipped", "algorithm.kl.coef=1e40"]
    for steps, begins in ((1, "starts"), (2, "goes on at step 1")):
        ended = rlhf(workplace, *arguments, f"loop.num_steps={steps}")
        assert ended.returncode == 4, ended.stdout + ended.stderr
        assert f"no update was applied in {steps} steps: all {steps} optimizer steps were skipped" in ended.stderr
        assert f"step {steps}: 1 optimizer steps skipped" in ended.stdout and begins in ended.stdout
        assert "failed: report in" in ended.stdout and "done:" not in ended.stdout
    assert verified(workplace / "skipped")["trained"] == 8


def test_one_update_that_was_applied_is_enough(tmp_path: Path) -> None:
    """Steps without a gradient norm, but without a skipped optimizer step, had nothing to train on: no failure."""
    log = tmp_path / "metrics.jsonl"
    for rows in ([{"faults/nonfinite_step": 1.0}, {"grad_norm": 0.0}], [{"faults/empty_minibatch": 1.0}], []):
        log.write_text("".join(json.dumps({"step": step, **row}) + "\n" for step, row in enumerate(rows)))
        refuse_unmoved(tmp_path)
    log.write_text(json.dumps({"step": 0, "faults/nonfinite_step": 2.0}))
    with pytest.raises(RunFailed, match="in 1 steps: all 2 optimizer steps"):
        refuse_unmoved(tmp_path)


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[Any]") -> None:
    """Until the condition holds; fails when the process ends before, or after four minutes."""
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, f"the run ended with {process.returncode} before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_every_process_here_keeps_off_the_network() -> None:
    """What conftest.py sets must reach the runs that these tests start."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.slow
def test_a_run_directory_belongs_to_one_run_at_a_time(workplace: Path) -> None:
    """The second run is refused; after a SIGKILL the directory is free again."""
    command = [*RLHF, "run", "plain.yaml", "--in-process", "--run-dir", "shared", "loop.num_steps=500"]
    first = subprocess.Popen(command, cwd=workplace, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (workplace / "shared/metrics.jsonl").exists() and bool(rows(workplace / "shared")), first)
    second = rlhf(workplace, *command[3:])
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.returncode == 2 and f"process {first.pid}" in second.stderr
    done(rlhf(workplace, *command[3:-1], f"loop.num_steps={len(rows(workplace / 'shared')) + 1}"))
