"""How often parts of a team are built again after a death, what is said of it, and when it is too often."""

from collections.abc import Callable

from rlhf.errors import ActorDied, RunFailed
from rlhf.team import Part

# What the death of an actor leads to, by the part that is built again: the metric that counts it and what is said.
FAULTS: dict[Part, str] = {"team": "restarts", "trainer": "trainer_restarts", "buffer": "buffer_restarts"}
CONSEQUENCES: dict[Part, str] = {
    "team": "The team is built again; nothing that was stored is generated again",
    "trainer": "The trainer alone is built again; steps since its checkpoint are trained again from the buffer",
    "buffer": "Another buffer actor opens the same file, and the call is made again",
}


class Restarts:
    """How often a part of the team, or all of it, was built again because an actor died. `limit` bounds those in a row
    without a new step."""

    def __init__(self, limit: int, note: Callable[[str], None]) -> None:
        self._total: dict[Part, int] = dict.fromkeys(CONSEQUENCES, 0)
        self._note, self._limit, self._in_a_row, self._furthest = note, limit, 0, -1
        self._moves = 0

    def read(self) -> dict[str, float]:
        """faults/* of the parts."""
        restarts = {f"faults/{name}": self._total[part] for part, name in FAULTS.items()}
        return {**restarts, "faults/trainer_moves": self._moves}

    def moved(self, step: int) -> None:
        """The trainer has left nodes that had announced their end: nothing died, so nothing is counted against it."""
        self._moves += 1
        self._note(
            f"the trainer has moved to nodes that stay, and goes on at step {step}; nothing is trained or generated "
            "again"
        )

    def step_done(self, step: int) -> None:
        """A step that was done before and is replayed is no progress."""
        if step > self._furthest:
            self._furthest, self._in_a_row = step, 0

    def count(self, part: Part, died: ActorDied) -> None:
        """Says what follows. Raises RunFailed when there were too many."""
        self._total[part] += 1
        self._in_a_row += 1
        if self._in_a_row > self._limit:
            raise RunFailed(
                f"an actor died {self._in_a_row} times in a row without a new step; the last: {died}"
            ) from died
        self._note(f"{died}. {CONSEQUENCES[part]}")
