"""A pool of actors of one role that work on tasks: the `Workers` of a team on Ray.

Each actor has a method `work` that yields, for each finished prompt, first (prompt id, seconds) and then the value.
The driver reads the first and passes the reference of the second on, so that a group is stored as soon as it is
finished and never travels through the driver."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors import waiting
from rlhf.interfaces import Handle, Result, Task
from rlhf.weights import Receipt


@dataclass(slots=True)
class _Errand:
    """A task on an actor: its stream of results, and the prompts that have not come yet."""

    task: Task
    worker: int
    stream: ray.ObjectRefGenerator
    missing: set[int]


class ActorWorkers:
    """Actors of one role. Gives a task to the actor with the fewest; an actor works on its tasks in order."""

    def __init__(self, role: str, actors: Sequence[ActorHandle], timeout_s: float) -> None:
        self._names = [f"{role}-{number}" for number in range(len(actors))]
        self._actors = list(actors)
        self._timeout_s = timeout_s
        self._errands: list[_Errand] = []

    def submit(self, task: Task) -> None:
        worker = min(range(len(self._actors)), key=lambda w: (self._load_of(w), w))
        stream: ray.ObjectRefGenerator = self._actors[worker].work.options(num_returns="streaming").remote(task.payload)
        self._errands.append(_Errand(task, worker, stream, set(task.prompt_ids)))

    def collect(self, timeout_s: float) -> list[Result]:
        if not self._errands:
            return []
        by_stream = {errand.stream: errand for errand in self._errands}
        ready, _ = ray.wait(list(by_stream), num_returns=1, timeout=timeout_s, fetch_local=False)
        results: deque[Result] = deque()
        for stream in ready:
            results.append(self._next(by_stream[stream]))
        self._errands = [errand for errand in self._errands if errand.missing]
        return list(results)

    def room(self) -> int:
        return sum(self._load_of(worker) == 0 for worker in range(len(self._actors)))

    def holding(self) -> list[str]:
        return [
            f"{self._names[errand.worker]} holds prompts {', '.join(map(str, sorted(errand.missing)[:8]))}"
            f"{' …' if len(errand.missing) > 8 else ''}"
            for errand in self._errands
        ]

    def load(self, weights: Handle) -> list[Receipt]:
        refs = [actor.load.remote(weights) for actor in self._actors]
        return waiting.get(refs, f"{', '.join(self._names)} loading weights", self._timeout_s)

    def fetch(self, handle: Handle) -> Any:
        return waiting.get([handle], "fetching a value", self._timeout_s)[0]

    def _load_of(self, worker: int) -> int:
        return sum(errand.worker == worker for errand in self._errands)

    def _next(self, errand: _Errand) -> Result:
        """The next result of a stream that has one; an error ends the task for all its prompts that are still
        missing."""
        name = self._names[errand.worker]
        try:
            prompt_id, seconds = ray.get(next(errand.stream), timeout=self._timeout_s)
            value = next(errand.stream)
        except RayError as error:
            lost, errand.missing = tuple(sorted(errand.missing)), set()
            return Result(
                errand.task.number, lost, None, waiting.failure_of(error, f"{name} at prompts {lost[:8]}"), name, 0.0
            )
        errand.missing.discard(prompt_id)
        return Result(errand.task.number, (prompt_id,), value, None, name, seconds)
