"""The loop and the source over a real ledger, with stand-ins for models. Not covered here: Ray, real engines."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from rlhf.admission import Demand, admissible
from rlhf.buffer.store import ExperienceBuffer
from rlhf.config import LoopConfig
from rlhf.errors import DeadlinePassed, JudgeFailed, WorkerLost
from rlhf.experience import REWARD, Columns, Group, Prompt, Sampling
from rlhf.interfaces import Published, Replacements, Request, Result, Task
from rlhf.loop import Team, train
from rlhf.metrics import Metrics
from rlhf.metrics import values as values_of
from rlhf.sources import JudgeDesk, PolicySource
from rlhf.testing import CountingLearner, LengthJudge, MadeUpGenerator
from rlhf.weights import Receipt
from rlhf.workers import LocalWorkers, MidTaskWorkers, answers, judgement

SAMPLING = Sampling(1.0, 1.0, 0, 6)


class Supply:
    def prompt(self, prompt_id: int) -> Prompt:
        return Prompt(prompt_id, prompt_id, 0, "p", "p", np.array([1, 2], dtype=np.int32), {})


class Silent:
    """Records which steps were told."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.measured: list[Metrics] = []

    def step_done(self, step: int, measured: Metrics) -> None:
        self.steps.append(step)
        self.measured.append(measured)

    def step_at(self, step: int, phase: str) -> None:
        pass

    def evaluate_if_due(self, updates: int) -> None:
        pass

    def checkpoint_if_due(self, updates: int) -> None:
        pass


def demand(*, steps: int, groups: int, staleness: int, timeout_s: float) -> Demand:
    return Demand(groups, steps, staleness, 2, SAMPLING, timeout_s)


class Bench:
    """A team on a ledger in a folder; built again on the same folder it is the run after a crash."""

    def __init__(self, folder: Path, wanted: Demand, judge: object, wrap: Callable[[LocalWorkers], object]) -> None:
        self.buffer = ExperienceBuffer(folder / "experience.db", frozenset({REWARD}), None, 3)
        self.buffer.open()
        self.generator, self.learner = MadeUpGenerator(7), CountingLearner()
        rollouts = wrap(LocalWorkers("rollout-0", partial(answers, self.generator), self.generator.load))
        desk = JudgeDesk("reward", frozenset({REWARD}), True, LocalWorkers("reward", partial(judgement, judge), None))
        self.source = PolicySource(wanted, Supply(), self.buffer, rollouts, [desk], lambda: False)
        self.team = Team(self.source, self.learner, self.buffer)
        self.loop = LoopConfig(
            num_steps=wanted.num_steps, groups_per_step=wanted.groups_per_step, max_staleness=wanted.max_staleness
        )

    def train(self) -> None:
        train(self.team, self.loop, Silent(), lambda: False)


def plain(workers: LocalWorkers) -> LocalWorkers:
    return workers


class Around:
    """Workers with another `collect`."""

    def __init__(self, inner: LocalWorkers) -> None:
        self._inner = inner
        self.held: list[Result] = []
        self.version = 0

    def submit(self, task: Task, worker: str | None) -> None:
        self._inner.submit(task, worker)

    def free(self) -> list[str]:
        return ["rollout-0"]

    def size(self) -> int:
        return 1

    def replaced(self) -> Replacements:
        return Replacements(0, 0, 0)

    def holding(self) -> list[str]:
        return self._inner.holding()

    def load(self, published: Published) -> list[Receipt]:
        self.version = published.version
        return self._inner.load(published)

    def fetch(self, handle: Group) -> Group:
        return handle


class Eager(Around):
    """An engine that answers at once, under the weights that it has when it is asked."""

    def submit(self, task: Task, worker: str | None) -> None:
        self._inner.submit(task, worker)
        while results := self._inner.collect(0):
            self.held += results

    def collect(self, timeout_s: float) -> list[Result]:
        results, self.held = self.held, []
        return results


