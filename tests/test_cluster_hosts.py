"""A run over three hosts in network namespaces, each with its own address, of which two are cut off.

Not covered: slow or lossy networks, a head that is cut off, hosts without shared folders. `make soak` writes what it
saw into docs/clusters_tested.md.
"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ray_hosts import Hosts, longest_pause, refused
from ray_nodes import Run, ledger, policy, seen, short_folder, workplace

CUT_S = 60.0
ENGINES = '{"engine": 1, "trainer": 1}'
CLUSTER = {
    "threads_per_role": 1,
    "placement_timeout_s": 900,
    "trainer": {"cpus": 0.1, "resources": {"trainer": 1}},
    "rollout": {"replicas": 2, "min_replicas": 1, "cpus": 0.1, "resources": {"engine": 1}},
    **{role: {"cpus": 0.1} for role in ("reference", "reward", "buffer")},
}


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    why_not = refused()
    if why_not is not None:
        pytest.skip(why_not)
    three = Hosts(3, short_folder("rlhf-hosts"))
    yield three
    three.end()


class Clock:
    """When each step was done (monotonic seconds), as seen from outside."""

    def __init__(self, run: Run) -> None:
        self.moments: list[float] = []
        self._run, self._over = run, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            done = len(self._run.rows())
            self.moments += [time.monotonic()] * (done - len(self.moments))

    def new_steps(self, count: int, deadline_s: float) -> None:
        """Until so many steps are done that were not done before: replayed ones do not count."""
        goal = len(self.moments) + count
        self._run.until(lambda: len(self.moments) >= goal, deadline_s)

    def stop(self) -> None:
        self._over.set()
        self._thread.join(timeout=60)


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_one_host_is_cut_off_for_a_minute_and_one_for_good(hosts: Hosts, tmp_path: Path) -> None:
    """The head has the driver, the buffer and judges; each other host an engine, and one of them the trainer. First the
    host without the trainer is cut off for a minute: the run goes on with the other engine and takes it back. Then the
    one with the trainer, for good: the trainer is built again on the host that is left. Nothing is lost."""
    hosts.start_ray(0, 2, "{}")
    hosts.wait_for_head()
    for host in (1, 2):
        hosts.start_ray(host, 1, ENGINES)
    settings = ["loop.num_steps=20000", "loop.checkpoint_every=10", "loop.heartbeat_timeout_s=20"]
    folder = workplace(tmp_path)
    run = Run(folder, {"address": hosts.head, **CLUSTER}, "hosts", *settings, before=hosts.inside(0))
    clock = Clock(run)
    try:
        run.until(lambda: any(row["sync/engines"] == 2 for row in run.rows()), 600)
        (trainer,) = hosts.of("ray::PolicyRank")
        other = 3 - trainer
        clock.new_steps(3, 600)

        cut = time.monotonic()
        hosts.cut_off(other)
        while time.monotonic() < cut + CUT_S:
            run.until(lambda: True)
            time.sleep(1)
        hosts.join_again(other)
        clock.new_steps(1, 600)
        run.until(lambda: run.rows()[-1]["sync/engines"] == 2, 600)
        for_a_minute = longest_pause(clock.moments, cut)

        clock.new_steps(3, 600)
        cut = time.monotonic()
        hosts.cut_off(trainer)
        run.until(lambda: any(row["faults/trainer_restarts"] or row["faults/restarts"] for row in run.rows()), 900)
        clock.new_steps(3, 600)
        for_good = longest_pause(clock.moments, cut)
        assert other in hosts.of("ray::PolicyRank")
        last = run.rows()[-1]
        run.process.terminate()
        run.wait(130)
    finally:
        clock.stop()
        run.end()
    counts = ledger(run.run_dir)
    assert counts["trained"] == len({row["step"] for row in run.rows()}) * 4
    seen(
        "hosts",
        f"- An engine's host cut off for {CUT_S:.0f} s: {for_a_minute:.0f} s without a step at most.\n"
        f"- The trainer's and an engine's host cut off for good: {for_good:.0f} s without a step; trainer rebuilt "
        f"{last['faults/trainer_restarts']:g} times, the whole team {last['faults/restarts']:g} times.\n"
        f"- {len(run.rows())} steps, {counts['trained']} prompts trained once each, lost {counts['lost']}.",
    )


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_two_ranks_meet_across_hosts_and_end_as_two_ranks_on_one(hosts: Hosts, tmp_path: Path) -> None:
    """`trainer.placement: spread` puts a rank on each of two hosts; bitwise the parameters of two ranks on this
    machine."""
    hosts.start_ray(0, 2, "{}")
    hosts.wait_for_head()
    for host in (1, 2):
        hosts.start_ray(host, 1, ENGINES)
    folder, settings = workplace(tmp_path), ["learner.engine=deepspeed", "learner.zero_stage=2"]
    ranks = {"replicas": 2, "cpus": 0.1, "resources": {"trainer": 1}, "placement": "spread"}
    spread = {"address": hosts.head, **CLUSTER, "trainer": ranks}
    run = Run(folder, spread, "apart", *settings, "loop.num_steps=3", before=hosts.inside(0))
    try:
        run.until(lambda: hosts.of("ray::PolicyRank") == [1, 2], 600)
        run.wait(0, 600)
    finally:
        run.end()
    local = {"threads_per_role": 1, "trainer": {"replicas": 2}}
    together = Run(folder, local, "together", *settings, "loop.num_steps=3")
    try:
        together.wait(0, 600)
    finally:
        together.end()
    apart, beside = policy(run.run_dir, 3), policy(together.run_dir, 3)
    assert apart.keys() == beside.keys() and all(torch.equal(apart[name], beside[name]) for name in apart)
    assert ledger(run.run_dir)["trained"] == 12
