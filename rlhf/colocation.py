"""Colocation groups: which roles of a run share their GPUs, and whether they take turns on them.

The learning roles have the GPUs while a step is annotated and trained, the sampling ones while groups are sampled and
judged. Imports neither torch nor ray."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rlhf.cluster import LEARNING, Cluster, Ranks, Role

GRAIN = 1e-4  # Ray counts resources in ten-thousandths
# The one under which DeepSpeed (0.19.8) moves what a rank holds off its GPU with torch's AdamW, whatever the precision.
OFFLOADING_STAGE = 2


@dataclass(frozen=True, slots=True)
class SharedGpus:
    """A group of roles on the same GPUs. `roles` are those of it that the run has, as the cluster file gives them."""

    roles: Mapping[str, Role]

    @property
    def name(self) -> str:
        return " + ".join(self.roles)

    @property
    def takes_turns(self) -> bool:
        """Whether both a learning and a sampling role are there."""
        return len({name in LEARNING for name in self.roles}) == 2

    @property
    def bundles(self) -> Ranks:
        """The places of the group: one a GPU, with all that an actor of each role takes."""
        members = list(self.roles.values())
        placement = next((role.placement for role in members if isinstance(role, Ranks)), Ranks().placement)
        resources: dict[str, float] = {}
        for role in members:
            for name, amount in role.resources.items():
                resources[name] = resources.get(name, 0.0) + amount
        return Ranks(
            replicas=max(role.replicas for role in members),
            cpus=sum(role.cpus for role in members),
            gpus=1,
            resources=resources,
            placement=placement,
        )

    def part_of(self, name: str) -> Role:
        """What an actor of a role takes of its place: Ray counts the GPU in equal parts, and each may use all of it."""
        part = math.floor(1 / len(self.roles) / GRAIN) * GRAIN
        return self.roles[name].model_copy(update={"gpus": part})


def shared_gpus(cluster: Cluster, roles: Mapping[str, Role]) -> Iterator[SharedGpus]:
    """The colocation groups of which the run has more than one role; roles, those of the run."""
    for group in cluster.colocation:
        present: dict[str, Role] = {name: roles[name] for name in group if name in roles}
        if len(present) > 1:
            yield SharedGpus(present)


def places_of(cluster: Cluster, roles: Mapping[str, Role]) -> dict[str, Role]:
    """What is asked of a cluster, by name: the places of each group, and the actors of each role in none."""
    found: dict[str, Role] = {}
    grouped: set[str] = set()
    for shared in shared_gpus(cluster, roles):
        found[shared.name] = shared.bundles
        grouped |= shared.roles.keys()
    return found | {name: role for name, role in roles.items() if name not in grouped}


def turn_takers(cluster: Cluster, roles: Mapping[str, Role]) -> frozenset[str]:
    """The roles of the run that take turns on their GPUs."""
    return frozenset(name for shared in shared_gpus(cluster, roles) if shared.takes_turns for name in shared.roles)


def no_offload(stage: int) -> str:
    """Why DeepSpeed cannot give a GPU up under this stage of ZeRO, and what to do."""
    return (
        f"learner.zero_stage={stage}: DeepSpeed moves what a rank holds off its GPU only under ZeRO 2, and a trainer "
        "that takes turns (colocation of the cluster file) has to; expected learner.zero_stage=2, "
        "learner.engine=torch, or a cluster file without colocation"
    )


def no_sleep(where: str) -> str:
    """Why vLLM cannot give a GPU up there, and what to do."""
    return (
        f"generation.engine=vllm: {where}: vLLM cannot sleep without a GPU, and an engine that takes turns (colocation "
        "of the cluster file) has to; expected a machine with GPUs, generation.engine=transformers, or a cluster file "
        "without colocation"
    )
