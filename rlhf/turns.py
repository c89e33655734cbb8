"""Taking turns on the same GPUs: the learner has them while it annotates and trains, the samplers while they work.

Whose turn it is follows from what is asked: anything of the learner is its turn, waiting for samplers is theirs. The
loop and the source notice nothing: what they hold are the roles of `rlhf.interfaces`, which change turns before they do
what they are asked. A change that fails, because a process died in it, leaves nobody's turn, and is made whole by the
next one. Knows neither tensors nor Ray."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from rlhf.interfaces import Handle, Learner, Published, Replacements, Result, Task, Workers
from rlhf.metrics import Metrics
from rlhf.sources import JudgeDesk

if TYPE_CHECKING:
    from rlhf.weights import Receipt


class OffloadingLearner(Learner, Protocol):
    """A learner that can give its GPUs up."""

    def offload(self) -> None:
        """All that it holds is in the host's memory until `reload`."""

    def reload(self) -> None:
        """Takes the GPUs back, bit for bit. Does nothing for one that holds them, or whose ranks died: `load`."""


@runtime_checkable
class SleepingWorkers(Workers, Protocol):
    """Workers that can give their GPUs up."""

    def sleep(self) -> None:
        """Gives up what is in flight (each prompt comes back with WorkerLost, nobody is blamed), and sleeps."""

    def wake(self) -> None:
        """Begins to wake all; engines take the version that was published last, before they get work."""


class Turns:
    """Whose turn it is. It begins with the samplers', which are set up while the learner has given its GPUs up."""

    def __init__(self, learner: OffloadingLearner, samplers: Sequence[SleepingWorkers]) -> None:
        self._learner, self._samplers = learner, samplers
        self._whose: Literal["learner", "samplers"] | None = "samplers"

    def learner(self) -> None:
        """From here on the GPUs are the learner's."""
        if self._whose != "learner":
            self._whose = None
            for sampler in self._samplers:
                sampler.sleep()
            self._learner.reload()
            self._whose = "learner"

    def samplers(self) -> None:
        """From here on the GPUs are the samplers'."""
        if self._whose != "samplers":
            self._hand_over(self._samplers)
            self._whose = "samplers"

    def new_weights(self, rollouts: SleepingWorkers, published: Published) -> "list[Receipt]":
        """The samplers' turn, which begins with new weights for the engines."""
        if self._whose != "samplers":
            self._hand_over([sampler for sampler in self._samplers if sampler is not rollouts])
        receipts = rollouts.load(published)
        self._whose = "samplers"
        return receipts

    def _hand_over(self, woken: Sequence[SleepingWorkers]) -> None:
        """From the learner to the samplers, of which those that `load` wakes by itself are left asleep."""
        self._whose = None
        self._learner.offload()
        for sampler in woken:
            sampler.wake()


class TurnTakingLearner:
    """A `Learner` that takes its turn before it computes."""

    def __init__(self, learner: OffloadingLearner, turns: Turns) -> None:
        self._learner, self._turns = learner, turns

    @property
    def version(self) -> int:
        return self._learner.version

    def annotate(self, groups: Handle) -> Handle:
        self._turns.learner()
        return self._learner.annotate(groups)

    def prepare(self, groups: Handle) -> Handle:
        self._turns.learner()
        return self._learner.prepare(groups)

    def update(self, batch: Handle) -> Metrics:
        self._turns.learner()
        return self._learner.update(batch)

    def evaluate(self, groups: Handle) -> Metrics:
        self._turns.learner()
        return self._learner.evaluate(groups)

    def publish(self) -> Published:
        self._turns.learner()
        return self._learner.publish()

    def save(self, folder: Path) -> None:
        self._turns.learner()
        self._learner.save(folder)

    def load(self, folder: Path | None) -> None:
        self._turns.learner()
        self._learner.load(folder)

    def notice(self) -> bool:
        return self._learner.notice()

    def move(self, folder: Path) -> bool:
        self._turns.learner()
        return self._learner.move(folder)


class TurnTakingWorkers:
    """`Workers` that take their turn when somebody waits for them."""

    def __init__(self, workers: SleepingWorkers, turns: Turns) -> None:
        self._workers, self._turns = workers, turns
        self._awaited = False

    def submit(self, task: Task, worker: str | None) -> None:
        self._workers.submit(task, worker)

    def collect(self, timeout_s: float) -> list[Result]:
        self._awaited = True
        self._turns.samplers()
        return self._workers.collect(timeout_s)

    def free(self) -> list[str]:
        """Nobody between new weights and the first wait for answers: a checkpoint may come between, which is the
        learner's turn, and work that was begun would be given up."""
        return self._workers.free() if self._awaited else []

    def size(self) -> int:
        return self._workers.size()

    def holding(self) -> list[str]:
        return self._workers.holding()

    def replaced(self) -> Replacements:
        return self._workers.replaced()

    def load(self, published: Published) -> "list[Receipt]":
        self._awaited = False
        return self._turns.new_weights(self._workers, published)

    def fetch(self, handle: Handle) -> Any:
        return self._workers.fetch(handle)


def take_turns(
    learner: OffloadingLearner, rollouts: Workers, desks: Sequence[JudgeDesk]
) -> tuple[Learner, Workers, Sequence[JudgeDesk]]:
    """The same team, in which those workers that can sleep take turns with the learner; nothing new without any."""
    sleepers = [each for each in (rollouts, *(desk.workers for desk in desks)) if isinstance(each, SleepingWorkers)]
    if not sleepers:
        return learner, rollouts, desks
    turns = Turns(learner, sleepers)

    def wrapped(workers: Workers) -> Workers:
        return TurnTakingWorkers(workers, turns) if isinstance(workers, SleepingWorkers) else workers

    taking = [replace(desk, workers=wrapped(desk.workers)) for desk in desks]
    return TurnTakingLearner(learner, turns), wrapped(rollouts), taking
