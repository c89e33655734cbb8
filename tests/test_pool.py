"""Pools of actors that die, hang, join and leave, on real Ray, with made-up engines that misbehave on order.

Not covered here: real engines and the command line (test_run_replacement.py), nodes that are other machines.
"""

import math
import os
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from rlhf.admission import Demand
from rlhf.algorithms.table import build
from rlhf.buffer.audit import ExperienceView, verify
from rlhf.buffer.store import ExperienceBuffer
from rlhf.cluster import Role
from rlhf.config import LoopConfig, RunConfig
from rlhf.errors import NoCapacity, RunFailed
from rlhf.experience import REWARD, Columns, Group, Prompt, Sample, Sampling
from rlhf.interfaces import Published, Replacements, Request, Result, Task
from rlhf.learner.learner import PolicyLearner
from rlhf.loop import Team, train
from rlhf.metrics import Metrics
from rlhf.metrics import values as values_of
from rlhf.sources import JudgeDesk, PolicySource
from rlhf.testing import CountingLearner, LengthJudge, MadeUpGenerator
from rlhf.weights import Receipt, Weights

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SAMPLING = Sampling(1.0, 1.0, 0, 6)
SILENCE_S = 5.0
LIFELESS_S = 8.0
MARK_EVERY_S = 0.5
# By prompt: what happens, and at how many of the first attempts; -1: to the first that loads which version; -2: to how
# many of the first that are set up; -3: every load of this version takes long.
Faults = Mapping[int, tuple[str, int]]


def attempts(folder: Path, what: str) -> int:
    """How often this was called before, over all processes."""
    mine = folder / f"{what}-{os.getpid()}-{time.monotonic_ns()}"
    before = len(list(folder.glob(f"{what}-*")))
    mine.touch()
    return before


class Engine:
    """A rollout actor's class around made-up samples; each answer leaves a file."""

    def __init__(self, folder: Path, faults: Faults) -> None:
        self._folder, self._faults = folder, faults
        self._generator = MadeUpGenerator(7)

    def where(self) -> object:
        from actors.worker import place_of_this_actor

        return place_of_this_actor()

    def setup(self) -> None:
        what, times = self._faults.get(-2, ("", 0))
        if attempts(self._folder, "setup") < times:
            os._exit(1) if what == "exit" else os.kill(os.getpid(), signal.SIGSTOP)

    def load(self, weights: Weights) -> Receipt:
        what, version = self._faults.get(-1, ("", 0))
        if what and weights.version == version and not attempts(self._folder, "load"):
            os._exit(1) if what == "exit" else os.kill(os.getpid(), signal.SIGSTOP)
        if weights.version == self._faults.get(-3, ("", -1))[1]:
            attempts(self._folder, f"slow-load-{os.getpid()}")
            time.sleep(2 * LIFELESS_S)
        return self._generator.load(weights)

    def work(self, request: Request) -> Iterator[object]:
        yield None
        yield None
        for prompt in request.prompts:
            for _ in self._misbehave(prompt.id):
                yield None
                yield None
            (group,) = self._generator.generate([prompt], request.sampling, request.samples_per_prompt, request.purpose)
            attempts(self._folder, f"answered-{prompt.id}")
            yield group
            yield prompt.id, 0.0

    def _misbehave(self, prompt_id: int) -> Iterator[None]:
        what, times = self._faults.get(prompt_id, ("", 0))
        if not times or attempts(self._folder, f"fault-{prompt_id}") >= times:
            return
        if what == "long":
            for _ in range(int(1.5 * SILENCE_S / MARK_EVERY_S)):
                time.sleep(MARK_EVERY_S)
                yield
            return
        if what == "hold":
            while not (self._folder / "go").exists():
                time.sleep(MARK_EVERY_S)
                yield
            return
        time.sleep(0.5)  # so that what it yielded before has left the process
        (self._folder / f"pid-{what}-{prompt_id}").write_text(str(os.getpid()))
        if what == "raise":
            raise KeyError("no such word")
        os.kill(os.getpid(), signal.SIGSTOP if what == "stop" else signal.SIGKILL)
        time.sleep(3600)

    def close(self) -> None:
        self._generator.close()


