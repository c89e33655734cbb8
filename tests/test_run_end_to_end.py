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

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

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
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_in_process_and_on_ray_end_with_the_same_parameters(workplace: Path, engine: str) -> None:
    """Bitwise, with the transformers engine in float32 and one thread count. The runs have another number of
    processes."""
    cluster = workplace / "cluster.yaml"
    cluster.write_text("threads_per_role: 1\n")
    settings = [f"learner.engine={engine}", "--cluster", str(cluster)]
    done(rlhf(workplace, "run", "plain.yaml", *settings, "--run-dir", "ray"))
    done(rlhf(workplace, "run", "plain.yaml", *settings, "--run-dir", "local", "--in-process"))
    assert_bitwise_equal(policy(workplace / "ray", 4), policy(workplace / "local", 4))
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


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_parameters_as_an_undisturbed_one(workplace: Path) -> None:
    """SIGKILL between two checkpoints; in one process, float32."""
    done(rlhf(workplace, "run", "plain.yaml", "--in-process", "--run-dir", "straight", "loop.num_steps=6"))
    command = [*RLHF, "run", "plain.yaml", "--in-process", "--run-dir", "killed", "loop.num_steps=6"]
    process = subprocess.Popen(command, cwd=workplace, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (workplace / "killed/metrics.jsonl").exists() and len(rows(workplace / "killed")) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (workplace / "killed/checkpoints/step-000006").exists(), "the run ended before it was killed"
    done(rlhf(workplace, *command[3:]))
    assert_bitwise_equal(policy(workplace / "straight", 6), policy(workplace / "killed", 6))
    assert verified(workplace / "killed") == verified(workplace / "straight")
    assert [row["step"] for row in rows(workplace / "killed")] == [0, 1, 2, 3, 4, 5]


@pytest.mark.ray
@pytest.mark.slow
def test_every_actor_may_be_killed_and_the_run_ends_as_an_undisturbed_one(workplace: Path) -> None:
    """SIGKILL of one actor of each role, one after the other, in one run; same parameters, bitwise, and a clean ledger.

    Not covered: two deaths at once, the death of Ray's own processes.
    """
    (workplace / "cluster.yaml").write_text("threads_per_role: 1\n")
    settings = ["plain.yaml", "loop.num_steps=200", "loop.checkpoint_every=5", "--cluster", "cluster.yaml"]
    command = [*RLHF, "run", *settings, "--run-dir", "killed"]
    process = subprocess.Popen(command, cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics_file = workplace / "killed/metrics.jsonl"
    for restarts, role in enumerate(["Rollout", "PolicyRank", "JudgeHost", "ExperienceBuffer"]):
        wait_for(
            lambda restarts=restarts: (
                metrics_file.exists()
                and [row["faults/restarts"] for row in rows(workplace / "killed")].count(restarts) >= 3
            ),
            process,
        )
        victims = [
            child.pid
            for child in psutil.Process(process.pid).children(recursive=True)
            if " ".join(child.cmdline()).startswith(f"ray::{role}")
        ]
        os.kill(victims[0], signal.SIGKILL)
    wait_for(lambda: any(row["faults/restarts"] == 4 for row in rows(workplace / "killed")), process)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 130, told
    steps = len(rows(workplace / "killed"))
    done(rlhf(workplace, "run", *settings, f"loop.num_steps={steps}", "--run-dir", "straight", "--in-process"))
    assert_bitwise_equal(policy(workplace / "straight", steps), policy(workplace / "killed", steps))
    assert verified(workplace / "killed")["trained"] == verified(workplace / "straight")["trained"] == steps * 4


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
        ("    while True: pass", "5 s"),
        ("    return [1.0]", "1 value"),
        ("    return [float('nan')] * len(completions)", "nan"),
    ],
    ids=["raises", "hangs", "wrong number", "nan"],
)
def test_a_faulty_reward_function_stops_the_run_and_loses_nothing(workplace: Path, body: str, said: str) -> None:
    """Mended, the run goes on; what was generated is judged and not generated again."""
    (workplace / "reward.py").write_text(f"def reward(prompts, completions, **columns):\n{body}\n")
    arguments = ["run", "plain.yaml", "--in-process", "--run-dir", "faulty", "loop.num_steps=2"]
    failed = rlhf(workplace, *arguments)
    assert failed.returncode == 4 and said in failed.stdout + failed.stderr, failed.stdout + failed.stderr
    held = verified(workplace / "faulty")
    (workplace / "reward.py").write_text(REWARD)
    mended = rlhf(workplace, *arguments)
    done(mended)
    assert "none of them is generated again" in mended.stdout
    assert verified(workplace / "faulty")["trained"] == 8 and held["trained"] == 0


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    """Until the condition holds; fails when the process ends before, or after two minutes."""
    deadline = time.monotonic() + 120
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
