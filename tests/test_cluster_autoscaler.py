"""Runs on a cluster that Ray's autoscaler grows and shrinks: the real autoscaler and monitor, with its fake nodes,
which are real raylets on this machine.

Not covered: a cloud's own API, its quotas and its minutes until a node stands. `make soak` writes what it saw into
docs/clusters_tested.md.
"""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray_nodes import ENVIRONMENT, Run, end_tree, ledger, seen, short_folder, workplace

IDLE_S = 12
ENGINES = 3
# How soon Ray's autoscaler looks again, and how long it takes a silent node for one that may come back.
FAKE = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "AUTOSCALER_HEARTBEAT_TIMEOUT_S": "15",
    "RAY_enable_autoscaler_v2": "0",
}
# Its nodes have no addresses of their own, and nobody logs in to set them up.
ITS_OWN = {"use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True}
# Engines have no work while the first group of a step waits for its reward.
SLOW_REWARD = """
import time
from pathlib import Path

def reward(prompts, completions, **columns):
    while Path("{pause}").exists():
        time.sleep(0.5)
    return [float(text.count("e")) for text in completions]
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def node_type(least: int, most: int, **resources: float) -> dict[str, Any]:
    made = {"object_store_memory": 80 << 20, **resources}
    return {"resources": made, "node_config": {}, "min_workers": least, "max_workers": most}


class Autoscaled:
    """A head that starts and stops nodes below its own process."""

    def __init__(self, folder: Path) -> None:
        self._folder, port = folder, free_port()
        self.address = f"127.0.0.1:{port}"
        empty_lists = ["initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"]
        empty_lists += ["head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"]
        scaling = {
            "cluster_name": "fake",
            "max_workers": ENGINES + 2,
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": IDLE_S / 60,
            "provider": {"type": "fake_multinode", "gcs_address": self.address, **ITS_OWN},
            "auth": {"ssh_user": "nobody"},
            "docker": {},
            "file_mounts": {},
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
                "trainer": node_type(0, 1, CPU=1, trainer=2),
                "spot": node_type(0, ENGINES, CPU=1, engine=1),
            },
            "head_node_type": "ray.head.default",
            "rsync_exclude": [],
            "rsync_filter": [],
            "file_mounts_sync_continuously": False,
            **{name: [] for name in empty_lists},
        }
        (folder / "scaling.yaml").write_text(yaml.safe_dump(scaling))
        words = ["start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=false", "--num-cpus=2"]
        words += [f"--port={port}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}/ray"]
        words += ["--object-store-memory=80000000", f"--autoscaling-config={folder}/scaling.yaml"]
        self._log = (folder / "head.log").open("ab")
        self._head = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *words],
            env={**ENVIRONMENT, **FAKE},
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def nodes(self) -> int:
        """How many nodes there are, by their raylets."""
        assert self._head.poll() is None, (self._folder / "head.log").read_text()[-3000:]
        below = psutil.Process(self._head.pid).children(recursive=True)
        return sum(name_of(process) == "raylet" for process in below)

    def take_away_an_engine(self) -> None:
        """A node goes without notice, as a spot node may."""
        below = psutil.Process(self._head.pid).children(recursive=True)
        worker = next(process for process in below if title_of(process).startswith("ray::Rollout"))
        raylet = worker.parent()
        assert raylet is not None and name_of(raylet) == "raylet"
        raylet.kill()

    def wait_for(self, nodes: int) -> float:
        """Until there are so many; how long that took, seconds."""
        began = time.monotonic()
        while self.nodes() != nodes:
            assert time.monotonic() < began + 600, f"{self.nodes()} nodes, expected {nodes}"
            time.sleep(0.5)
        return time.monotonic() - began

    def end(self) -> None:
        end_tree(self._head)
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def name_of(process: psutil.Process) -> str:
    try:
        return process.name() if process.status() != psutil.STATUS_ZOMBIE else ""
    except psutil.NoSuchProcess:
        return ""


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture
def cluster() -> Iterator[Autoscaled]:
    made = Autoscaled(short_folder("rlhf-scaled"))
    yield made
    made.end()


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_nodes_come_for_a_run_and_go_after_it_and_one_is_taken_away(cluster: Autoscaled, tmp_path: Path) -> None:
    """A head that can hold neither the trainer's two ranks nor an engine. The run waits, for one node that holds both
    ranks and one with an engine; it starts, and takes two more engines as their nodes appear. A node is killed: the run
    goes on, and another node takes its place. While a reward takes its time there is no work for engines: all but one
    go with their nodes, and come back with the work. After the run all nodes but the head go. A clean ledger."""
    began = time.monotonic()
    cluster.wait_for(1)
    asked = {
        "address": cluster.address,
        "threads_per_role": 1,
        "placement_timeout_s": 900,
        "trainer": {"replicas": 2, "cpus": 0.1, "resources": {"trainer": 1}, "placement": "strict_pack"},
        "rollout": {
            "replicas": ENGINES,
            "min_replicas": 1,
            "idle_release_s": 5,
            "cpus": 0.1,
            "resources": {"engine": 1},
        },
        **{role: {"cpus": 0.1} for role in ("reference", "reward", "buffer")},
    }
    settings = ["learner.engine=deepspeed", "learner.zero_stage=2", "loop.num_steps=20000", "reward.timeout_s=900"]
    folder = workplace(tmp_path)
    (folder / "reward.py").write_text(SLOW_REWARD.format(pause=folder / "pause"))
    run = Run(folder, asked, "scaled", *settings)
    try:
        run.until(lambda: len(run.rows()) > 0, 900)
        first = time.monotonic() - began
        assert cluster.nodes() >= 1 + 1 + 1  # there was one; what the run says while it waits is no matter of this test
        run.until(lambda: run.rows()[-1]["sync/engines"] == ENGINES, 900)
        grown = time.monotonic() - began
        assert cluster.nodes() == 1 + 1 + ENGINES

        before, taken = len(run.rows()), time.monotonic()
        cluster.take_away_an_engine()
        run.until(lambda: run.rows()[-1]["sync/engines"] == ENGINES - 1, 600)
        without = len(run.rows()) - before
        run.until(lambda: run.rows()[-1]["sync/engines"] == ENGINES, 900)
        back = time.monotonic() - taken

        (folder / "pause").touch()
        idle_s = cluster.wait_for(1 + 1 + 1)
        assert run.said().count("is let go after 5 s without work") >= ENGINES - 1
        (folder / "pause").unlink()
        work = time.monotonic()
        run.steps(2, 600)
        run.until(lambda: run.rows()[-1]["sync/engines"] == ENGINES, 900)
        again = time.monotonic() - work
        assert not sum(row["faults/restarts"] + row["faults/trainer_restarts"] for row in run.rows())
        run.process.terminate()
        run.wait(130)
    finally:
        run.end()
    shrunk = cluster.wait_for(1)
    counts = ledger(run.run_dir)
    assert counts["trained"] == len(run.rows()) * 4
    seen(
        "autoscaler",
        f"- From one node to the first step on three: {first:.0f} s; all {ENGINES} engines at work after {grown:.0f} "
        "s.\n"
        f"- A node taken away: {without} steps later the pool had one engine fewer, {back:.0f} s later its replacement "
        "on a new node was at work.\n"
        f"- No work for engines: the nodes of all but one were gone after {idle_s:.0f} s (`idle_release_s` 5 s, the "
        f"autoscaler's time-out {IDLE_S} s), and back at work {again:.0f} s after there was work again.\n"
        f"- {shrunk:.0f} s after the run the head was alone again (idle time-out {IDLE_S} s).\n"
        f"- {len(run.rows())} steps, {counts['trained']} prompts trained once each, lost {counts['lost']}.",
    )
