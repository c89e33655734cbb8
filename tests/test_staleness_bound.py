"""The bound on staleness under random delays, and admission under filtering: the real loop, source and ledger over
engines that answer late and in any order. Not covered: real engines (test_staleness_ray), judges that are late."""

import functools
import itertools
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.admission import Demand
from rlhf.buffer.store import ExperienceBuffer
from rlhf.config import LoopConfig
from rlhf.errors import DeadlinePassed
from rlhf.experience import REWARD, Columns, Prompt, Sampling
from rlhf.interfaces import Published, Replacements, Result, Task
from rlhf.loop import Team, train
from rlhf.metrics import Metrics
from rlhf.simulation.memory import MemoryBuffer
from rlhf.sources import JudgeDesk, PolicySource
from rlhf.testing import CountingLearner, LengthJudge, MadeUpGenerator
from rlhf.weights import Receipt
from rlhf.workers import LocalWorkers, judgement

STEPS = 7
JUDGED = frozenset({REWARD})
RARE, RARE_TICKS, TICKS = 0.05, 200, 12  # one answer in twenty takes as long as many steps


class LateEngines:
    """Engines that answer each prompt after a random number of ticks, in any order, and never wait for anybody.

    An answer is of the version that its engine had when it was asked, however many versions ago that was. A tick is a
    call of `collect`; where nothing is due the next answer is.
    """

    def __init__(self, engines: int, seed: int) -> None:
        self._engines, self._random = engines, random.Random(seed)
        self._generator = MadeUpGenerator(seed)
        self._now = 0
        self._held: list[tuple[int, Result]] = []

    def submit(self, task: Task, worker: str | None) -> None:
        request = task.payload
        for group in self._generator.generate(request.prompts, request.sampling, request.samples_per_prompt, "sample"):
            ticks = RARE_TICKS if self._random.random() < RARE else self._random.randrange(TICKS)
            result = Result(task.number, (group.prompt.id,), group, None, "late", 0.0)
            self._held.append((self._now + ticks, result))

    def collect(self, timeout_s: float) -> list[Result]:
        if not self._held:
            return []
        self._now = max(self._now + 1, min(due for due, _ in self._held))
        arrived = [result for due, result in self._held if due <= self._now]
        self._held = [(due, result) for due, result in self._held if due > self._now]
        self._random.shuffle(arrived)
        return arrived

    def free(self) -> list[str]:
        return [f"late-{number}" for number in range(self._random.randint(1, self._engines))]

    def size(self) -> int:
        return self._engines

    def replaced(self) -> Replacements:
        return Replacements(0, 0, 0)

    def holding(self) -> list[str]:
        return [f"{len(self._held)} answers are late"] if self._held else []

    def load(self, published: Published) -> list[Receipt]:
        return [self._generator.load(published.weights)]

    def fetch(self, handle: object) -> object:
        return handle


class Filtered(ExperienceBuffer):
    """Drops some groups as soon as they are judged, as a filter of prompts that teach nothing does."""

    def filter_with(self, share: float, seed: int) -> None:
        self._share, self._random = share, random.Random(seed)

    def add_columns(self, prompt_id: int, columns: Columns) -> bool:
        stored = super().add_columns(prompt_id, columns)
        if self._random.random() < self._share:
            self.drop(prompt_id, "filtered")
        return stored


class Watch:
    """After every step: no more work in flight than allowed, and the ledger adds up."""

    def __init__(self, buffer: ExperienceBuffer, limit: int) -> None:
        self._buffer, self._limit = buffer, limit

    def step_at(self, step: int, phase: str) -> None:
        pass

    def step_done(self, step: int, measured: Metrics) -> None:
        assert self._buffer.in_flight() <= self._limit
        counts = self._buffer.counts()
        places = counts.pending + counts.leased + counts.complete + counts.trained + counts.dropped
        assert (places, counts.lost, counts.duplicated) == (counts.issued, 0, 0)

    def evaluate_if_due(self, updates: int) -> None:
        pass

    def checkpoint_if_due(self, updates: int) -> None:
        pass


class Supply:
    def prompt(self, prompt_id: int) -> Prompt:
        return Prompt(prompt_id, prompt_id, 0, "p", "p", np.array([1, 2], dtype=np.int32), {})


def run(kind: type[Filtered], staleness: int, groups: int, engines: int, dropped: float, seed: int) -> CountingLearner:
    """A whole run on a ledger of this kind; what its learner saw."""
    wanted = Demand(groups, STEPS, staleness, 1, Sampling(1.0, 1.0, 0, 3), 2.0)
    with tempfile.TemporaryDirectory() as folder:
        buffer = kind(Path(folder) / "experience.db", JUDGED, None, 3)
        buffer.open()
        buffer.filter_with(dropped, seed)
        desk = JudgeDesk(REWARD, JUDGED, True, LocalWorkers("reward", partial_judge(), None))
        source = PolicySource(wanted, Supply(), buffer, LateEngines(engines, seed), [desk], lambda: False)
        learner = CountingLearner()
        loop = LoopConfig(num_steps=STEPS, groups_per_step=groups, max_staleness=staleness)
        try:
            train(Team(source, learner, buffer), loop, Watch(buffer, (staleness + 1) * groups), lambda: False)
        finally:
            buffer.close()
    return learner


