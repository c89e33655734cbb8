"""A pool whose workers take turns on their GPUs with the trainer: asleep, they hold nothing there.

Asleep are all that are set up. One that takes the place of a lost worker meanwhile is started, and waits with its
set-up, which needs the GPU, until it is the pool's turn."""

from typing import Any

from actors.losses import taken_back
from actors.pool import POLL_S, ActorWorkers
from actors.worker import Phase, Worker
from rlhf.interfaces import Published
from rlhf.weights import Receipt

AWAY: tuple[Phase, ...] = ("asked", "starting", "waiting its turn", "asleep")  # what holds no memory of a GPU


class SleepingActors(ActorWorkers):
    """`SleepingWorkers` on Ray. It begins asleep: `wake` comes before `wait_until_up`.

    The actor has `sleep`, and where the pool is given no weights `wake`; otherwise it wakes by its next `load`."""

    _has_turn = False  # before the thread of the pool starts

    def sleep(self) -> None:
        """Waits for those that are set up or take weights just now, and gives up what others are at."""
        with self._changed:
            self._has_turn = False
            for worker in self._workers:
                message = f"{worker.name} sleeps, and gave up what it was at"
                again, results = taken_back(worker, message, suspected=False)
                self._queue.extendleft(again)
                self._finished.extend(results)
        while True:
            with self._changed:
                self._raise_failure()
                if all(worker.phase in AWAY for worker in self._workers):
                    return
                self._changed.wait(POLL_S)
            self._tell_notes()

    def wake(self) -> None:
        with self._changed:
            self._take_turn()
            for worker in self._workers:
                if worker.phase != "asleep":
                    continue
                if not self._spec.takes_weights:
                    worker.enter("waking", worker.actor.wake.remote())
                elif self._published is not None:
                    self._begin_loading(worker)
                else:
                    worker.enter("without weights", worker.awaited)

    def load(self, published: Published) -> list[Receipt]:
        """Wakes those that sleep."""
        with self._changed:
            self._take_turn()
            for worker in self._workers:
                if worker.phase == "asleep":
                    worker.enter("without weights", worker.awaited)
        return super().load(published)

    def size(self) -> int:
        """With those that sleep: they work when it is their turn."""
        with self._changed:
            return self._count("ready", "asleep")

    def _take_turn(self) -> None:
        self._has_turn = True
        for worker in self._workers:
            if worker.phase == "waiting its turn":
                self._begin_setup(worker)

    # In the thread.

    def _turn(self) -> None:
        super()._turn()
        if not self._has_turn:
            for worker in self._workers:
                if worker.phase in ("without weights", "ready"):
                    worker.enter("falling asleep", worker.actor.sleep.remote())

    def _begin_setup(self, worker: Worker) -> None:
        if self._has_turn:
            super()._begin_setup(worker)
        else:
            worker.enter("waiting its turn", worker.awaited)

    def _advance(self, worker: Worker, answer: Any) -> None:
        if worker.phase == "falling asleep":
            worker.enter("asleep", worker.awaited)
        elif worker.phase == "waking":
            self._is_up(worker)
        else:
            super()._advance(worker, answer)

    def _dispatch(self) -> None:
        if self._has_turn:
            super()._dispatch()

    def _heed_drains(self) -> None:
        """Nobody leaves before the node goes: the places are the trainer's, too, and move with them."""
