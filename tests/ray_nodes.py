"""What the tests of clusters share: several Ray nodes on this machine, and runs of the real command line on them."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import load_file

RLHF = [sys.executable, "-m", "rlhf.cli.main"]
DEADLINE_S = 280
TOKEN = "0123456789abcdef" * 4
# Who joins a cluster must have its token; libraries must not call out of a closed network.
ENVIRONMENT = {
    **os.environ,
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
PLAIN = {
    "seed": 5,
    "model": {"name": "tiny"},
    "algorithm": {"name": "rloo", "samples_per_prompt": 2, "kl": {"coef": 0.02}},
    "data": {"path": "prompts.jsonl"},
    "loop": {"num_steps": 2, "groups_per_step": 4},
    "generation": {"engine": "transformers", "max_new_tokens": 8, "temperature": 0.9},
    "learner": {"engine": "torch", "lr": 1e-3},
    "reward": {"function": "reward.py:reward", "timeout_s": 60},
}
REWARD = "def reward(prompts, completions, **columns):\n    return [float(text.count('e')) for text in completions]\n"


def workplace(folder: Path) -> Path:
    """A folder with prompts, a reward function and a run file."""
    rows = [json.dumps({"prompt": f"Tell me about number {n}."}) for n in range(40)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    (folder / "reward.py").write_text(REWARD)
    (folder / "plain.yaml").write_text(yaml.safe_dump(PLAIN))
    return folder


class Nodes:
    """Ray nodes on this machine by name; the first one is the head. `end` leaves no process."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("ab")
        self._folder = short_folder("rlhf-nodes")
        script = Path(__file__).with_name("ray_nodes_process.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            # A folder of its own: in the common one Ray writes down the newest cluster, for whoever asks for `auto`.
            env={**ENVIRONMENT, "RAY_TMPDIR": str(self._folder)},
            text=True,
            start_new_session=True,
        )
        self.ids: dict[str, str] = {}
        self.address = ""

    def add(self, name: str, cpus: float, **resources: float) -> None:
        made = self._ask({"do": "add", "name": name, "cpus": cpus, "resources": resources})
        self.ids[name], self.address = made["node_id"], made["address"]

    def kill(self, name: str) -> None:
        """Without notice, as when power fails."""
        self._ask({"do": "kill", "name": name})

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the cluster's process ended"
        return json.loads(answer)

    def drain(self, name: str) -> None:
        """`ray drain-node`, as for a preemption notice."""
        words = ["drain-node", "--address", self.address, "--node-id", self.ids[name]]
        words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "notice"]
        words += ["--deadline-remaining-seconds", "600"]
        told = ray_command(words, ENVIRONMENT)
        assert told.returncode == 0, told.stdout + told.stderr

    def end(self) -> None:
        end_tree(self._process)
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def ray_command(words: Sequence[str], environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    ray = str(Path(sys.executable).with_name("ray"))
    return subprocess.run([ray, *words], env=environment, capture_output=True, text=True, timeout=120, check=False)


def end_tree(process: "subprocess.Popen[Any]") -> None:
    """Kills a process that was started here, and all below it."""
    below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for each in [process, *below]:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait(timeout=60)
    psutil.wait_procs(below, timeout=60)


class Run:
    """`rlhf run` in a folder, in a session of its own, as a supervisor starts it."""

    def __init__(
        self, folder: Path, cluster: Mapping[str, Any], name: str, *settings: str, before: Sequence[str] = ()
    ) -> None:
        """name, the run directory; before, words that stand before the command."""
        (folder / f"{name}.cluster.yaml").write_text(yaml.safe_dump(dict(cluster)))
        command = [*before, *RLHF, "run", "plain.yaml", *settings, "--cluster", f"{name}.cluster.yaml"]
        self.run_dir = folder / name
        self._path = folder / f"{name}.log"
        self._log = self._path.open("ab")
        self.process = subprocess.Popen(
            [*command, "--run-dir", name],
            cwd=folder,
            env=ENVIRONMENT,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def said(self) -> str:
        return self._path.read_text()

    def rows(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
        """Fails when the run ends before, or after a generous while."""
        deadline = time.monotonic() + deadline_s
        while not condition():
            assert self.process.poll() is None, self.said()[-4000:]
            assert time.monotonic() < deadline, self.said()[-4000:]
            time.sleep(0.05)

    def steps(self, count: int, deadline_s: float = DEADLINE_S) -> None:
        """Until so many more steps are done."""
        goal = len(self.rows()) + count
        self.until(lambda: len(self.rows()) >= goal, deadline_s)

    def wait(self, code: int, deadline_s: float = DEADLINE_S) -> str:
        """Its end, which must have this exit code; returns what it said."""
        found = self.process.wait(timeout=deadline_s)
        assert found == code, f"exit code {found}, expected {code}:\n{self.said()[-4000:]}"
        return self.said()

    def end(self) -> None:
        end_tree(self.process)
        self._log.close()


def rlhf(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [*RLHF, *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def ledger(run_dir: Path) -> dict[str, int]:
    """The ledger's counts by `rlhf verify`, which fails when anything is wrong with it."""
    report = json.loads(rlhf(run_dir.parent, "verify", str(run_dir), "--json"))
    assert report["ok"] and report["ledger"]["lost"] == report["ledger"]["duplicated"] == 0
    return report["ledger"]


def policy(run_dir: Path, updates: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{updates:06d}" / "policy" / "model.safetensors")


def short_folder(name: str) -> Path:
    """A new folder for Ray, whose sockets do not fit below the long ones that pytest makes."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir="/tmp"))


def seen(name: str, text: str) -> None:
    """Writes what a long test saw into its place of docs/clusters_tested.md."""
    page = Path(__file__).parents[1] / "docs" / "clusters_tested.md"
    before, rest = page.read_text().split(f"<!-- soak: {name} -->", 1)
    _, after = rest.split("<!-- end -->", 1)
    page.write_text(f"{before}<!-- soak: {name} -->\n{text}\n<!-- end -->{after}")
