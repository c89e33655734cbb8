"""What a pool has lost: workers, by cause, and what they held."""

from collections import Counter

from actors.worker import PoolSpec, Worker
from rlhf.errors import RunFailed, WorkerLost
from rlhf.interfaces import Replacements, Result, Task


class Losses:
    """How many workers of a pool were lost, and how often in a row those of a slot were without a result."""

    def __init__(self, spec: PoolSpec) -> None:
        self._spec = spec
        self._lost: Counter[str] = Counter()  # died, hung, left
        self._fruitless: Counter[int] = Counter()  # by slot: deaths since its last result

    def count(self, how: str) -> None:
        """One more: died, hung or left."""
        self._lost[how] += 1

    def replaced(self) -> Replacements:
        return Replacements(self._lost["died"], self._lost["hung"], self._lost["left"])

    def forgive(self, worker: Worker) -> None:
        """A result came from this slot."""
        self._fruitless[worker.slot] = 0

    def blame(self, worker: Worker, message: str) -> None:
        """Raises RunFailed when a slot has lost too many workers in a row."""
        self._fruitless[worker.slot] += 1
        if self._fruitless[worker.slot] > self._spec.max_restarts:
            raise RunFailed(
                f"{self._spec.role}-{worker.slot} was lost {self._fruitless[worker.slot]} times in a row without a "
                f"result (loop.max_restarts is {self._spec.max_restarts}); the last: {message}"
            )


def taken_back(worker: Worker, message: str, *, suspected: bool) -> tuple[list[Task], list[Result]]:
    """What a worker held and will not finish: the tasks of which it had not heard, and results that say that it is lost
    for the prompts of the others. Suspected are the prompts of those that it had begun."""
    again, results = [], []
    for errand in worker.errands:
        if not errand.begun and not errand.bound:
            again.append(errand.task)
            continue
        error = WorkerLost(message, counted=suspected and errand.begun)
        prompts = tuple(sorted(errand.missing))
        results.append(Result(errand.task.number, prompts, None, error, worker.name, 0.0))
    worker.errands.clear()
    return again, results
