"""Ray itself and the places of the roles: start or join it, ask, and wait, with a deadline, until all have a place."""

import logging
import math
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import ray_constants
from ray._raylet import Config  # type: ignore[attr-defined]  # its stubs lack it
from ray.actor import ActorHandle
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors.capacity import Asked, Node, in_words, missing, rank_order, report, total
from actors.joining import JOIN_S, REACH_S, join, reach
from actors.keeper import Keeper
from rlhf.chaos.points import ROLE_VARIABLE, RUN_VARIABLE
from rlhf.cluster import Cluster, Ranks, Role
from rlhf.errors import ActorDied, NoCapacity

POLL_S = 1.0
PROGRESS_S = 10.0
FIRST_TOLD_S = 5.0  # most find their place sooner
START_TIMEOUT_S = 300.0
GIB = 1 << 30

Seat = PlacementGroupSchedulingStrategy | NodeAffinitySchedulingStrategy

# Keeps libraries from calling out of closed networks and from waiting for an answer that never comes.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}
# Decided by the caller's environment, and needed by the actors in the same way.
PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "RLHF_CACHE", RUN_VARIABLE)


@contextmanager
def started(cluster: Cluster, roles: Mapping[str, Role]) -> Iterator[None]:
    """Ray, started here or joined where it runs. At the end one that was started here is gone, with all its processes;
    also when this process ends in any other way (actors/keeper.py)."""
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    if ray.is_initialized():
        yield
        return
    if cluster.address != "local":
        reach(cluster.address, REACH_S)
        with _joined(cluster.address):
            yield
        return
    demand = total([role.takes for role in roles.values() for _ in range(role.replicas)])
    settings = {
        "address": "local",
        "num_cpus": cluster.cpus or math.ceil(demand.get("CPU", 1.0)),
        "object_store_memory": int(cluster.object_store_gib * GIB),
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    _agree_on_a_token()
    if cluster.listen == "loopback":
        _stay_on_loopback()
    keeper = Keeper(settings, START_TIMEOUT_S)
    try:
        with _joined(keeper.address):
            yield
    finally:
        keeper.end()


def _agree_on_a_token() -> None:
    """Ray asks for a token wherever it listens. One that is started here gets a token of its own, from this process's
    environment, unless the user has decided on Ray's authentication."""
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
        Config.initialize("")  # Ray reads the mode once, when it is imported; it does the same in a local `ray.init`


def _stay_on_loopback() -> None:
    """Has a Ray that is started here, and all that it starts, listen at 127.0.0.1 only. `ray.init` alone cannot: it
    takes every loopback address for the machine's own, and most of its servers then listen at all addresses."""
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False  # read from the environment once, when Ray was imported


@contextmanager
def _joined(address: str) -> Iterator[None]:
    # Ray's own handler would end this process at a SIGTERM, with exit code 15 and nothing saved.
    before = signal.getsignal(signal.SIGTERM)
    join(address, JOIN_S)
    signal.signal(signal.SIGTERM, before)
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True, slots=True)
class Claim:
    """Actors that were asked for. `placed` says how many of them have a place by now."""

    name: str
    role: Role
    count: int
    placed: Callable[[], int]


def wait_for_places(
    claims: Sequence[Claim],
    timeout_s: float,
    progress: Callable[[str], None],
    stop: Callable[[], bool],
    *,
    can_grow: bool,
) -> None:
    """Waits until everything that was asked for has a place. It was asked for before, so that an autoscaler acts on it.

    Raises NoCapacity with what was asked, what there is, what is missing and what would fit: at the deadline, and at
    once in a cluster that cannot grow and is too small. Returns early when the run is asked to stop.
    """
    began, told = time.monotonic(), FIRST_TOLD_S
    while not stop():
        asked = [Asked(each.name, each.role, each.count, min(each.count, each.placed())) for each in claims]
        if all(each.placed == each.count for each in asked):
            return
        waited = time.monotonic() - began
        nodes = nodes_that_stay()
        if waited >= timeout_s or (missing(asked, nodes) and not can_grow):
            raise NoCapacity(
                f"after {waited:.0f} s the cluster cannot hold the run. {report(asked, nodes)}. Next: add nodes, or "
                "ask for less in the cluster file; then give the same command again"
            )
        if waited >= told:
            told = waited + PROGRESS_S
            progress(f"waiting for places ({waited:.0f} of {timeout_s:g} s). {report(asked, nodes)}")
        time.sleep(min(POLL_S, timeout_s - waited))


