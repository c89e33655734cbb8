"""What of a plan cannot be held, in words: by the resources of a cluster file, by a GPU, by this machine's memory.

Of a cluster that is joined (`address` other than local) nothing is known but what the file asks of it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlhf.cluster import Cluster
from rlhf.planning.devices import Device
from rlhf.planning.placement import Placed, demand_of

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Peak:
    """One actor's peaks in bytes."""

    placed: Placed
    device: float
    host: float


def problems_of(
    cluster: Cluster, peaks: Sequence[Peak], object_store: float, machine_memory: float, gpu: Device | None
) -> list[str]:
    """One line a thing that does not fit, with what was asked, what there is and what would help; empty: it fits."""
    local = cluster.address == "local"
    found = list(_resources(cluster, tuple(peak.placed for peak in peaks))) if local else []
    if gpu is not None and gpu.memory is not None:
        found += _gpus(peaks, gpu.memory, gpu.name)
    if local and object_store > cluster.object_store_gib * GIB:
        found.append(
            f"object store: two versions of the published weights take {_gib(object_store)}, object_store_gib is "
            f"{cluster.object_store_gib:g}; raise it"
        )
    if local and gpu is None:
        found += _machine(peaks, machine_memory)
    return found


def _resources(cluster: Cluster, roles: tuple[Placed, ...]) -> Iterator[str]:
    """A Ray that is started here has the CPUs of `cpus`, or as many as the roles ask for, and no custom resource."""
    demand = demand_of(roles, least=True)
    if cluster.cpus is not None and demand.get("CPU", 0.0) > cluster.cpus:
        asked = ", ".join(f"{p.role} {p.needed} x {p.takes['CPU']:g}" for p in roles if "CPU" in p.takes)
        yield (
            f"CPU: asked {demand['CPU']:g} ({asked}), cpus of the cluster file is {cluster.cpus}; raise it, or "
            "give the roles less (they are logical)"
        )
    for name, amount in demand.items():
        if name not in ("CPU", "GPU"):
            yield (
                f"{name}: asked {amount:g}, a Ray that is started here (address: local) has no custom resources; "
                "join a cluster that has them, or leave them out"
            )


def _gpus(peaks: Sequence[Peak], memory: float, name: str) -> Iterator[str]:
    """Whole GPUs hold one actor each; actors with parts of one stand together on as few as their parts allow."""
    for peak in peaks:
        if peak.placed.settings.gpus and peak.device > memory:
            remedy = (
                "more ranks with ZeRO 2 or 3, a smaller learner.tokens_per_microbatch, model.gradient_checkpointing or "
                "model.lora"
            )
            if peak.placed.role == "rollout":
                remedy = "a larger rollout.tensor_parallel, or a smaller model"
            yield f"{peak.placed.role}: {_gib(peak.device)} on the GPU, a {name} has {_gib(memory)}; {remedy}"
    parts = [peak for peak in peaks if 0 < peak.placed.settings.gpus < 1]
    count = math.ceil(sum(peak.placed.settings.gpus * peak.placed.replicas for peak in parts) - 1e-9)
    together = sum(peak.device * peak.placed.replicas for peak in parts)
    if count and together > count * memory and all(peak.device <= memory for peak in parts):
        listed = ", ".join(f"{p.placed.role} {p.placed.replicas} x {_gib(p.device)}" for p in parts)
        yield (
            f"shared GPUs: {_gib(together)} ({listed}) on {count} x {name} with {_gib(memory)} each; a smaller "
            "generation.gpu_memory_fraction, or whole GPUs for the roles"
        )


def turn_problems(turns: Sequence[tuple[tuple[str, ...], float]], gpu: Device | None) -> list[str]:
    """Turns of a colocation group, each with its roles and their bytes on a GPU, that do not fit on one. A role that
    is too large by itself is named by `problems_of`."""
    if gpu is None or gpu.memory is None:
        return []
    return [
        f"colocation: {' and '.join(roles)} take {_gib(size)} of a GPU in their turn, a {gpu.name} has "
        f"{_gib(gpu.memory)}; a smaller generation.gpu_memory_fraction or learner.tokens_per_microbatch, or GPUs of "
        "their own for some of them"
        for roles, size in turns
        if len(roles) > 1 and size > gpu.memory
    ]


def _machine(peaks: Sequence[Peak], memory: float) -> Iterator[str]:
    together = sum(peak.host * peak.placed.replicas for peak in peaks)
    if together > memory:
        listed = ", ".join(f"{p.placed.role} {p.placed.replicas} x {_gib(p.host)}" for p in peaks)
        yield (
            f"memory: {_gib(together)} together ({listed}), this machine has {_gib(memory)}; fewer replicas, a smaller "
            "learner.tokens_per_microbatch, or more machines"
        )


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
