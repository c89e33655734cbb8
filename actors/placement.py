"""Ray itself and the resources of the roles: start or join it, and wait, with a deadline, until everything fits."""

import logging
import math
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray._raylet import Config  # type: ignore[attr-defined]  # its stubs lack it
from ray.actor import ActorHandle

from actors.keeper import Keeper
from rlhf.chaos.points import ROLE_VARIABLE, RUN_VARIABLE
from rlhf.cluster import Cluster, Role
from rlhf.errors import NoCapacity

POLL_S = 1.0
START_TIMEOUT_S = 300.0
GIB = 1 << 30

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


def roles_of(cluster: Cluster) -> Mapping[str, Role]:
    return {
        "trainer": cluster.trainer,
        "rollout": cluster.rollout,
        "reference": cluster.reference,
        "reward": cluster.reward,
        "buffer": cluster.buffer,
    }


def demand_of(counts: Iterable[tuple[Role, int]]) -> dict[str, float]:
    """What so many actors of each role need together, by Ray's resource names."""
    demand: dict[str, float] = {}
    for role, count in counts:
        for name, amount in _takes(role).items():
            demand[name] = demand.get(name, 0.0) + amount * count
    return demand


@contextmanager
def started(cluster: Cluster, roles: Mapping[str, Role]) -> Iterator[None]:
    """Ray, started here or joined where it runs. At the end one that was started here is gone, with all its processes;
    also when this process ends in any other way (actors/keeper.py)."""
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    if ray.is_initialized():
        yield
        return
    if cluster.address != "local":
        with _joined(cluster.address):
            yield
        return
    demand = demand_of((role, role.replicas) for role in roles.values())
    settings = {
        "address": "local",
        "num_cpus": cluster.cpus or math.ceil(demand.get("CPU", 1.0)),
        "object_store_memory": int(cluster.object_store_gib * GIB),
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    _agree_on_a_token()
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


@contextmanager
def _joined(address: str) -> Iterator[None]:
    # Ray's own handler would end this process at a SIGTERM, with exit code 15 and nothing saved.
    before = signal.getsignal(signal.SIGTERM)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    signal.signal(signal.SIGTERM, before)
    try:
        yield
    finally:
        ray.shutdown()


def wait_for_room(roles: Mapping[str, Role], timeout_s: float, progress: Callable[[str], None]) -> None:
    """Waits until the cluster's total resources cover what the roles need to start.

    Raises NoCapacity at the deadline with demand and supply by resource. Looks at totals, not at what others use now.
    """
    demand = demand_of((role, role.needed) for role in roles.values())
    began, told = time.monotonic(), 0.0
    while True:
        supply = ray.cluster_resources()
        missing = {name: need for name, need in demand.items() if supply.get(name, 0.0) < need}
        if not missing:
            return
        lines = ", ".join(
            f"{name}: asked {need:g}, there are {supply.get(name, 0.0):g}" for name, need in missing.items()
        )
        waited = time.monotonic() - began
        if waited >= timeout_s:
            raise NoCapacity(f"after {waited:.0f} s the cluster still cannot hold the run. {lines}")
        if waited >= told:
            progress(f"waiting for resources ({waited:.0f} of {timeout_s:g} s): {lines}")
            told = waited + 10.0
        time.sleep(min(POLL_S, timeout_s - waited))


def draining_nodes() -> frozenset[str]:
    """The nodes that Ray was told will go: preempted, or let go by an autoscaler."""
    return frozenset(ray._private.state.state.get_draining_nodes())


def is_alive(node_id: str) -> bool:
    """Whether a node is up and stays."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return node_id in alive and node_id not in draining_nodes()


def has_a_process(actor: ActorHandle) -> bool:
    """Whether an actor has found room and its constructor has begun, or was."""
    return bool(ray._private.state.actors(actor._actor_id.hex()).get("Pid"))


def supply() -> str:
    """What the cluster has, by resource, in words."""
    return ", ".join(
        f"{name}: {amount:g}" for name, amount in sorted(ray.cluster_resources().items()) if ":" not in name
    )


def asked_by(role: Role) -> str:
    """What an actor of a role takes, in words."""
    return ", ".join(f"{name}: {amount:g}" for name, amount in _takes(role).items()) or "nothing"


def _takes(role: Role) -> dict[str, float]:
    return {name: amount for name, amount in {"CPU": role.cpus, "GPU": role.gpus, **role.resources}.items() if amount}


def options(cluster: Cluster, role: Role) -> dict[str, Any]:
    """The `.options(...)` of an actor of a role. Thread counts are set here because sums on a CPU depend on them."""
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment["OMP_NUM_THREADS"] = str(cluster.threads_of(role))
    environment[ROLE_VARIABLE] = next(name for name, other in roles_of(cluster).items() if other is role)
    return {
        "num_cpus": role.cpus,
        "num_gpus": role.gpus,
        "resources": dict(role.resources),
        "runtime_env": {"env_vars": {**QUIET, **environment}},
    }
