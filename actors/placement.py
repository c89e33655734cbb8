"""Ray itself and the resources of the roles: start or join it, and wait, with a deadline, until everything fits."""

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray

from rlhf.cluster import Cluster, Role
from rlhf.errors import NoCapacity

POLL_S = 1.0
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
PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "RLHF_CACHE")


def roles_of(cluster: Cluster) -> Mapping[str, Role]:
    return {
        "trainer": cluster.trainer,
        "rollout": cluster.rollout,
        "reference": cluster.reference,
        "reward": cluster.reward,
        "buffer": cluster.buffer,
    }


def demand_of(roles: Mapping[str, Role]) -> dict[str, float]:
    """What the roles need together, by Ray's resource names."""
    demand: dict[str, float] = {}
    for role in roles.values():
        for name, amount in {"CPU": role.cpus, "GPU": role.gpus, **role.resources}.items():
            if amount:
                demand[name] = demand.get(name, 0.0) + amount * role.replicas
    return demand


def start(cluster: Cluster, roles: Mapping[str, Role]) -> bool:
    """Starts Ray here or joins a running cluster; true when it was started here and is ours to stop."""
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    if ray.is_initialized():
        return False
    if cluster.address != "local":
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        return False
    demand = demand_of(roles)
    ray.init(
        address="local",
        num_cpus=cluster.cpus or math.ceil(demand.get("CPU", 1.0)),
        object_store_memory=int(cluster.object_store_gib * GIB),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    return True


def wait_for_room(roles: Mapping[str, Role], timeout_s: float, progress: Callable[[str], None]) -> None:
    """Waits until the cluster's total resources cover the roles.

    Raises NoCapacity at the deadline with demand and supply by resource. Looks at totals, not at what others use now.
    """
    demand, began, told = demand_of(roles), time.monotonic(), 0.0
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


def options(cluster: Cluster, role: Role) -> dict[str, Any]:
    """The `.options(...)` of an actor of a role. Thread counts are set here because sums on a CPU depend on them."""
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {
        "num_cpus": role.cpus,
        "num_gpus": role.gpus,
        "resources": dict(role.resources),
        "runtime_env": {"env_vars": {**QUIET, **environment, "OMP_NUM_THREADS": str(cluster.threads_of(role))}},
    }