class RankPlaces:
    """The places of a role's ranks: one placement group of Ray, held while ranks die and are started again.

    Ray finds other places for those that were on a node that died; until then the group is not whole. For those whose
    node has announced its end, others are asked for while they are still held (`ask_elsewhere`)."""

    def __init__(self, role: Ranks) -> None:
        self._role = role
        self._group = self._reserve(role.replicas)
        self._before: list[str] = []
        self._elsewhere: PlacementGroup | None = None
        self._sought = 0  # places of `_elsewhere`

    def _reserve(self, count: int) -> PlacementGroup:
        return placement_group([self._role.takes] * count, strategy=self._role.placement.upper())

    def placed(self) -> int:
        """How many ranks have a place on a node that is up."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return sum(node in alive for node in self._nodes())

    def _nodes(self) -> list[str]:
        """The node of each bundle; empty until the group is whole."""
        return _nodes_of(self._group)

    def are_where_they_were(self) -> bool:
        """Whether each of the places that were handed out last is still on its node, and that node is up."""
        return sorted(self._nodes()) == sorted(self._before) and self.placed() == len(self._before)

    def leaving(self) -> list[str]:
        """The node of each place that is about to go."""
        draining = draining_nodes()
        return [node for node in self._nodes() if node in draining] if draining else []

    def ask_elsewhere(self) -> None:
        """Asks for as many places as are about to go, which Ray gives on nodes that stay; what is held is kept."""
        count = len(self.leaving())
        if self._elsewhere is not None:
            if self._sought == count and not draining_nodes() & set(_nodes_of(self._elsewhere)):
                return
            self.give_up_elsewhere()
        if count:
            self._elsewhere, self._sought = self._reserve(count), count

    def is_elsewhere(self) -> bool:
        """Whether there are other places for all that are about to go; true where none is."""
        if not (count := len(self.leaving())):
            return True
        found = [] if self._elsewhere is None else _nodes_of(self._elsewhere)
        return len(found) == count and all(is_alive(node) for node in found)

    def asked_elsewhere(self, name: str) -> Asked:
        """The same as was asked, for a report."""
        count = len(self.leaving())
        return Asked(name, self._role, count, count if self.is_elsewhere() else 0)

    def give_up_elsewhere(self) -> None:
        if self._elsewhere is not None:
            remove_placement_group(self._elsewhere)
            self._elsewhere = None

    def renew(self) -> None:
        """Before ranks are started again: gives up places on nodes that are about to go.

        Where all were, the others that were asked for take their place. Where some stay the group is asked for anew:
        Ray does not move single bundles, and what stays and what was found elsewhere make room for it."""
        if self._elsewhere is not None and self._sought == self._role.replicas:
            remove_placement_group(self._group)
            self._group, self._elsewhere = self._elsewhere, None
        elif self.leaving():
            self.release()
            self._group = self._reserve(self._role.replicas)
        else:
            self.give_up_elsewhere()

    def seats(self) -> list[PlacementGroupSchedulingStrategy]:
        """Where each rank goes. A rank whose node is still there stays on it; others go by the nodes' addresses.

        Raises ActorDied when a node has gone since the group was whole."""
        nodes = self._nodes()
        if not nodes:
            raise ActorDied("a node with places of the trainer's ranks has just gone")
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        order = rank_order(nodes, addresses, self._before)
        self._before = [nodes[bundle] for bundle in order]
        return [PlacementGroupSchedulingStrategy(self._group, bundle) for bundle in order]

    def seat(self, number: int) -> PlacementGroupSchedulingStrategy:
        """The place of this number, for an actor that shares it with a rank."""
        return PlacementGroupSchedulingStrategy(self._group, number)

    def release(self) -> None:
        self.give_up_elsewhere()
        remove_placement_group(self._group)


def _nodes_of(group: PlacementGroup) -> list[str]:
    """The node of each bundle; empty until the group is whole."""
    table = placement_group_table(group)
    found: Mapping[int, str] = table["bundles_to_node_id"]
    return [found[bundle] for bundle in sorted(found)] if table["state"] == "CREATED" else []


def has_place(actor: ActorHandle) -> bool:
    """Whether an actor has got what it asked for; it may still be starting, or have died since."""
    known = ray._private.state.state.actor_table(actor._actor_id.hex())
    return bool(known) and (known["State"] == "DEAD" or known["Address"]["Port"] != 0)


def went_with_its_node(actor: ActorHandle, node_id: str | None) -> bool:
    """Whether an actor that died did so with its node, or on its way to one that was dead; node_id, where it was."""
    if node_id is not None and not is_alive(node_id):
        return True
    known = ray._private.state.state.actor_table(actor._actor_id.hex())
    if not known:
        return False
    context = known["DeathCause"].actor_died_error_context
    return context.DESCRIPTOR.fields_by_name["reason"].enum_type.values_by_name["NODE_DIED"].number == context.reason


def beside_the_driver() -> NodeAffinitySchedulingStrategy:
    """The driver's node, where it can hold the actor at all; another one otherwise."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


def nodes_that_stay() -> list[Node]:
    """The nodes that are up and not about to go."""
    free, draining = ray._private.state.available_resources_per_node(), draining_nodes()
    return [
        Node(node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in draining
    ]


def draining_nodes() -> frozenset[str]:
    """The nodes that Ray was told will go: preempted, or let go by an autoscaler."""
    return frozenset(ray._private.state.state.get_draining_nodes())


def is_alive(node_id: str) -> bool:
    """Whether a node is up and stays."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return node_id in alive and node_id not in draining_nodes()


def supply() -> str:
    """What the cluster has, in words, by node."""
    nodes = nodes_that_stay()
    each = "; ".join(f"{node.name} {in_words(node.has)}" for node in nodes)
    return f"{len(nodes)} nodes ({each})"


def options(cluster: Cluster, name: str, role: Role) -> dict[str, Any]:
    """The `.options(...)` of an actor of the role of this name. Thread counts are set here because sums on a CPU depend
    on them."""
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment["OMP_NUM_THREADS"] = str(cluster.threads_of(role))
    environment[ROLE_VARIABLE] = name
    return {
        "num_cpus": role.takes.get("CPU", 0),
        "num_gpus": role.takes.get("GPU", 0),
        "resources": dict(role.resources),
        "runtime_env": {"env_vars": {**QUIET, **environment}},
    }
