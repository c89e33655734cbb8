"""The process beside a run finds the processes of a role and strikes one of them: real processes that do nothing.

What real actors make of it is seen in tests/test_soak_kills.py."""

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
import yaml

from rlhf.chaos.points import ROLE_VARIABLE, RUN_VARIABLE
from rlhf.durable import append_durably

# Starts a child of its own, as a judge does, says so, and sleeps.
IDLE = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
PATIENCE_S = 60.0


class Idle:
    """A process of a role, and the one that it started."""

    def __init__(self, run_dir: Path, role: str) -> None:
        environment = {**os.environ, RUN_VARIABLE: str(run_dir), ROLE_VARIABLE: role}
        self.process = subprocess.Popen(
            [sys.executable, "-c", IDLE], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        assert self.process.stdout is not None
        self.child = int(self.process.stdout.readline())

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    plan = {
        "faults": [
            {"kind": "kill", "roles": ["rollout"], "when": {"after_steps": [1]}},
            {"kind": "stop", "roles": ["buffer"], "for_s": 5.0, "when": {"after_steps": [2]}},
        ]
    }
    (tmp_path / "chaos.yaml").write_text(yaml.safe_dump(plan))
    return tmp_path


@pytest.fixture
def team(run_dir: Path) -> Iterator[dict[str, Idle]]:
    """Two engines and a buffer of this run, and an engine of another one."""
    elsewhere = run_dir / "elsewhere"
    idle = {
        "first": Idle(run_dir, "rollout"),
        "second": Idle(run_dir, "rollout"),
        "buffer": Idle(run_dir, "buffer"),
        "stranger": Idle(elsewhere, "rollout"),
    }
    yield idle
    for each in idle.values():
        each.end()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def rows(run_dir: Path, event: str) -> list[dict[str, Any]]:
    path = run_dir / "chaos.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for line in lines if (row := json.loads(line))["event"] == event]


@pytest.mark.slow
def test_one_process_of_the_role_is_struck_and_what_was_stopped_goes_on(run_dir: Path, team: dict[str, Idle]) -> None:
    command = [sys.executable, "-m", "rlhf.chaos.injector", str(run_dir), str(os.getpid())]
    injector = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert injector.stdin is not None and injector.stdout is not None
    assert injector.stdout.readline() == "ready\n"
    assert all(each.process.poll() is None for each in team.values()), "nothing was due"

    append_durably(run_dir / "metrics.jsonl", {"step": 0})
    engines = [team["first"], team["second"]]
    wait_for(lambda: any(each.process.poll() is not None for each in engines))
    (dead,) = [each for each in engines if each.process.poll() is not None]
    assert dead.process.returncode == -signal.SIGKILL and psutil.pid_exists(dead.child)
    assert team["stranger"].process.poll() is None

    append_durably(run_dir / "metrics.jsonl", {"step": 1})
    buffer = psutil.Process(team["buffer"].process.pid)
    wait_for(lambda: len(rows(run_dir, "fault")) == 2)
    wait_for(lambda: buffer.status() == psutil.STATUS_STOPPED)
    wait_for(lambda: buffer.status() != psutil.STATUS_STOPPED)

    append_durably(run_dir / "metrics.jsonl", {"step": 2})
    wait_for(lambda: len(rows(run_dir, "recovered")) == 1)  # the kill: step 1 was under way, step 2 began after it
    append_durably(run_dir / "metrics.jsonl", {"step": 3})
    wait_for(lambda: len(rows(run_dir, "recovered")) == 2)
    kill, stop = rows(run_dir, "fault")
    assert (kill["role"], kill["pid"], kill["steps"]) == ("rollout", dead.process.pid, 1)
    assert (stop["role"], stop["pid"], stop["steps"]) == ("buffer", team["buffer"].process.pid, 2)
    injector.stdin.close()
    assert injector.wait(timeout=PATIENCE_S) == 0


@pytest.mark.slow
def test_the_stopped_are_continued_when_the_run_ends(run_dir: Path, team: dict[str, Idle]) -> None:
    """A driver that is killed must not leave a stopped process that nobody would wake."""
    plan = {"faults": [{"kind": "stop", "roles": ["buffer"], "for_s": 600.0, "when": {"after_s": [0.1]}}]}
    (run_dir / "chaos.yaml").write_text(yaml.safe_dump(plan))
    command = [sys.executable, "-m", "rlhf.chaos.injector", str(run_dir), str(os.getpid())]
    injector = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert injector.stdin is not None
    buffer = psutil.Process(team["buffer"].process.pid)
    wait_for(lambda: buffer.status() == psutil.STATUS_STOPPED)
    injector.stdin.close()
    assert injector.wait(timeout=PATIENCE_S) == 0
    assert buffer.status() != psutil.STATUS_STOPPED
