"""Rows of data beside fresh samples, through the same source: who answers which prompt id, and who is not asked.

A run that mixes has one sequence of prompt ids. Which of them are rows of the data is a pure function of the id, so
that a restart finds the same; rows are looked up in the driver, go through the buffer's door as samples do, and never
age.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlhf.experience import Columns
from rlhf.interfaces import Handle, Published, Replacements, Request, Result, Task, Workers

if TYPE_CHECKING:
    from rlhf.weights import Receipt


@dataclass(frozen=True, slots=True)
class Interleaving:
    """`rows` of every `groups` prompt ids are rows of the data, spread evenly over them; rows < groups."""

    groups: int
    rows: int

    def is_row(self, prompt_id: int) -> bool:
        """Held-out prompts have negative ids and are no rows."""
        return prompt_id >= 0 and self._rows_before(prompt_id + 1) > self._rows_before(prompt_id)

    def own_number(self, prompt_id: int) -> int:
        """Its number among the ids of its kind, from 0: without gaps, in the same order."""
        rows = self._rows_before(prompt_id)
        return rows if self.is_row(prompt_id) else prompt_id - rows

    def _rows_before(self, prompt_id: int) -> int:
        return prompt_id * self.rows // self.groups


class EnginesAndRows:
    """Rollout workers that look rows of the data up and hand all other prompts of a task to the engines."""

    def __init__(self, engines: Workers, rows: Workers, is_row: Callable[[int], bool]) -> None:
        self._engines, self._rows, self._is_row = engines, rows, is_row

    def submit(self, task: Task, worker: str | None) -> None:
        request: Request = task.payload
        rows = tuple(prompt for prompt in request.prompts if self._is_row(prompt.id))
        others = tuple(prompt for prompt in request.prompts if not self._is_row(prompt.id))
        for workers, prompts, name in ((self._rows, rows, None), (self._engines, others, worker)):
            if prompts:
                ids = tuple(prompt.id for prompt in prompts)
                workers.submit(Task(task.number, ids, replace(request, prompts=prompts)), name)

    def collect(self, timeout_s: float) -> list[Result]:
        looked_up = self._rows.collect(0.0)
        return looked_up or self._engines.collect(timeout_s)

    def free(self) -> list[str]:
        return self._engines.free()

    def size(self) -> int:
        return self._engines.size()

    def holding(self) -> list[str]:
        return [*self._rows.holding(), *self._engines.holding()]

    def load(self, published: Published) -> list["Receipt"]:
        return self._engines.load(published)

    def replaced(self) -> Replacements:
        return self._engines.replaced()

    def fetch(self, handle: Handle) -> Any:
        """Evaluation asks for the engines' answers only."""
        return self._engines.fetch(handle)


class NotAsked:
    """A judge of samples that is not asked about rows of the data: its column says None of each of their answers."""

    def __init__(self, judges: Workers, is_row: Callable[[int], bool], columns: frozenset[str], answers: int) -> None:
        self._judges, self._is_row = judges, is_row
        self._columns, self._answers = columns, answers
        self._finished: deque[Result] = deque()

    def submit(self, task: Task, worker: str | None) -> None:
        (prompt_id,) = task.prompt_ids
        if not self._is_row(prompt_id):
            self._judges.submit(task, worker)
            return
        nothing = Columns(prompt_id, {name: [None] * self._answers for name in self._columns}, {})
        self._finished.append(Result(task.number, task.prompt_ids, nothing, None, "data", 0.0))

    def collect(self, timeout_s: float) -> list[Result]:
        if self._finished:
            return [self._finished.popleft()]
        return self._judges.collect(timeout_s)

    def free(self) -> list[str]:
        return self._judges.free()

    def size(self) -> int:
        return self._judges.size()

    def holding(self) -> list[str]:
        return self._judges.holding()

    def load(self, published: Published) -> list["Receipt"]:
        return self._judges.load(published)

    def replaced(self) -> Replacements:
        return self._judges.replaced()

    def fetch(self, handle: Handle) -> Any:
        return handle if isinstance(handle, Columns) else self._judges.fetch(handle)