def partial_judge():
    judge = LengthJudge()
    return lambda group: judgement(judge, group)


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    groups=st.integers(1, 5),
    engines=st.integers(1, 4),
    dropped=st.sampled_from([0.0, 0.1, 0.6]),
    seed=st.integers(0, 2**32 - 1),
)
def test_bound_holds_and_filtering_never_starves(staleness, groups, engines, dropped, seed):
    """However late answers come and however many are filtered: every step is trained, whole, none of it too old, and
    no prompt twice."""
    learner = run(Filtered, staleness, groups, engines, dropped, seed)
    trained = [prompt for step in learner.trained for prompt in step]
    assert [len(step) for step in learner.trained] == [groups] * STEPS
    assert len(set(trained)) == len(trained)
    assert max(learner.ages) <= staleness


def test_without_the_sweep_the_bound_is_broken():
    """Control: admission alone bounds the work in flight, not the age of an answer (trap 57)."""

    class Unswept(Filtered):
        def ready(self, oldest_version: int) -> int:
            return super().ready(-1)

    ages = [max(run(Unswept, 1, 4, 2, 0.0, seed).ages) for seed in range(4)]
    assert max(ages) > 1
    assert max(max(run(Filtered, 1, 4, 2, 0.0, seed).ages) for seed in range(4)) == 1


def test_counting_filtered_groups_as_in_flight_starves_the_run():
    """Control (trap 58): capacity shrinks by each drop until nothing may start, and the run stops for good."""

    class Counting(Filtered):
        def in_flight(self) -> int:
            return super().in_flight() + self.counts().dropped

    with pytest.raises(DeadlinePassed, match="no worker holds any of them"):
        run(Counting, 1, 4, 2, 0.6, 0)


@pytest.mark.parametrize("seed", range(3))
def test_the_buffer_of_simulations_makes_the_moves_of_the_real_one(tmp_path, rollout, seed):
    """Three hundred random calls to both: the same leases, answers, numbers and steps."""
    draw = random.Random(seed)
    real, memory = ExperienceBuffer(tmp_path / "experience.db", JUDGED, None, 10_000), MemoryBuffer(JUDGED)
    real.open()
    issued, taken, tickets = 0, [], ({}, {})
    answer = functools.cache(lambda prompt_id, version: rollout(prompt_id, version, 1, 2, {}))
    for request in range(300):
        prompt_id, version = draw.randrange(issued + 1), len(taken)
        move = draw.choice(["lease", "group", "group", "judge", "judge", "judge", "drop", "step", "step", "release"])
        if move == "lease":
            leases = [buffer.lease(2, "test", request) for buffer in (real, memory)]
            held = [{lease.prompt_id: lease.ticket for lease in own} for own in leases]
            assert list(held[0]) == list(held[1])
            for own, before in zip(held, tickets, strict=True):
                before.update(own)
            issued = max(issued, *(number + 1 for number in held[0]))
        elif move == "step":
            ready = real.ready(version - 1)
            assert memory.ready(version - 1) == ready
            if ready >= 2:
                groups = real.take(version, 2)
                taken.append([group.prompt.id for group in groups])
                assert [group.prompt.id for group in memory.take(version, 2)] == taken[-1]
                for buffer in (real, memory):
                    buffer.commit(version, groups, version + 1, "fingerprint", {})
        elif prompt_id < issued:
            move_both(move, (real, memory), tickets, answer(prompt_id, version), frozenset(itertools.chain(*taken)))
        assert (real.in_flight(), real.counts()) == (memory.in_flight(), memory.counts())
    assert len(taken) >= 5
    real.close()


def move_both(move, buffers, tickets, group, taken):
    """One move of one prompt in both buffers, with the same answer; each has tickets of its own."""
    prompt_id, answers = group.prompt.id, []
    for buffer, own in zip(buffers, tickets, strict=True):
        if move == "group":
            answers.append(buffer.add_group(prompt_id, own[prompt_id], group))
        elif move == "judge":
            answers.append(buffer.add_columns(prompt_id, Columns(prompt_id, {REWARD: [1.0]}, {})))
        elif move == "release":
            answers.append(buffer.release(prompt_id, own[prompt_id], "test", counted=False))
        elif prompt_id not in taken and prompt_id % 7 == 0:
            answers.append(buffer.drop(prompt_id, "test"))
    assert len(set(answers)) <= 1
