"""What is asked of Ray when nodes of ranks announce their end, and when the run is told: over a stand-in for Ray's
placement groups. Real nodes: tests/test_cluster_nodes.py (soak)."""

from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("ray")
from actors import notices, placement
from actors.notices import Notices
from actors.placement import RankPlaces
from rlhf.cluster import Ranks


class Rooms:
    """Gives each placement group that is asked for the nodes that a test names next; None: it waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.draining: set[str] = set()
        self.given: list[list[str] | None] = []
        self.groups: dict[int, list[str] | None] = {}
        self.asked: list[int] = []
        monkeypatch.setattr(placement, "placement_group", self._ask)
        monkeypatch.setattr(placement, "remove_placement_group", self.groups.pop)
        monkeypatch.setattr(placement, "_nodes_of", lambda group: self.groups[group] or [])
        monkeypatch.setattr(placement, "draining_nodes", lambda: frozenset(self.draining))
        monkeypatch.setattr(placement, "is_alive", lambda node: node not in self.draining)
        monkeypatch.setattr(placement, "nodes_that_stay", list)
        monkeypatch.setattr(notices, "PATIENCE_S", 0.0)
        monkeypatch.setattr(notices, "LOOK_EVERY_S", 0.0)

    def _ask(self, bundles: Sequence[Any], strategy: str) -> int:
        self.asked.append(len(bundles))
        self.groups[len(self.asked)] = self.given.pop(0)
        return len(self.asked)


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> Rooms:
    return Rooms(monkeypatch)


def test_it_is_due_at_the_notice_and_again_when_there_is_another_place(rooms: Rooms) -> None:
    told: list[str] = []
    rooms.given = [["a"], None]
    places = RankPlaces(Ranks())
    watched = Notices({"trainer": places}, told.append)
    assert not watched.due() and rooms.asked == [1]
    rooms.draining = {"a"}
    assert watched.due() and rooms.asked == [1, 1], "asked for at once, while the old place is held"
    assert not watched.found_places() and "there is no other place yet" in told[0]
    assert not watched.due() and not watched.due() and len(told) == 1 and rooms.asked == [1, 1]
    rooms.groups[2] = ["b"]
    assert watched.due() and watched.found_places()
    places.renew()
    assert rooms.groups == {2: ["b"]} and places.leaving() == []
    assert not watched.due() and not watched.found_places()


def test_the_place_that_was_found_may_go_too(rooms: Rooms) -> None:
    rooms.given = [["a"], ["b"], None]
    places = RankPlaces(Ranks())
    watched = Notices({"trainer": places}, print)
    rooms.draining = {"a"}
    assert watched.due()
    rooms.draining = {"a", "b"}
    assert watched.due() and not watched.found_places()
    assert rooms.groups == {1: ["a"], 3: None}, "another one is asked for, the one that goes is given back"


def test_of_two_ranks_the_one_that_must_go_asks_for_a_place_and_both_are_placed_again(rooms: Rooms) -> None:
    rooms.given = [["a", "b"], ["c"], ["a", "c"]]
    places = RankPlaces(Ranks(replicas=2))
    rooms.draining = {"b"}
    watched = Notices({"trainer": places}, print)
    assert watched.due() and watched.found_places() and rooms.asked == [2, 1]
    places.renew()
    assert rooms.groups == {3: ["a", "c"]} and rooms.asked == [2, 1, 2]


def test_policy_and_critic_move_together_or_not_at_all(rooms: Rooms) -> None:
    """Both stand on the node that goes; there is a place for one of them. One whose node stays asks for nothing."""
    rooms.given = [["a"], ["a"], ["x"], ["b"], None]
    trainer, critic, apart = (RankPlaces(Ranks()) for _ in range(3))
    watched = Notices({"trainer": trainer, "critic": critic, "other": apart}, print)
    rooms.draining = {"a"}
    assert watched.due() and not watched.found_places()
    rooms.groups[5] = ["b"]
    assert watched.due() and watched.found_places() and len(rooms.asked) == 5


def test_a_node_that_died_meanwhile_leaves_nothing_asked_for(rooms: Rooms) -> None:
    """Of two ranks: Ray itself finds another place for the one whose node is gone."""
    rooms.given = [["a", "b"], None]
    places = RankPlaces(Ranks(replicas=2))
    watched = Notices({"trainer": places}, print)
    rooms.draining = {"b"}
    assert watched.due()
    rooms.draining, rooms.groups[1] = set(), ["a", "c"]
    assert not watched.due() and rooms.groups == {1: ["a", "c"]}
    places.renew()
    places.release()
    assert rooms.groups == {}