class Straggler(Eager):
    """Holds the answer to prompt 1 back until version 4."""

    def collect(self, timeout_s: float) -> list[Result]:
        late = [result for result in self.held if result.prompt_ids == (1,) and self.version < 4]
        results = [result for result in self.held if result not in late]
        self.held = late
        return results


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
def test_every_prompt_is_trained_once_and_never_older_than_allowed(tmp_path: Path, staleness: int) -> None:
    """The engine works as far ahead as it may, so the bound is also reached."""
    bench = Bench(tmp_path, demand(steps=6, groups=3, staleness=staleness, timeout_s=5), LengthJudge(), Eager)
    bench.train()
    trained = [prompt for step in bench.learner.trained for prompt in step]
    assert sorted(trained) == list(range(18)) and max(bench.learner.ages) == staleness
    counts = bench.buffer.counts()
    assert (counts.issued, counts.trained, counts.lost, counts.duplicated) == (18, 18, 0, 0)


def test_an_answer_that_comes_too_late_is_swept_out_and_its_prompt_answered_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, demand(steps=8, groups=3, staleness=1, timeout_s=5), LengthJudge(), Straggler)
    bench.train()
    trained = [prompt for step in bench.learner.trained for prompt in step]
    assert bench.generator.answered.count(1) == 2 and trained.count(1) == 1
    assert max(bench.learner.ages) <= 1 and bench.buffer.counts().lost == 0


def test_the_late_answer_of_an_engine_that_was_given_up_is_refused_and_counted(tmp_path: Path) -> None:
    """The engine is given up with prompts 0 to 2, they are leased again, and its answers come after all: some before
    the new ones are stored, some after. Each prompt is trained once, from the new lease."""

    class GivenUp(Eager):
        """Reports its first task as lost; hands the answers over at the second and third look after that."""

        late: list[Result] | None = None

        def collect(self, timeout_s: float) -> list[Result]:
            results, self.held = self.held, []
            if self.late is None and results:
                self.late = results
                ids = tuple(result.prompt_ids[0] for result in results)
                lost = WorkerLost("rollout-0 died", counted=True)
                return [Result(results[0].task, ids, None, lost, "rollout-0", 0.0)]
            if self.late:
                return [self.late.pop(), *results]
            return results

    bench = Bench(tmp_path, demand(steps=4, groups=3, staleness=0, timeout_s=5), LengthJudge(), GivenUp)
    told = Silent()
    train(bench.team, bench.loop, told, lambda: False)
    assert bench.learner.trained == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert sorted(bench.generator.answered) == [0, 0, 1, 1, 2, 2, *range(3, 12)]
    assert sum(values_of(measured)["faults/late_answers"] for measured in told.measured) == 3
    assert bench.buffer.counts().duplicated == 0


def test_synchronous_steps_hold_the_prompts_in_order_whatever_the_order_of_arrival(tmp_path: Path) -> None:
    class Backwards(Eager):
        """Hands results over last first."""

        def collect(self, timeout_s: float) -> list[Result]:
            return [self.held.pop()] if self.held else []

    bench = Bench(tmp_path, demand(steps=3, groups=4, staleness=0, timeout_s=5), LengthJudge(), Backwards)
    bench.train()
    assert bench.learner.trained == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_judge_that_fails_stops_the_run_and_its_group_is_not_generated_again(tmp_path: Path) -> None:
    class FailsOnThree(LengthJudge):
        def judge(self, group: Group) -> Columns:
            if group.prompt.id == 3:
                raise JudgeFailed("KeyError on sample 1 of prompt 3")
            return super().judge(group)

    wanted = demand(steps=2, groups=4, staleness=0, timeout_s=5)
    broken = Bench(tmp_path, wanted, FailsOnThree(), plain)
    with pytest.raises(JudgeFailed, match="prompt 3"):
        broken.train()
    assert broken.generator.answered == [0, 1, 2, 3]
    broken.buffer.close()

    mended = Bench(tmp_path, wanted, LengthJudge(), plain)
    assert mended.source.resume() == 1
    mended.train()
    assert mended.generator.answered == [4, 5, 6, 7]
    assert mended.learner.trained == [[0, 1, 2, 3], [4, 5, 6, 7]] and mended.buffer.counts().lost == 0


