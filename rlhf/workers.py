"""Workers in this process: `collect` does the work itself, one result a call."""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf.errors import JudgeFailed, WorkerLost
from rlhf.experience import Group
from rlhf.interfaces import Generator, Handle, Judge, Published, Replacements, Request, Result, Task

if TYPE_CHECKING:
    from rlhf.weights import Receipt, Weights

NAMED = 8  # prompts in a line that says who holds what


def held(worker: str, prompt_ids: Collection[int], version: int | None, seconds: float) -> str:
    """Who holds which prompts, at which version of the policy, for how long: one line for messages."""
    named = ", ".join(map(str, sorted(prompt_ids)[:NAMED]))
    more = f" and {len(prompt_ids) - NAMED} more" if len(prompt_ids) > NAMED else ""
    at = "" if version is None else f" at version {version}"
    return f"{worker} holds prompts {named}{more}{at} for {seconds:.0f} s"


@dataclass(slots=True)
class _Errand:
    """A task, its results once it was begun, and the prompts that have not come yet."""

    task: Task
    results: Iterator[tuple[int, Any]] | None
    missing: set[int]
    since: float


class LocalWorkers:
    """One worker in this process. Its work happens inside `collect`, one result a call, so a timeout is not needed."""

    def __init__(
        self,
        name: str,
        work: Callable[[Any], Iterator[tuple[int, Any]]],
        load: "Callable[[Weights], Receipt] | None",
    ) -> None:
        self._name, self._work, self._load = name, work, load
        self._version: int | None = None
        self._errands: deque[_Errand] = deque()
        self._finished: deque[Result] = deque()

    def submit(self, task: Task, worker: str | None) -> None:
        self._errands.append(_Errand(task, None, set(task.prompt_ids), time.monotonic()))

    def collect(self, timeout_s: float) -> list[Result]:
        if self._finished:
            return [self._finished.popleft()]
        return [self._advance()] if self._errands else []

    def free(self) -> list[str]:
        return [] if self._errands or self._finished else [self._name]

    def size(self) -> int:
        return 1

    def holding(self) -> list[str]:
        now = time.monotonic()
        return [held(self._name, errand.missing, self._version, now - errand.since) for errand in self._errands]

    def replaced(self) -> Replacements:
        return Replacements(0, 0, 0)

    def load(self, published: Published) -> "list[Receipt]":
        """Finishes the task that was begun, as an actor would, before the weights change under it."""
        self._before_load()
        self._version = published.version
        return [self._load(published.weights)] if self._load else []

    def _before_load(self) -> None:
        while self._errands and self._errands[0].results is not None:
            self._finished.append(self._advance())

    def fetch(self, handle: Handle) -> Any:
        return handle

    def _advance(self) -> Result:
        """The next result of the oldest task. What a judge failed at is a result; any other error rises from here."""
        errand, before = self._errands[0], time.monotonic()
        if errand.results is None:
            errand.results = self._work(errand.task.payload)
        try:
            prompt_id, value = next(errand.results)
        except JudgeFailed as error:
            self._errands.popleft()
            lost = tuple(sorted(errand.missing))
            return Result(errand.task.number, lost, None, error, self._name, time.monotonic() - before)
        errand.missing.discard(prompt_id)
        if not errand.missing:
            next(errand.results, None)  # lets a generator end, and with it the engine's call
            self._errands.popleft()
        return Result(errand.task.number, (prompt_id,), value, None, self._name, time.monotonic() - before)


class MidTaskWorkers(LocalWorkers):
    """The same, whose worker takes weights in the middle of a task and goes on with it."""

    def _before_load(self) -> None:
        pass


class SleepingLocalWorkers(LocalWorkers):
    """The same, whose worker takes turns on a GPU: `sleep` and `wake` are its own, and `load` is what wakes one that
    takes weights."""

    def __init__(
        self,
        name: str,
        work: Callable[[Any], Iterator[tuple[int, Any]]],
        load: "Callable[[Weights], Receipt] | None",
        sleep: Callable[[], None],
        wake: Callable[[], None] | None,
    ) -> None:
        super().__init__(name, work, load)
        self._fall_asleep, self._wake_up = sleep, wake
        self._published: Published | None = None

    def load(self, published: Published) -> "list[Receipt]":
        self._published = published
        return super().load(published)

    def sleep(self) -> None:
        """Gives up the task that was begun, with all prompts that have not come; then sleeps."""
        if self._errands and self._errands[0].results is not None:
            errand = self._errands.popleft()
            errand.results = None  # ends the engine's call
            error = WorkerLost(f"{self._name} sleeps, and gave up what it was at", counted=False)
            lost = tuple(sorted(errand.missing))
            self._finished.append(Result(errand.task.number, lost, None, error, self._name, 0.0))
        self._fall_asleep()

    def wake(self) -> None:
        if self._wake_up is not None:
            self._wake_up()
        elif self._published is not None:
            super().load(self._published)


def answers(generator: Generator, request: Request) -> Iterator[tuple[int, Group]]:
    for group in generator.generate(request.prompts, request.sampling, request.samples_per_prompt, request.purpose):
        yield group.prompt.id, group


def judgement(judge: Judge, group: Group) -> Iterator[tuple[int, Any]]:
    yield group.prompt.id, judge.judge(group)
