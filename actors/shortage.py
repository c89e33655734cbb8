"""A pool without workers: says so, and ends the wait at its deadline."""

import time
from collections.abc import Sequence

from actors import placement
from actors.capacity import in_words
from actors.worker import PoolSpec, Worker
from rlhf.errors import NoCapacity

NOTE_EVERY_S = 10.0


class Shortage:
    """How long no worker of a pool has been up, and how long too few have had a place."""

    def __init__(self, spec: PoolSpec) -> None:
        self._spec = spec
        self._last_up = self._last_placed = self._told = time.monotonic()
        self._counts = False

    def count_from_now(self) -> None:
        """Before that, the wait for the first places is another's (placement.wait_for_places)."""
        self._last_placed, self._counts = time.monotonic(), True

    def look(self, workers: Sequence[Worker], *, started: bool) -> str | None:
        """What is to be said at this moment, if anything. Raises NoCapacity when too few have a place for too long."""
        now = time.monotonic()
        placed = sum(worker.phase != "asked" for worker in workers)
        if placed >= (1 if started else self._spec.needed) or not self._counts:
            self._last_placed = now
        up = any(worker.joined or worker.phase == "without weights" for worker in workers if not worker.leaving)
        if up or not started:
            self._last_up = self._told = now
        if now - self._last_placed > self._spec.placement_timeout_s:
            raise NoCapacity(
                f"{self._spec.role}: too few workers have found a place for {now - self._last_placed:.0f} s; each "
                f"asks for {in_words(self._spec.resources.takes)}; the cluster has {placement.supply()}. The same "
                "command goes on with the run"
            )
        if now - self._told < NOTE_EVERY_S:
            return None
        self._told = now
        standing = ", ".join(f"{worker.name} {worker.phase}" for worker in workers)
        return f"no {self._spec.role} worker is up for {now - self._last_up:.0f} s, the run waits: {standing}"