class DyingJudge(LengthJudge):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def judge(self, group: Group) -> Columns:
        if group.prompt.id == 3 and not attempts(self._folder, "judged-3"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().judge(group)


class Supply:
    def prompt(self, prompt_id: int) -> Prompt:
        return Prompt(prompt_id, prompt_id, 0, "p", "p", np.array([1, 2], dtype=np.int32), {})


class Steps:
    """The metrics of each step; `after` is told of each step."""

    def __init__(self, after: Callable[[int], None]) -> None:
        self.measured: list[Mapping[str, float]] = []
        self._after = after

    def step_at(self, step: int, phase: str) -> None:
        pass

    def step_done(self, step: int, measured: Metrics) -> None:
        self.measured.append(values_of(measured))
        self._after(step)

    def evaluate_if_due(self, updates: int) -> None:
        pass

    def checkpoint_if_due(self, updates: int) -> None:
        pass


class OpeningBuffer(ExperienceBuffer):
    """Opens the references that actors hand over, as Ray does on the way to the buffer actor."""

    def add_group(self, prompt_id: int, ticket: int, group: object) -> bool:
        import ray

        return super().add_group(prompt_id, ticket, ray.get(group, timeout=30))

    def add_columns(self, prompt_id: int, columns: object) -> bool:
        import ray

        return super().add_columns(prompt_id, ray.get(columns, timeout=30))


class Bench:
    """A source and a learner in this process, engines and judges as actors on the Ray that runs."""

    def __init__(
        self,
        folder: Path,
        engines: int,
        needed: int,
        faults: Faults,
        resources: Mapping[str, float],
        idle_release_s: float = math.inf,
        silence_s: float = SILENCE_S,
        lifeless_s: float = 600.0,
    ) -> None:
        import ray

        from actors.judge import JudgeActor
        from actors.pool import ActorWorkers
        from actors.worker import PoolSpec

        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self.folder, self.notes = folder, []
        self.meanwhile: Callable[[], None] = lambda: None  # called in this thread whenever the source waits
        self.buffer = OpeningBuffer(folder / "experience.db", frozenset({REWARD}), None, 3)
        self.buffer.open()
        self.learner = CountingLearner()
        engine_class = ray.remote(Engine).options(num_cpus=0, resources=dict(resources))

        judge_class = JudgeActor.options(num_cpus=0, resources={"node:__internal_head__": 0.001})

        def spec(role: str, size: int, needed: int, takes_weights: bool) -> PoolSpec:
            takes = Role(cpus=0, resources=dict(resources))
            limits = (silence_s, lifeless_s, 600.0, 60.0, 3, idle_release_s, False)
            return PoolSpec(role, size, needed, takes_weights, False, takes, *limits)

        self.rollouts = ActorWorkers(
            spec("rollout", engines, needed, True),
            lambda name: engine_class.remote(folder, faults),
            ray.kill,
            self.notes.append,
        )
        self.judges = ActorWorkers(
            spec("reward", 1, 1, False),
            lambda name: judge_class.remote(DyingJudge, (folder,)),
            ray.kill,
            self.notes.append,
        )

    def source(self, steps: int, groups: int) -> PolicySource:
        wanted = Demand(groups, steps, 0, 2, SAMPLING, 120.0)
        desk = JudgeDesk("reward", frozenset({REWARD}), True, self.judges)
        for pool in (self.rollouts, self.judges):
            pool.wait_until_up()
        return PolicySource(wanted, Supply(), self.buffer, self.rollouts, [desk], lambda: bool(self.meanwhile()))

    def train(self, source: PolicySource, steps: int, groups: int, after: Callable[[int], None]) -> Steps:
        told = Steps(after)
        loop = LoopConfig(num_steps=steps, groups_per_step=groups)
        train(Team(source, self.learner, self.buffer), loop, told, lambda: False)
        return told

    def wait_for_engines(self, count: int) -> None:
        """Within a minute."""
        deadline = time.monotonic() + 60
        while self.rollouts.size() != count:
            assert time.monotonic() < deadline, f"{self.rollouts.size()} engines, expected {count}: {self.notes}"
            time.sleep(0.1)

    def answers(self) -> Counter[int]:
        """How often each prompt was answered, over all processes."""
        return Counter(int(path.name.split("-")[1]) for path in self.folder.glob("answered-*"))

    def close(self) -> None:
        self.rollouts.close()
        self.judges.close()
        self.buffer.close()


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    built = []

    def build(engines: int, needed: int, faults: Faults, resources: Mapping[str, float], **limits: float) -> Bench:
        folder = tmp_path / f"{len(built)}"
        folder.mkdir()
        built.append(Bench(folder, engines, needed, faults, resources, **limits))
        return built[-1]

    yield build
    for each in built:
        each.close()


def test_workers_that_die_or_hang_are_replaced_alone_and_a_poisoned_prompt_is_set_aside(
    ray_here: None, bench: Callable[..., Bench]
) -> None:
    """Two engines and a judge. Prompt 4 kills its engine always, 14 once, 8 stops its process (SIGSTOP), 10 takes
    longer than the patience for silence but shows marks; one engine dies while it takes version 2, the judge at prompt
    3, and an engine at a held-out prompt. Nothing that was answered is generated again, and the steps hold the prompts
    that they hold without any of it, but for the poisoned one."""
    faults: Faults = {
        4: ("kill", 99),
        14: ("kill", 1),
        8: ("stop", 1),
        10: ("long", 1),
        1001: ("kill", 1),
        -1: ("exit", 2),
    }
    team = bench(2, 2, faults, {})
    source = team.source(steps=3, groups=6)
    told = team.train(source, 3, 6, lambda step: None)
    asked = [Supply().prompt(1000 + number) for number in range(4)]
    graded = source.answer(asked, SAMPLING)
    pid = int((team.folder / "pid-stop-8").read_text())
    gone_by = time.monotonic() + 30
    while psutil.pid_exists(pid) and time.monotonic() < gone_by:
        time.sleep(0.1)
        notes = "\n".join(team.notes)
    assert not psutil.pid_exists(pid), f"the stopped engine lives on\n{notes}"
    assert team.learner.trained == [[0, 1, 2, 3, 5, 6], list(range(7, 13)), list(range(13, 19))], notes
    once = [prompt for step in team.learner.trained for prompt in step] + [prompt.id for prompt in asked]
    assert team.answers() == Counter(once), notes
    assert [group.prompt.id for group in graded] == [1000, 1001, 1002, 1003]
    assert all(group.samples[0].scores[REWARD] for group in graded)
    overview = ExperienceView(team.folder / "experience.db").overview()
    ((reason, dropped),) = overview.drop_reasons.items()
    assert dropped == 1 and "died" in reason, reason
    assert (overview.counts.trained, overview.counts.lost, overview.counts.duplicated) == (18, 0, 0)
    sums = {name: sum(step[name] for step in told.measured) for name in told.measured[0] if name.startswith("faults/")}
    assert (sums["faults/workers_hung"], sums["faults/prompts_set_aside"], sums["faults/late_answers"]) == (1, 1, 0)
    assert sums["faults/workers_died"] == 3 + 1 + 1 + 1, notes  # prompt 4, prompt 14, the load, the judge
    assert verify(team.folder / "experience.db").ok


def test_an_error_of_the_users_own_ends_the_run_at_once_and_deaths_in_a_row_end_it_too(
    ray_here: None, bench: Callable[..., Bench]
) -> None:
    team = bench(1, 1, {1: ("raise", 1), -2: ("exit", 1)}, {})
    source = team.source(steps=1, groups=2)
    assert team.rollouts.replaced().died == 1, "it died once while it was set up"
    with pytest.raises(RunFailed, match=r"rollout-0\.1 failed at 'generate' on prompts 1: 'no such word'"):
        team.train(source, 1, 2, lambda step: None)
    deadly = bench(1, 1, {n: ("kill", 99) for n in range(9)}, {})
    source = deadly.source(steps=1, groups=2)
    with pytest.raises(RunFailed, match="rollout-0 was lost 4 times in a row without a result"):
        deadly.train(source, 1, 2, lambda step: None)


def test_engines_without_work_are_let_go_and_come_back_with_work(ray_here: None, bench: Callable[..., Bench]) -> None:
    """One of two is needed. When all steps are done the other one is let go; a question, whose answer waits for that,
    has it back. Nothing is generated twice, and nobody counts as lost."""
    team = bench(2, 1, {2000: ("hold", 1)}, {}, idle_release_s=2.0)
    source = team.source(steps=1, groups=6)
    team.train(source, 1, 6, lambda step: None)
    deadline = time.monotonic() + 120
    while not any("rollout-1 is let go after 2 s without work" in note for note in team.notes):
        assert time.monotonic() < deadline and not team.rollouts.collect(0.1), team.notes

    def look() -> None:
        if team.rollouts.size() == 2:
            (team.folder / "go").touch()

    team.meanwhile = look
    assert [group.prompt.id for group in source.answer([Supply().prompt(2000)], SAMPLING)] == [2000]
    assert "there is work again: rollout workers [1] are asked for" in team.notes
    assert team.answers() == Counter([*range(6), 2000]) and team.rollouts.replaced() == Replacements(0, 0, 0)


@pytest.mark.soak
def test_a_worker_that_is_stopped_at_no_work_is_found_and_a_slow_load_is_left_alone(
    ray_here: None, bench: Callable[..., Bench]
) -> None:
    """SIGSTOP to an engine while it is set up, while it loads version 0, while idle, and to an idle judge. All other
    limits are minutes, so only the missing sign of life can find them. Meanwhile engines take twice the limit to
    load version 1, and are left alone. Each stopped process is gone, and nobody else was replaced."""
    faults: Faults = {-1: ("stop", 0), -2: ("stop", 1), -3: ("slow", 1)}
    team = bench(2, 2, faults, {}, silence_s=600.0, lifeless_s=LIFELESS_S)
    stopped: list[int] = []

    def stop_idle() -> None:
        for pool in (team.rollouts, team.judges):
            place = pool._workers[0].place
            assert place is not None
            os.kill(place.pid, signal.SIGSTOP)
            stopped.append(place.pid)

    source = team.source(steps=2, groups=1)
    told = team.train(source, 2, 1, lambda step: stop_idle() if step == 1 else None)
    deadline = time.monotonic() + 120
    while team.rollouts.size() < 2 or team.judges.size() < 1 or any(map(psutil.pid_exists, stopped)):
        assert time.monotonic() < deadline, team.notes
        team.rollouts.collect(0.0), team.judges.collect(0.1)
    notes = "\n".join(team.notes)
    assert team.learner.trained == [[0], [1]]
    replaced = (team.rollouts.replaced(), team.judges.replaced())
    assert [(each.died, each.hung, each.left) for each in replaced] == [(0, 3, 0), (0, 1, 0)], notes
    assert all(f"was {phase} and showed no sign of life" in notes for phase in ("setting up", "loading", "ready"))
    assert len(list(team.folder.glob("slow-load-*"))) >= 2 and len(told.measured) == 2


def test_new_weights_reach_an_engine_in_the_middle_of_its_task(
    ray_here: None, tiny_run: Callable[..., RunConfig]
) -> None:
    """A real engine (transformers) at work on many long answers: the load does not wait for them, the answer under way
    has tokens of both versions in their order, those that were out before are of the old one, and none comes twice."""
    import ray

    from actors.pool import ActorWorkers, PoolSpec
    from actors.rollout import RolloutActor

    config = tiny_run({}, {}, {"max_staleness": 1}, {})
    assert config.generation is not None
    generation = config.generation.model_copy(update={"weights_mid_sequence": True, "max_new_tokens": 200})
    config = config.model_copy(update={"generation": generation})
    learner = PolicyLearner(config, build(config.algorithm), 0, 1, None)
    learner.setup()
    weights = learner.publish()
    assert weights is not None
    spec, notes = (
        PoolSpec("rollout", 1, 1, True, True, Role(cpus=0), 120.0, 120.0, 600.0, 60.0, 3, math.inf, False),
        list[str](),
    )
    pool = ActorWorkers(
        spec, lambda name: RolloutActor.options(num_cpus=0).remote(config, name, 1, False), ray.kill, notes.append
    )
    try:
        pool.wait_until_up()
        pool.load(Published(0, weights.fingerprint, weights.size_bytes, ray.put(weights)))
        ids = tuple(range(200))
        request = Request(tuple(map(Supply().prompt, ids)), Sampling(1.0, 1.0, 0, 200), 2, "sample")
        pool.submit(Task(0, ids, request), pool.free()[0])
        came: list[Result] = []
        while not came:
            came += [result for result in pool.collect(0.1) if result.prompt_ids]
        assert len(came) < len(ids) / 2, "the test is about a task that takes long"
        for version in (1, 2, 3):  # one may come right before the last token of a group, and mix nothing
            newer = replace(weights, version=version)
            (receipt,) = pool.load(Published(version, newer.fingerprint, newer.size_bytes, ray.put(newer)))
            assert receipt.version == version and len(pool.holding()) == 1, notes
        seen: list[list[int]] = []  # the versions of each sample, in the order of the groups
        while not any(len(set(versions)) > 1 for versions in seen):
            seen += [sample.versions.tolist() for one in came[len(seen) // 2 :] for sample in samples_of(pool, one)]
            came += [result for result in pool.collect(0.1) if result.prompt_ids]
            assert all(result.error is None for result in came) and len(came) < len(ids), came[-1]
        assert set(seen[0]) == {0} and all(versions == sorted(versions) for versions in seen)
        order = [prompt for result in came for prompt in result.prompt_ids]
        assert order == list(range(len(order)))
    finally:
        pool.close()
        for worker in pool._workers:
            ray.kill(worker.actor)


def samples_of(pool: Any, result: Result) -> tuple[Sample, ...]:
    group: Group = pool.fetch(result.value)
    return group.samples


class Nodes:
    """A Ray cluster of several nodes on this machine. An engine needs one with a `spot` resource."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        self._nodes: list[Any] = []
        self.address: str = self._cluster.address

    def add(self, count: int) -> None:
        self._nodes += [self._cluster.add_node(num_cpus=1, resources={"spot": 1}) for _ in range(count)]

    def remove_all(self) -> None:
        """Without notice, as when power fails."""
        while self._nodes:
            self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)

    def drain_first(self) -> None:
        """As `ray drain-node` does for a preemption notice."""
        import ray
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int(1000 * (time.time() + 600))
        gcs = ray._raylet.GcsClient(address=self.address)
        accepted, why = gcs.drain_node(self._nodes[0].node_id, reason, "notice", deadline_ms)
        assert accepted, why

    def shutdown(self) -> None:
        self._cluster.shutdown()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    import ray

    ray.shutdown()  # the cluster of the tests above, of this module's one process
    cluster = Nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.soak
def test_engines_join_and_leave_with_their_nodes_and_the_run_waits_when_there_are_none(
    nodes: Nodes, bench: Callable[..., Bench]
) -> None:
    """The run starts with one engine of four; nodes that are added take leases within a minute; one that is drained
    gets no new lease, finishes and is given up; with all nodes gone, in the middle of their work, the run waits and
    says so, and goes on when nodes come back. Every prompt is trained once, in the steps of the undisturbed run. With
    no node for too long the run ends and says what was asked for."""
    nodes.add(1)
    # 2000 is asked for last: an engine outlives its node for a moment, and is not to have the answer by then.
    team = bench(4, 1, {n: ("long", 1) for n in (26, 27, 28, 29)} | {2000: ("long", 9)}, {"spot": 1})
    source = team.source(steps=9, groups=4)
    seen: list[int] = []

    def take_all_away() -> None:
        if list(team.folder.glob("fault-26-*")):  # at work on prompt 26, which takes a while
            nodes.remove_all()
            team.meanwhile = bring_back

    def bring_back() -> None:
        if any("no rollout worker is up" in note for note in team.notes):
            nodes.add(4)
            team.meanwhile = lambda: None

    def after(step: int) -> None:
        seen.append(team.rollouts.size())
        if step == 0:
            nodes.add(3)
            team.wait_for_engines(4)
        elif step == 2:
            nodes.drain_first()
            team.wait_for_engines(3)
        elif step == 5:
            team.meanwhile = take_all_away

    told = team.train(source, 9, 4, after)
    notes = "\n".join(team.notes)
    assert team.learner.trained == [list(range(n, n + 4)) for n in range(0, 36, 4)], notes
    assert seen[:4] == [1, 4, 4, 3], seen
    assert "no rollout worker is up" in notes and "is drained" in notes, notes
    sums = {name: sum(step[name] for step in told.measured) for name in told.measured[0] if name.startswith("faults/")}
    # The drained one left. Of the three whose nodes vanish Ray may not know yet that it was their nodes.
    replaced = team.rollouts.replaced()
    assert replaced.left >= 1 and replaced.left + replaced.died == 4 and not replaced.hung, notes
    assert sums["faults/prompts_set_aside"] == 0
    overview = ExperienceView(team.folder / "experience.db").overview()
    assert (overview.counts.trained, overview.counts.lost, overview.counts.duplicated) == (36, 0, 0)
    assert not overview.attempts, "a node that leaves is no prompt's fault"
    with sqlite3.connect(team.folder / "experience.db") as connection:  # step 2, the first that began with four engines
        owners = {owner for (owner,) in connection.execute("SELECT owner FROM prompts WHERE id BETWEEN 8 AND 11")}
    assert len(owners) == 4, f"each of the four took a lease, the three that joined too: {owners}"
    nodes.remove_all()
    with pytest.raises(NoCapacity, match="asks for spot: 1"):
        source.answer([Supply().prompt(2000)], SAMPLING)
