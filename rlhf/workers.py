"""Workers in this process: `collect` does the work itself, one result a call."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rlhf.experience import Group
from rlhf.interfaces import Generator, Handle, Judge, Request, Result, Task
from rlhf.weights import Receipt, Weights


@dataclass(slots=True)
class _Errand:
    """A task, its results once it was begun, and the prompts that have not come yet."""

    task: Task
    results: Iterator[tuple[int, Any]] | None
    missing: set[int]


class LocalWorkers:
    """One worker in this process. Its work happens inside `collect`, one result a call, so a timeout is not needed."""

    def __init__(
        self,
        name: str,
        work: Callable[[Any], Iterator[tuple[int, Any]]],
        load: Callable[[Weights], Receipt] | None,
    ) -> None:
        self._name, self._work, self._load = name, work, load
        self._errands: deque[_Errand] = deque()
        self._finished: deque[Result] = deque()

    def submit(self, task: Task) -> None:
        self._errands.append(_Errand(task, None, set(task.prompt_ids)))

    def collect(self, timeout_s: float) -> list[Result]:
        if self._finished:
            return [self._finished.popleft()]
        return [self._advance()] if self._errands else []

    def room(self) -> int:
        return 0 if self._errands or self._finished else 1

    def holding(self) -> list[str]:
        return [f"{self._name} holds prompts {sorted(errand.missing)}" for errand in self._errands]

    def load(self, weights: Handle) -> list[Receipt]:
        """Finishes the task that was begun, as an actor would, before the weights change under it."""
        while self._errands and self._errands[0].results is not None:
            self._finished.append(self._advance())
        return [self._load(weights)] if self._load else []

    def fetch(self, handle: Handle) -> Any:
        return handle

    def _advance(self) -> Result:
        """The next result of the oldest task."""
        errand, before = self._errands[0], time.monotonic()
        if errand.results is None:
            errand.results = self._work(errand.task.payload)
        prompt_id, value = next(errand.results)
        errand.missing.discard(prompt_id)
        if not errand.missing:
            next(errand.results, None)  # lets a generator end, and with it the engine's call
            self._errands.popleft()
        return Result(errand.task.number, (prompt_id,), value, None, self._name, time.monotonic() - before)


def answers(generator: Generator, request: Request) -> Iterator[tuple[int, Group]]:
    for group in generator.generate(request.prompts, request.sampling, request.samples_per_prompt, request.purpose):
        yield group.prompt.id, group


def judgement(judge: Judge, group: Group) -> Iterator[tuple[int, Any]]:
    yield group.prompt.id, judge.judge(group)
