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
    task: Task
    results: Iterator[tuple[int, Any]]
    missing: set[int]


class LocalWorkers:
    """One worker in this process. Its work happens inside `collect`, one result a call; `timeout_s` is not needed."""

    def __init__(
        self,
        name: str,
        work: Callable[[Any], Iterator[tuple[int, Any]]],
        load: Callable[[Weights], Receipt] | None,
    ) -> None:
        self._name, self._work, self._load = name, work, load
        self._errands: deque[_Errand] = deque()

    def submit(self, task: Task) -> None:
        self._errands.append(_Errand(task, self._work(task.payload), set(task.prompt_ids)))

    def collect(self, timeout_s: float) -> list[Result]:
        if not self._errands:
            return []
        errand, before = self._errands[0], time.monotonic()
        prompt_id, value = next(errand.results)
        errand.missing.discard(prompt_id)
        if not errand.missing:
            self._errands.popleft()
        return [Result(errand.task.number, (prompt_id,), value, None, self._name, time.monotonic() - before)]

    def room(self) -> int:
        return 0 if self._errands else 1

    def holding(self) -> list[str]:
        return [f"{self._name} holds prompts {sorted(errand.missing)}" for errand in self._errands]

    def load(self, weights: Handle) -> list[Receipt]:
        return [self._load(weights)] if self._load else []

    def fetch(self, handle: Handle) -> Any:
        return handle


def answers(generator: Generator, request: Request) -> Iterator[tuple[int, Group]]:
    groups = generator.generate(request.prompts, request.sampling, request.samples_per_prompt, request.purpose)
    return ((group.prompt.id, group) for group in groups)


def judgement(judge: Judge, group: Group) -> Iterator[tuple[int, Any]]:
    yield group.prompt.id, judge.judge(group)