def test_steps_after_the_last_checkpoint_are_replayed_without_generating(tmp_path: Path) -> None:
    first = Bench(tmp_path, demand(steps=4, groups=2, staleness=0, timeout_s=5), LengthJudge(), plain)
    first.train()
    first.buffer.close()
    again = Bench(tmp_path, demand(steps=5, groups=2, staleness=0, timeout_s=5), LengthJudge(), plain)
    again.buffer.rewind(0)
    again.train()
    assert again.learner.trained == [*first.learner.trained, [8, 9]] and again.generator.answered == [8, 9]
    assert again.buffer.counts().duplicated == 0


def test_a_wait_without_progress_ends_with_the_name_of_who_is_late(tmp_path: Path) -> None:
    class Hung(Around):
        def collect(self, timeout_s: float) -> list[Result]:
            return []

    bench = Bench(tmp_path, demand(steps=1, groups=2, staleness=0, timeout_s=0.2), LengthJudge(), Hung)
    with pytest.raises(DeadlinePassed, match="2 of 2 groups of step 0 at version 0: rollout-0 holds prompts 0, 1 at v"):
        bench.train()


def test_evaluation_answers_are_judged_and_leave_the_ledger_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path, demand(steps=1, groups=2, staleness=0, timeout_s=5), LengthJudge(), plain)
    before = bench.buffer.counts()
    prompts = [Supply().prompt(1000 + number) for number in range(3)]
    groups = bench.source.answer(prompts, SAMPLING)
    assert [group.prompt.id for group in groups] == [1000, 1001, 1002]
    assert all(group.samples[0].scores[REWARD] == len(group.samples[0].token_ids) for group in groups)
    assert bench.buffer.counts() == before


def admission_cases() -> Iterator[tuple[tuple[int, int, int, int, int], int]]:
    """(max_staleness, version, groups a step, accepted, in flight) and the capacity: worked out by hand from the
    formula."""
    yield (0, 0, 8, 0, 0), 8
    yield (0, 0, 8, 0, 8), 0
    yield (2, 0, 8, 0, 0), 24
    yield (2, 5, 8, 48, 8), 8
    yield (1, 3, 4, 12, 5), 3
    yield (1, 50, 8, 400, 0), 16


@pytest.mark.parametrize(("case", "capacity"), list(admission_cases()))
def test_admission_golden_numbers(case: tuple[int, int, int, int, int], capacity: int) -> None:
    staleness, version, groups, accepted, in_flight = case
    wanted = demand(steps=1000, groups=groups, staleness=staleness, timeout_s=1)
    assert admissible(wanted, version, accepted, in_flight) == capacity


def test_admission_ends_with_the_run() -> None:
    wanted = demand(steps=10, groups=8, staleness=4, timeout_s=1)
    assert admissible(wanted, 9, 72, 0) == 8


@pytest.mark.parametrize(("kind", "versions"), [(LocalWorkers, [0, 0, 0, 0]), (MidTaskWorkers, [0, 1, 1, 1])])
def test_in_one_process_weights_come_after_a_task_or_in_the_middle_of_it(
    kind: type[LocalWorkers], versions: list[int]
) -> None:
    """One group is out when version 1 comes; the other three are of the version that the run file asks for."""
    generator, learner = MadeUpGenerator(7), CountingLearner()
    workers = kind("rollout-0", partial(answers, generator), generator.load)
    workers.load(learner.publish())
    prompts = tuple(Supply().prompt(number) for number in range(4))
    workers.submit(Task(0, (0, 1, 2, 3), Request(prompts, SAMPLING, 1, "sample")), "rollout-0")
    came = workers.collect(0.0)
    learner.update([])
    workers.load(learner.publish())
    while len(came) < 4:
        came += workers.collect(0.0)
    assert [result.value.policy_version for result in came] == versions
    assert [result.prompt_ids for result in came] == [(0,), (1,), (2,), (3,)] and workers.free()
