"""Where a step's groups come from: prompts are leased, answered by rollout workers, judged, and stored on the way.

`PolicySource` is the only scheduler. It admits as much work as `max_staleness` allows, stores every group before
anything depends on it, sends it to each judge whose columns it lacks, and waits with a deadline. It never looks into
a group: it passes handles. On a restart it goes on with what the buffer holds: stored groups are judged, never
generated again."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from rlhf import metrics
from rlhf.errors import DeadlinePassed, RunFailed
from rlhf.experience import Group, Prompt, Sampling
from rlhf.interfaces import Buffer, Handle, Published, Request, Result, Task, Workers
from rlhf.metrics import Metrics

POLL_S = 0.05
NAMED_IN_ERRORS = 8


class Interrupted(Exception):
    """The run was asked to stop while it waited; nothing is lost."""


class PromptSupply(Protocol):
    """The prompts of a run: the same prompt for the same id, in every process and after every restart."""

    def prompt(self, prompt_id: int) -> Prompt: ...


@dataclass(frozen=True, slots=True)
class Demand:
    """How much is sampled, and how far ahead of the learner; groups_per_step x samples_per_prompt samples a step."""

    groups_per_step: int
    num_steps: int
    max_staleness: int
    samples_per_prompt: int
    sampling: Sampling
    wait_timeout_s: float


@dataclass(frozen=True, slots=True)
class JudgeDesk:
    """The workers that host one judge, and the columns that it fills."""

    name: str
    columns: frozenset[str]
    scores_answers: bool  # evaluation wants its columns too
    workers: Workers


@dataclass(slots=True)
class _Errand:
    """A task that was handed out: who gets its results, and how many are still to come."""

    deliver: Callable[[Result], None]
    remaining: int
    phase: str


@dataclass(slots=True)
class _Exam:
    """An evaluation under way: answers and judgements by prompt id, and how many judgements are still to come."""

    groups: dict[int, Group] = field(default_factory=dict)
    outstanding: int = 0


def admissible(demand: Demand, version: int, accepted: int, in_flight: int) -> int:
    """How many more prompts may be started at policy version v, with B groups a step.

        min(max_staleness + v + 1, num_steps) * B - (accepted + in flight)                      arXiv 2505.24298, Eq 3

    accepted counts the groups of steps that were taken; a dropped group is in neither number, so filtering cannot
    starve admission. Bounds the work in flight, not the age of a sample: `Buffer.ready` sweeps by age."""
    steps_ahead = min(demand.max_staleness + version + 1, demand.num_steps)
    return max(0, steps_ahead * demand.groups_per_step - accepted - in_flight)


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
        self._numbers = itertools.count()
        self._errands: dict[int, _Errand] = {}
        self._version = 0
        self._untaken_step = 0
        self._last_progress = time.monotonic()
        self._seconds: dict[str, float] = {}

    def resume(self) -> int:
        """Sends the groups that were stored but not judged to the judges they lack; returns how many there were."""
        unjudged = self._buffer.unjudged()
        for prompt_id, missing in sorted(unjudged.items()):
            self._send_to_judges(prompt_id, self._buffer.group(prompt_id), missing)
        return len(unjudged)

    def sync(self, published: Published) -> Metrics:
        """Every rollout engine pulls and verifies the version; then the work that it allows is started."""
        started = time.monotonic()
        receipts = self._rollouts.load(published.weights)
        for receipt in receipts:
            if (receipt.version, receipt.fingerprint) != (published.version, published.fingerprint):
                raise RunFailed(
                    f"{receipt.engine} holds version {receipt.version} ({receipt.fingerprint}), published was "
                    f"{published.version} ({published.fingerprint})"
                )
        self._version = published.version
        measured = {
            "sync/bytes": metrics.last(published.size_bytes),
            "sync/engines": metrics.last(len(receipts)),
            "sync/seconds": metrics.last(time.monotonic() - started),
            "sync/probe_abs_max": metrics.largest(max((r.probe_abs_max for r in receipts), default=0.0)),
            "time/judge_s": metrics.last(self._seconds.pop("judge", 0.0)),
        }
        looking_up_or_sampling = self._seconds.pop("generate", 0.0)
        if receipts:  # without an engine rows are looked up, and their number a second is no speed of anything
            measured["time/generate_s"] = metrics.last(looking_up_or_sampling)
        self._admit()
        return measured

    def take(self, step: int) -> Handle:
        """The step's groups; waits for them with a deadline, and keeps the pool busy with later ones.

        Raises DeadlinePassed when nothing arrives for `wait_timeout_s`, Interrupted when the run was asked to stop, and
        whatever a worker raised.
        """
        needed = self._demand.groups_per_step
        self._last_progress = time.monotonic()
        while not self._buffer.assigned(step):
            self._admit()
            ready = self._buffer.ready(self._version - self._demand.max_staleness)
            if ready >= needed:
                break
            self._work(f"{needed - ready} of {needed} groups of step {step}")
        groups = self._buffer.take(step, needed)
        self._admit()
        return groups

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One judged answer to each prompt, for evaluation: outside the ledger, in the order of the prompts."""
        exam = _Exam()
        size = max(1, -(-len(prompts) // max(1, self._rollouts.room())))
        for start in range(0, len(prompts), size):
            chunk = tuple(prompts[start : start + size])
            request = Request(chunk, sampling, 1, "evaluate")
            self._hand_out(
                self._rollouts, tuple(p.id for p in chunk), request, partial(self._examine, exam), "evaluate"
            )
        self._last_progress = time.monotonic()
        while len(exam.groups) < len(prompts) or exam.outstanding:
            self._work(f"{len(prompts) - len(exam.groups)} of {len(prompts)} evaluation answers")
        return [exam.groups[prompt.id] for prompt in prompts]

    def _admit(self) -> None:
        """Leases as many prompts as the policy version allows and gives each free engine an equal share."""
        while self._buffer.assigned(self._untaken_step):
            self._untaken_step += 1
        demand = self._demand
        room = self._rollouts.room()
        if room == 0:
            return
        accepted = self._untaken_step * demand.groups_per_step
        count = admissible(demand, self._version, accepted, self._buffer.in_flight())
        leased = self._buffer.lease(count, "source") if count else []
        share = -(-len(leased) // room) if leased else 1
        for start in range(0, len(leased), share):
            ids = tuple(leased[start : start + share])
            prompts = tuple(self._supply.prompt(prompt_id) for prompt_id in ids)
            request = Request(prompts, demand.sampling, demand.samples_per_prompt, "sample")
            self._hand_out(self._rollouts, ids, request, self._store, "generate")

    def _hand_out(
        self, workers: Workers, ids: tuple[int, ...], payload: Handle, deliver: Callable[[Result], None], phase: str
    ) -> None:
        number = next(self._numbers)
        self._errands[number] = _Errand(deliver, len(ids), phase)
        workers.submit(Task(number, ids, payload))

    def _store(self, result: Result) -> None:
        """A generated group: into the buffer first, then to the judges. A second answer to a prompt is refused."""
        (prompt_id,) = result.prompt_ids
        if self._buffer.add_group(prompt_id, result.value):
            self._send_to_judges(prompt_id, result.value, frozenset().union(*(desk.columns for desk in self._desks)))

    def _send_to_judges(self, prompt_id: int, group: Handle, missing: frozenset[str]) -> None:
        for desk in self._desks:
            if desk.columns & missing:
                self._hand_out(desk.workers, (prompt_id,), group, self._store_columns, "judge")

    def _store_columns(self, result: Result) -> None:
        (prompt_id,) = result.prompt_ids
        self._buffer.add_columns(prompt_id, result.value)

    def _examine(self, exam: _Exam, result: Result) -> None:
        (prompt_id,) = result.prompt_ids
        exam.groups[prompt_id] = self._rollouts.fetch(result.value)
        for desk in self._desks:
            if desk.scores_answers:
                exam.outstanding += 1
                self._hand_out(
                    desk.workers,
                    (prompt_id,),
                    result.value,
                    partial(self._grade, exam, desk),
                    "evaluate",
                )

    def _grade(self, exam: _Exam, desk: JudgeDesk, result: Result) -> None:
        (prompt_id,) = result.prompt_ids
        exam.groups[prompt_id] = exam.groups[prompt_id].with_columns(desk.workers.fetch(result.value))
        exam.outstanding -= 1

    def _work(self, waiting_for: str) -> None:
        """Delivers what has finished; raises when nothing has for too long, or when a worker failed."""
        if self._stop():
            raise Interrupted
        pools = [self._rollouts, *(desk.workers for desk in self._desks)]
        results = [result for pool in pools for result in pool.collect(POLL_S / len(pools))]
        for result in results:
            self._deliver(result)
        now = time.monotonic()
        if results:
            self._last_progress = now
        elif now - self._last_progress > self._demand.wait_timeout_s:
            held = [line for pool in pools for line in pool.holding()] or ["no worker holds any of them"]
            raise DeadlinePassed(
                f"waited {now - self._last_progress:.0f} s for {waiting_for} at version {self._version}: "
                + "; ".join(held)
            )

    def _deliver(self, result: Result) -> None:
        errand = self._errands[result.task]
        if result.error is not None:
            ids = ", ".join(map(str, result.prompt_ids[:NAMED_IN_ERRORS]))
            if isinstance(result.error, RunFailed):
                raise result.error
            raise RunFailed(
                f"{result.worker} failed at '{errand.phase}' on prompts {ids}: {result.error}"
            ) from result.error
        self._seconds[errand.phase] = self._seconds.get(errand.phase, 0.0) + result.seconds
        errand.remaining -= len(result.prompt_ids)
        if errand.remaining == 0:
            del self._errands[result.task]
        errand.deliver(result)
