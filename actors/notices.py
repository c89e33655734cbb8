"""Nodes of the trainer's ranks that announce their end (`ray drain-node`, a spot notice), and other places for them.

The run is told twice at most: at the notice, so that it saves at its next safe point, and when there are other places
for all that must go, so that it moves there. A run that finds none stays where it is until its nodes are gone."""

import time
from collections.abc import Callable, Mapping

from actors import placement
from actors.capacity import report
from actors.placement import RankPlaces

LOOK_EVERY_S = 1.0
PATIENCE_S = 5.0  # Ray gives a free place within one; a node that has yet to come is not waited for
POLL_S = 0.1  # between two looks at the table of places: Ray calls nobody when it has found one


class Notices:
    """What the nodes of some roles' ranks have announced. places, by the name of the role. Not thread safe."""

    def __init__(self, places: Mapping[str, RankPlaces], note: Callable[[str], None]) -> None:
        self._places, self._note = places, note
        self._looked, self._due = 0.0, False
        self._heeded: frozenset[str] = frozenset()  # nodes for which the run has saved

    def due(self) -> bool:
        """Whether the run is to come to a safe point, save, and ask `found_places`. Looks once in LOOK_EVERY_S."""
        now = time.monotonic()
        if now - self._looked >= LOOK_EVERY_S:
            self._due = self._look()
            self._looked = time.monotonic()
        return self._due

    def _look(self) -> bool:
        leaving = self._leaving()
        for places in self._places.values():
            places.ask_elsewhere()
        return bool(leaving) and (not leaving <= self._heeded or self._are_found())

    def found_places(self) -> bool:
        """Whether all that must go have other places; where they have not, says what is missing, and is due again when
        they have, or when another node announces its end."""
        leaving, deadline = self._leaving(), time.monotonic() + PATIENCE_S
        self._heeded, self._looked, self._due = leaving, time.monotonic(), False
        if not leaving:
            return False
        while not (found := self._are_found()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if not found:
            asked = [places.asked_elsewhere(name) for name, places in self._places.items() if places.leaving()]
            self._note(
                f"the node of {' and '.join(each.name for each in asked)} has announced its end, a checkpoint is "
                "saved, and there is no other place yet: the ranks stay until the node is gone, and move when there is "
                f"one. {report(asked, placement.nodes_that_stay())}"
            )
        return found

    def _leaving(self) -> frozenset[str]:
        return frozenset(node for places in self._places.values() for node in places.leaving())

    def _are_found(self) -> bool:
        return all(places.is_elsewhere() for places in self._places.values())
