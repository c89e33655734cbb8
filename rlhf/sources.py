"""Where a step's groups come from: prompts are leased, answered by rollout workers, judged, and stored on the way.

`PolicySource` is the only scheduler. It admits as much work as `max_staleness` allows, stores every group before
anything depends on it, sends it to each judge whose columns it lacks, and waits with a deadline. It never looks into
a group: it passes handles. On a restart it goes on with what the buffer holds: stored groups are judged, never
generated again. Workers may die, hang, join and leave: a lease ends with its worker and its prompts are leased again;
one that was there at three deaths is set aside."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from rlhf import metrics
from rlhf.admission import Demand, IdleClock, PromptSupply, admissible
from rlhf.chaos.points import is_dropped
from rlhf.errors import ActorDied, DeadlinePassed, HandleLost, JudgeFailed, NothingScored, RunFailed, WorkerLost
from rlhf.experience import Columns, Group, Prompt, Sampling
from rlhf.interfaces import Buffer, Handle, Lease, Published, Request, Result, Task, Workers
from rlhf.judges.failures import JudgeFailures
from rlhf.metrics import Metrics

POLL_S = 0.05
NAMED_IN_ERRORS = 8
MAX_ATTEMPTS = 3  # a prompt that was being worked on when so many workers died is set aside, with the reason


class Interrupted(Exception):
    """The run was asked to stop while it waited; nothing is lost."""


@dataclass(frozen=True, slots=True)
class JudgeDesk:
    """The workers that host one judge, and the columns that it fills.

    failures, what is done about groups that it cannot judge; None: its first error ends the run."""

    name: str
    columns: frozenset[str]
    scores_answers: bool  # evaluation wants its columns too
    workers: Workers
    failures: JudgeFailures | None = None


@dataclass(slots=True)
class _Errand:
    """A task that was handed out: who gets its results, who takes back what its worker was lost with, how many results
    are still to come, and who is told what a judge failed at."""

    deliver: Callable[[Result], None]
    lose: Callable[[Result], None]
    remaining: int
    phase: str
    fail: Callable[[int, JudgeFailed], None] | None = None


@dataclass(slots=True)
class _Exam:
    """An evaluation under way: answers and judgements by prompt id, and how many judgements are still to come."""

    sampling: Sampling
    groups: dict[int, Group] = field(default_factory=dict)
    outstanding: int = 0


class PolicySource:
    """Samples groups from the policy, has them judged, and hands out whole steps. Knows neither Ray nor the
    algorithm."""

    def __init__(
        self,
        demand: Demand,
        supply: PromptSupply,
        buffer: Buffer,
        rollouts: Workers,
        desks: Sequence[JudgeDesk],
        stop: Callable[[], bool],
    ) -> None:
        self._demand, self._supply, self._buffer = demand, supply, buffer
        self._rollouts, self._desks, self._stop = rollouts, desks, stop
        self._pause: Callable[[], bool] = stop
        self._numbers, self._lease_requests = itertools.count(), itertools.count()
        self._errands: dict[int, _Errand] = {}
        self._version = 0
        self._untaken_step = 0
        self._last_progress = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._idle = IdleClock()
        self._deaths: Counter[tuple[str, int]] = Counter()  # by phase and prompt, where no lease counts them
        self._late_answers = self._set_aside = 0
        self._told: dict[str, int] = {}

    @property
    def last_progress(self) -> float:
        """When a worker last finished something or showed that it advances: seconds of time.monotonic."""
        return self._last_progress

    def pause_when(self, condition: Callable[[], bool]) -> None:
        """From now on a wait ends with Interrupted at this condition too; the same call again goes on with it."""
        self._pause = condition

    def resume(self) -> int:
        """Sends the groups that were stored but not judged to the judges they lack; returns how many there were."""
        unjudged = self._buffer.unjudged()
        for prompt_id, missing in sorted(unjudged.items()):
            self._send_to_judges(prompt_id, self._buffer.group(prompt_id), missing)
        return len(unjudged)

    def sync(self, published: Published) -> Metrics:
        """Every rollout engine pulls and verifies the version; then the work that it allows is started."""
        started = time.monotonic()
        receipts = self._rollouts.load(published)
        for receipt in receipts:
            published.check(receipt)
        self._version = published.version
        measured = {
            "sync/bytes": metrics.last(published.size_bytes),
            "sync/engines": metrics.last(len(receipts)),
            "sync/seconds": metrics.last(time.monotonic() - started),
            "sync/probe_abs_max": metrics.largest(max((r.probe_abs_max for r in receipts), default=0.0)),
            "time/judge_s": metrics.last(self._seconds.pop("judge", 0.0)),
            "time/store_s": metrics.last(self._seconds.pop("store", 0.0)),
            "time/evaluate_s": metrics.last(self._seconds.pop("evaluate", 0.0)),
            **self._faults(),
        }
        looking_up_or_sampling = self._seconds.pop("generate", 0.0)
        if receipts:  # without an engine rows are looked up, and their number a second is no speed of anything
            measured["time/generate_s"] = metrics.last(looking_up_or_sampling)
            examining = self._seconds.pop("examine", 0.0)
            idle_s = self._idle.read(time.monotonic(), len(receipts), looking_up_or_sampling + examining)
            measured["time/engine_idle_s"] = metrics.last(idle_s)
        self._admit()
        return measured

    def take(self, step: int) -> Handle:
        """The step's groups; waits for them with a deadline, and keeps the pool busy with later ones.

        Raises DeadlinePassed when nothing arrives for `wait_timeout_s`, Interrupted when the run was asked to stop, and
        whatever a worker raised.
        """
        needed = self._demand.groups_per_step
        if not self._buffer.assigned(step):
            self._wait_for(needed, f"groups of step {step}")
        groups = self._buffer.take(step, needed)
        self._admit()
        return groups

    def fill(self, steps: int) -> int:
        """Waits until the groups of the next `steps` steps are there, or of those that the version may sample for, and
        takes none of them; returns how many groups wait for their step. Call `sync` before. Raises as `take` does."""
        ahead = min(self._demand.max_staleness + self._version + 1, self._demand.num_steps) - self._untaken_step
        return self._wait_for(min(steps, ahead) * self._demand.groups_per_step, "groups")

    def _wait_for(self, needed: int, what: str) -> int:
        """Works until so many complete groups are there that no step has taken; returns how many there are."""
        self._last_progress = time.monotonic()
        while True:
            self._admit()
            ready = self._buffer.ready(self._version - self._demand.max_staleness)
            if ready >= needed:
                return ready
            self._work(f"{needed - ready} of {needed} {what}")

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One judged answer to each prompt, for evaluation: outside the ledger, in the order of the prompts."""
        exam = _Exam(sampling)
        size = max(1, -(-len(prompts) // max(1, self._rollouts.size())))
        for start in range(0, len(prompts), size):
            self._ask(exam, prompts[start : start + size])
        self._last_progress = time.monotonic()
        while len(exam.groups) < len(prompts) or exam.outstanding:
            self._work(f"{len(prompts) - len(exam.groups)} of {len(prompts)} evaluation answers")
        return [exam.groups[prompt.id] for prompt in prompts]

    def _admit(self) -> None:
        """Leases as many prompts as the policy version allows, to each free engine its share of the pool.

        Which engine gets which prompt changes no sample: seeds are addressed by prompt."""
        while self._buffer.assigned(self._untaken_step):
            self._untaken_step += 1
        free = self._rollouts.free()
        if not free:
            return
        accepted = self._untaken_step * self._demand.groups_per_step
        held = sum(desk.failures.held for desk in self._desks if desk.failures is not None)
        count = admissible(self._demand, self._version, accepted, self._buffer.in_flight() - held)
        share = -(-count // max(len(free), self._rollouts.size()))
        for engine in free:
            if count == 0:
                return
            leases = self._buffer.lease(min(share, count), engine, next(self._lease_requests))
            count -= len(leases)
            self._start(engine, leases)

    def _start(self, engine: str, leases: Sequence[Lease]) -> None:
        if not leases:
            return
        tickets = {lease.prompt_id: lease.ticket for lease in leases}
        prompts = tuple(self._supply.prompt(prompt_id) for prompt_id in tickets)
        request = Request(prompts, self._demand.sampling, self._demand.samples_per_prompt, "sample")
        deliver, lose = partial(self._store, tickets), partial(self._give_back, tickets)
        self._hand_out(
            self._rollouts, engine, tuple(tickets), request, _Errand(deliver, lose, len(tickets), "generate")
        )

    def _hand_out(
        self, workers: Workers, worker: str | None, ids: tuple[int, ...], payload: Handle, errand: _Errand
    ) -> None:
        number = next(self._numbers)
        self._errands[number] = errand
        workers.submit(Task(number, ids, payload), worker)

    def _store(self, tickets: Mapping[int, int], result: Result) -> None:
        """A generated group: into the buffer first, then to the judges. The answer to a lease that ended is refused."""
        (prompt_id,) = result.prompt_ids
        try:
            stored = self._buffer.add_group(prompt_id, tickets[prompt_id], result.value)
        except HandleLost as lost:
            self._buffer.release(prompt_id, tickets[prompt_id], str(lost), counted=False)
            return
        if stored:
            self._send_to_judges(prompt_id, result.value, frozenset().union(*(desk.columns for desk in self._desks)))
        else:
            self._late_answers += 1

    def _give_back(self, tickets: Mapping[int, int], result: Result) -> None:
        """The leases of a lost engine end; what it was working on is suspected, and dropped at the third time."""
        for prompt_id in result.prompt_ids:
            reason, counted = str(result.error), _may_be_the_cause(result)
            if not self._buffer.release(prompt_id, tickets[prompt_id], reason, counted=counted):
                self._set_aside += 1

    def _send_to_judges(self, prompt_id: int, group: Handle, missing: frozenset[str]) -> None:
        for desk in self._desks:
            if desk.columns & missing:
                self._send_to(desk, prompt_id, group)

    def _send_to(self, desk: JudgeDesk, prompt_id: int, group: Handle) -> None:
        again = partial(self._judge_again, desk)
        fail = None if desk.failures is None else desk.failures.failed
        errand = _Errand(partial(self._store_columns, desk), again, 1, "judge", fail)
        self._hand_out(desk.workers, None, (prompt_id,), group, errand)

    def _store_columns(self, desk: JudgeDesk, result: Result) -> None:
        (prompt_id,) = result.prompt_ids
        try:
            self._buffer.add_columns(prompt_id, result.value)
        except HandleLost:
            self._send_to(desk, prompt_id, self._buffer.group(prompt_id))
            return
        self._judged(desk)

    def _judged(self, desk: JudgeDesk) -> None:
        """The judge works: what it could not judge before is dropped now, and not judged again."""
        if desk.failures is not None:
            for prompt_id, reason in desk.failures.scored().items():
                self._buffer.drop(prompt_id, reason)

    def _judge_again(self, desk: JudgeDesk, result: Result) -> None:
        """The stored group goes to another host; at the third death with it the prompt is dropped."""
        (prompt_id,) = result.prompt_ids
        if self._deaths_of(desk.name, prompt_id, result) >= MAX_ATTEMPTS:
            self._buffer.drop(prompt_id, str(result.error))
            self._set_aside += 1
        else:
            self._send_to(desk, prompt_id, self._buffer.group(prompt_id))

    def _deaths_of(self, phase: str, prompt_id: int, result: Result) -> int:
        """How many workers died with this prompt in this phase, the one of `result` counted."""
        self._deaths[phase, prompt_id] += _may_be_the_cause(result)
        return self._deaths[phase, prompt_id]

    def _ask(self, exam: _Exam, prompts: Sequence[Prompt]) -> None:
        request = Request(tuple(prompts), exam.sampling, 1, "evaluate")
        again = partial(self._ask_again, exam, {prompt.id: prompt for prompt in prompts})
        errand = _Errand(partial(self._examine, exam, again), again, len(prompts), "evaluate")
        self._hand_out(self._rollouts, None, tuple(prompt.id for prompt in prompts), request, errand)

    def _ask_again(self, exam: _Exam, asked: Mapping[int, Prompt], result: Result) -> None:
        """Each prompt alone, so that a further death is its own. Raises RunFailed at the third with one prompt."""
        for prompt_id in result.prompt_ids:
            deaths = self._deaths_of("evaluate", prompt_id, result)
            if deaths >= MAX_ATTEMPTS:
                raise RunFailed(f"evaluation: {deaths} engines died with prompt {prompt_id}; the last: {result.error}")
            self._ask(exam, [asked[prompt_id]])

    def _examine(self, exam: _Exam, again: Callable[[Result], None], result: Result) -> None:
        (prompt_id,) = result.prompt_ids
        try:
            exam.groups[prompt_id] = self._rollouts.fetch(result.value)
        except HandleLost:
            again(result)
            return
        self._spent("examine", result.seconds)
        for desk in self._desks:
            if desk.scores_answers:
                exam.outstanding += 1
                self._send_to_grader(exam, desk, prompt_id)

    def _send_to_grader(self, exam: _Exam, desk: JudgeDesk, prompt_id: int) -> None:
        again = partial(self._grade_again, exam, desk)
        fail = None if desk.failures is None else partial(self._leave_ungraded, exam, desk)
        errand = _Errand(partial(self._grade, exam, desk), again, 1, "evaluate", fail)
        self._hand_out(desk.workers, None, (prompt_id,), exam.groups[prompt_id], errand)

    def _grade_again(self, exam: _Exam, desk: JudgeDesk, result: Result) -> None:
        (prompt_id,) = result.prompt_ids
        deaths = self._deaths_of(desk.name, prompt_id, result)
        if deaths >= MAX_ATTEMPTS:
            raise RunFailed(f"evaluation: {deaths} workers died with prompt {prompt_id}; the last: {result.error}")
        self._send_to_grader(exam, desk, prompt_id)

    def _grade(self, exam: _Exam, desk: JudgeDesk, result: Result) -> None:
        (prompt_id,) = result.prompt_ids
        exam.groups[prompt_id] = exam.groups[prompt_id].with_columns(desk.workers.fetch(result.value))
        exam.outstanding -= 1
        self._judged(desk)

    def _leave_ungraded(self, exam: _Exam, desk: JudgeDesk, prompt_id: int, error: JudgeFailed) -> None:
        """An answer that could not be judged has no score; a single answer that has none by right is no failure."""
        if desk.failures is not None and not isinstance(error, NothingScored):
            desk.failures.counted(error)
        group = exam.groups[prompt_id]
        scores = {name: [None] * len(group.samples) for name in desk.columns}
        exam.groups[prompt_id] = group.with_columns(Columns(prompt_id, scores, {}))
        exam.outstanding -= 1

    def _work(self, waiting_for: str) -> None:
        """Delivers what has finished; raises when nothing has for too long, or when a worker failed."""
        if self._stop() or self._pause():
            raise Interrupted
        pools = [self._rollouts, *(desk.workers for desk in self._desks)]
        results = [result for pool in pools for result in pool.collect(POLL_S / len(pools))]
        for result in results:
            if result.prompt_ids and is_dropped("message: worker's answer", result.prompt_ids[0]):
                continue
            self._deliver(result)
        now = time.monotonic()
        if results or not all(pool.size() for pool in pools):
            self._last_progress = now
        elif now - self._last_progress > self._demand.wait_timeout_s:
            held = [line for pool in pools for line in pool.holding()] or ["no worker holds any of them"]
            raise DeadlinePassed(
                f"waited {now - self._last_progress:.0f} s for {waiting_for} at version {self._version}: "
                + "; ".join(held)
            )

    def _deliver(self, result: Result) -> None:
        if not result.prompt_ids:
            return  # a mark
        errand = self._errands.get(result.task)
        if errand is None:  # its worker was given up, and its prompts with it
            self._late_answers += len(result.prompt_ids)
            return
        errand.remaining -= len(result.prompt_ids)
        if errand.remaining == 0:
            del self._errands[result.task]
        if isinstance(result.error, ActorDied):
            errand.lose(result)
            return
        if errand.fail is not None and isinstance(result.error, JudgeFailed):
            errand.fail(result.prompt_ids[0], result.error)  # a judge's task is one group
            return
        if result.error is not None:
            ids = ", ".join(map(str, result.prompt_ids[:NAMED_IN_ERRORS]))
            if isinstance(result.error, RunFailed):
                raise result.error
            raise RunFailed(
                f"{result.worker} failed at '{errand.phase}' on prompts {ids}: {result.error}"
            ) from result.error
        self._spent(errand.phase, result.seconds)
        began = time.monotonic()
        errand.deliver(result)
        if errand.phase != "evaluate":
            self._spent("store", time.monotonic() - began)

    def _spent(self, on: str, seconds: float) -> None:
        self._seconds[on] = self._seconds.get(on, 0.0) + seconds

    def _faults(self) -> Metrics:
        """What went wrong, and was made good, since the last call."""
        replaced = [pool.replaced() for pool in (self._rollouts, *(desk.workers for desk in self._desks))]
        totals = {
            "faults/workers_died": sum(each.died for each in replaced),
            "faults/workers_hung": sum(each.hung for each in replaced),
            "faults/workers_left": sum(each.left for each in replaced),
            "faults/late_answers": self._late_answers,
            "faults/prompts_set_aside": self._set_aside,
        }
        new = {name: metrics.total(count - self._told.get(name, 0)) for name, count in totals.items()}
        self._told = totals
        return metrics.merge([new, *(desk.failures.measured() for desk in self._desks if desk.failures is not None)])


def _may_be_the_cause(result: Result) -> bool:
    """Whether the prompts of a lost worker count as suspects: it was working on them when it died or hung."""
    return isinstance(result.error, WorkerLost) and result.error.counted
