"""Ray that a run started, its end, and waits on real actors. A killed driver: tests/test_recovery.py."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from rlhf.cluster import Cluster
from rlhf.errors import ActorDied, DeadlinePassed

ORPHANS = """
import os, signal, subprocess, sys, time
from actors import keeper

def be_head(answer, settings):
    daemon = "import os, time; os.setsid(); print(os.getpid(), flush=True); time.sleep(600)"
    pids = []
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", daemon], stdout=subprocess.PIPE, text=True)
        pids.append(int(child.stdout.readline()))
    os.kill(pids[0], signal.SIGSTOP)
    os.write(answer, " ".join(map(str, pids)).encode())
    os._exit(0)  # both are orphans now

keeper.be_head = be_head
run, lifeline, answer = map(int, sys.argv[1:])
keeper.main(run, lifeline, answer, {})
"""


class Rank:
    """An actor that works for a while, fails or ends its process."""

    def pid(self) -> int:
        return os.getpid()

    def work(self, seconds: float) -> str:
        time.sleep(seconds)
        return f"{seconds:g}"

    def fail_as_one_whose_peer_is_gone(self) -> None:
        raise RuntimeError("Connection closed by peer")


@pytest.fixture(scope="module")
def on_ray() -> Iterator[None]:
    """As a run starts it; when it ends, none of its processes is left, and one that is not its own lives."""
    from actors import placement

    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    others = {child.pid for child in psutil.Process().children(recursive=True)}  # of this and earlier tests
    with placement.started(Cluster(cpus=4, object_store_gib=0.1), {}):
        yield
        below = [p for p in psutil.Process().children(recursive=True) if p.pid not in others]
        assert len(below) > 3
    left = [p for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    alive = bystander.poll() is None
    bystander.kill()
    bystander.wait(timeout=60)
    assert not left and alive


@pytest.mark.ray
@pytest.mark.slow
def test_who_is_late_is_named(on_ray: None) -> None:
    import ray

    from actors import waiting

    fast, slow = ray.remote(Rank).options(num_cpus=1).remote(), ray.remote(Rank).options(num_cpus=1).remote()
    named = {"rank 0": fast.work.remote(0.0), "rank 1": slow.work.remote(600)}
    with pytest.raises(DeadlinePassed, match=r"updating \(rank 1\): 1 of 2 answers missing after 20 s"):
        waiting.gather(named, "updating", 20.0, 0.0)
    assert waiting.current() is None
    again = {"a": fast.work.remote(0.5), "b": fast.work.remote(0.0)}
    assert waiting.gather(again, "both", 60.0, 0.0) == ["0.5", "0"]
    for actor in (fast, slow):
        ray.kill(actor)


@pytest.mark.ray
@pytest.mark.slow
def test_the_death_of_a_rank_is_told_and_not_what_its_peer_saw_of_it(on_ray: None) -> None:
    import ray

    from actors import waiting

    alive, dying = ray.remote(Rank).options(num_cpus=1).remote(), ray.remote(Rank).options(num_cpus=1).remote()
    victim = ray.get(dying.pid.remote(), timeout=60)
    named = {"rank 0": alive.fail_as_one_whose_peer_is_gone.remote(), "rank 1": dying.work.remote(600)}
    ray.wait([named["rank 0"]], timeout=60)
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(ActorDied, match="rank 1") as died:
        waiting.gather(named, "updating", 60.0, 30.0)
    assert died.value.actor_id == dying._actor_id.hex()
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        waiting.gather({"rank 0": alive.fail_as_one_whose_peer_is_gone.remote()}, "updating", 60.0, 30.0)
    ray.kill(alive)


def test_stopped_and_orphaned_processes_end_with_the_run() -> None:
    """Without Ray: the head leaves two processes of sessions of their own behind, one of them stopped."""
    lifeline, ours = os.pipe()
    answer, theirs = os.pipe()
    arguments = [str(os.getpid()), str(lifeline), str(theirs)]
    keeper = subprocess.Popen([sys.executable, "-c", ORPHANS, *arguments], pass_fds=(lifeline, theirs))
    os.close(theirs)
    with os.fdopen(answer) as said:
        orphans = [psutil.Process(int(pid)) for pid in said.read().split()]
    assert len(orphans) == 2
    os.close(ours)  # as the end of the run does
    assert keeper.wait(timeout=60) == 0
    os.close(lifeline)
    left = [orphan for orphan in orphans if orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE]
    for orphan in left:
        orphan.kill()
    assert not left
