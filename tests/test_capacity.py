"""What fits on which nodes, and which rank goes where: against the enumeration of all placements.

Not covered: what Ray makes of it (test_cluster_nodes.py).
"""

import itertools

import numpy as np
import pytest

from actors.capacity import Asked, Node, fitting, holds, missing, rank_order, report
from rlhf.cluster import Ranks, Role


def node(**has: float) -> Node:
    return Node("10.0.0.1", has, has)


def can_be_placed(asked: list[Asked], nodes: list[Node]) -> bool:
    """By trying every assignment."""
    pieces = [needs for each in asked for needs, _ in each.pieces()]
    for choice in itertools.product(range(len(nodes)), repeat=len(pieces)):
        used: list[dict[str, float]] = [{} for _ in nodes]
        for needs, where in zip(pieces, choice, strict=True):
            for name, amount in needs.items():
                used[where][name] = used[where].get(name, 0.0) + amount
        if all(holds(each.has, taken) for each, taken in zip(nodes, used, strict=True)):
            return True
    return False


def test_what_is_said_of_random_clusters_is_true() -> None:
    """`missing` speaks only where no assignment exists, and what `fitting` finds exists; both happen."""
    random = np.random.default_rng(3)
    seen = {"missing": 0, "fits": 0}
    for _ in range(200):
        nodes = [node(CPU=int(random.integers(1, 5)), GPU=int(random.integers(0, 3))) for _ in range(3)]
        asked = [
            Asked("trainer", Ranks(cpus=1, gpus=1, placement="strict_pack"), int(random.integers(1, 3)), 0),
            Asked("rollout", Role(cpus=int(random.integers(1, 5))), int(random.integers(1, 4)), 0),
        ]
        possible = can_be_placed(asked, nodes)
        if missing(asked, nodes):
            seen["missing"] += 1
            assert not possible
        found = fitting(asked, nodes)
        assert can_be_placed([Asked(a.name, a.role, found[a.name], 0) for a in asked if found[a.name]], nodes)
        if all(found[each.name] == each.count for each in asked):
            seen["fits"] += 1
            assert possible
    assert min(seen.values()) > 20, seen


@pytest.mark.parametrize(
    ("asked", "nodes", "said"),
    [
        ([Asked("rollout", Role(cpus=2), 3, 1)], [node(CPU=4)], "Missing: CPU: asked 6, there are 4"),
        ([Asked("rollout", Role(cpus=2), 3, 1)], [node(CPU=4)], "Without a place: 2 of 3 rollout"),
        ([Asked("rollout", Role(cpus=2), 3, 1)], [node(CPU=4)], "What would fit: 2 of 3 rollout"),
        ([Asked("rollout", Role(cpus=3), 1, 0)], [node(CPU=2)] * 2, "no single node holds one rollout (CPU: 3)"),
        (
            [Asked("trainer", Ranks(cpus=2, placement="strict_pack"), 2, 0)],
            [node(CPU=2)] * 2,
            "no single node holds all 2 of trainer (CPU: 4)",
        ),
        ([Asked("rollout", Role(cpus=1), 1, 0)], [Node("a", {"CPU": 1}, {"CPU": 0})], "if nothing else ran there"),
        ([Asked("rollout", Role(cpus=1), 2, 1)], [Node("a", {"CPU": 2}, {"CPU": 1})], "its processes are starting"),
        ([Asked("rollout", Role(cpus=2), 3, 0)], [node(CPU=3)] * 2, "no way was found to place all at once"),
        ([Asked("rollout", Role(cpus=1), 1, 0)], [], "There are 0 nodes: nothing. Missing: CPU: asked 1, there are 0"),
    ],
)
def test_the_report_says_what_stands_in_the_way(asked: list[Asked], nodes: list[Node], said: str) -> None:
    assert said in report(asked, nodes)


def test_what_ray_adds_to_a_node_is_not_shown() -> None:
    has = {"CPU": 2.0, "memory": 1e9, "object_store_memory": 1e9, "node:10.0.0.1": 1.0, "CPU_group_0_ab": 1.0}
    said = report([Asked("rollout", Role(cpus=3), 1, 0)], [Node("a", has, has)])
    assert "There is 1 node: CPU: 2." in said and "memory" not in said and "group" not in said


def test_ranks_stay_on_their_nodes_and_new_ones_are_in_the_order_of_addresses() -> None:
    names = {"a": "10.0.0.3", "b": "10.0.0.1", "c": "10.0.0.2"}
    first = rank_order(["a", "b", "a", "b"], names, [])
    assert [["a", "b", "a", "b"][bundle] for bundle in first] == ["b", "b", "a", "a"]
    for bundles in itertools.permutations(["a", "b", "a", "b"]):
        nodes = [bundles[bundle] for bundle in rank_order(bundles, names, [])]
        assert nodes == ["b", "b", "a", "a"], "however Ray orders the bundles"
        kept = [bundles[bundle] for bundle in rank_order(bundles, names, ["a", "b", "b", "a"])]
        assert kept == ["a", "b", "b", "a"], "as they were in the life before"
    for bundles in itertools.permutations(["a", "a", "c", "c"]):
        order = rank_order(bundles, names, ["b", "b", "a", "a"])
        assert sorted(order) == [0, 1, 2, 3] and [bundles[bundle] for bundle in order] == ["c", "c", "a", "a"]


def test_nothing_is_taken_by_a_role_that_asks_for_nothing() -> None:
    assert Role(cpus=0, resources={"spot": 0}).takes == {}
    with pytest.raises(ValueError, match="asks for nothing"):
        Ranks(cpus=0, resources={"spot": 0})
