"""Ray that a run started, its end, and waits on real actors. A killed driver: tests/test_recovery.py."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import psutil
import pytest
from ray.actor import ActorHandle

from rlhf.cluster import Cluster
from rlhf.errors import ActorDied, DeadlinePassed, TrainerDied
from rlhf.metrics import Metric, last

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
    ray.get([fast.pid.remote(), slow.pid.remote()], timeout=120)  # both are up
    named = {"rank 0": fast.work.remote(0.0), "rank 1": slow.work.remote(600)}
    ray.wait([named["rank 0"]], timeout=60)
    with pytest.raises(DeadlinePassed, match=r"updating \(rank 1\): 1 of 2 answers missing after 2 s"):
        waiting.gather(named, "updating", 2.0, 0.0, None)
    assert waiting.current() is None
    again = {"a": fast.work.remote(0.5), "b": fast.work.remote(0.0)}
    assert waiting.gather(again, "both", 60.0, 0.0, None) == ["0.5", "0"]
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
        waiting.gather(named, "updating", 60.0, 30.0, None)
    assert died.value.actor_id == dying._actor_id.hex()
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        waiting.gather({"rank 0": alive.fail_as_one_whose_peer_is_gone.remote()}, "updating", 60.0, 30.0, None)
    ray.kill(alive)


class Stand:
    """A trainer rank or a buffer, as far as the driver's side of them sees; the first life of one stops itself."""

    def __init__(self, stops: bool) -> None:
        self._stops = stops

    def meeting_point(self) -> str:
        return "nowhere"

    def setup(self, meeting_point: str) -> None:
        pass

    def reopen(self) -> None:
        pass

    def update(self, batch: int) -> tuple[int, dict[str, Metric]]:
        return batch, {"pid": last(self.stop_or_answer())}

    def in_flight(self) -> int:
        return self.stop_or_answer()

    def stop_or_answer(self) -> int:
        if self._stops:
            os.kill(os.getpid(), signal.SIGSTOP)
        return os.getpid()


@pytest.mark.ray
@pytest.mark.slow
def test_a_stopped_rank_or_buffer_is_named_ended_and_replaced_long_before_the_deadline(on_ray: None) -> None:
    """The deadline is ten minutes, the limit for a sign of life some seconds; a call that takes twice as long is left
    alone."""
    import ray

    from actors import waiting
    from actors.buffer import RemoteBuffer
    from actors.heartbeat import Pulses
    from actors.learner import RemoteLearner
    from actors.notices import Notices
    from actors.ranks import RankGroup

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    stand, limit_s = ray.remote(Stand).options(num_cpus=0), 6.0
    ended: list[ActorHandle] = []

    def end(actors: Sequence[ActorHandle]) -> None:
        ended.extend(actors)
        for actor in actors:
            ray.kill(actor)

    lives: list[list[ActorHandle]] = []

    def hire() -> list[ActorHandle]:
        lives.append([stand.remote(not lives and rank == 1) for rank in range(2)])
        return lives[-1]

    group = RankGroup("policy", hire(), hire, end)
    learner = RemoteLearner(group, None, Notices({}, print), [], 600.0, limit_s, annotates=False)
    learner.set_up()
    with pytest.raises(TrainerDied, match="update 1: policy rank 1 has shown no sign of life for"):
        learner.update(1)
    learner.load(None)
    assert learner.update(1) is not None and learner.version == 1 and ended == lives[0]

    told: list[ActorDied] = []
    stops = iter([True, False])
    buffer = RemoteBuffer(lambda: stand.remote(next(stops)), lambda actor: end([actor]), told.append, 600.0, limit_s)
    assert buffer.in_flight() != os.getpid()
    assert len(told) == 1 and len(ended) == 3 and "the buffer actor has shown no sign of life" in str(told[0])

    slow, pulses = ray.remote(Rank).options(num_cpus=0).remote(), Pulses(limit_s)
    pulses.follow(slow, "rank 0")
    assert waiting.gather({"rank 0": slow.work.remote(2 * limit_s)}, "updating", 60.0, 0.0, pulses) == ["12"]
    end([slow, *lives[1]])


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
