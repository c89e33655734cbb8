"""Where to run: the cluster file. How many of each role, and what each of them needs.

Results do not depend on it. Pydantic, unknown keys refused; imports neither torch nor ray.
"""

import math
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from rlhf.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from rlhf.config_section import Seconds, Threads

SharingRole = Literal["trainer", "critic", "rollout", "reference"]
LEARNING = frozenset({"trainer", "critic"})  # those of them that train; the others sample and judge


class Role(Section):
    """The actors of one role. CPUs are logical: Ray counts them, and they set the thread count of the actor."""

    replicas: PositiveInt = Field(default=1, description="actors of this role")
    min_replicas: PositiveInt | None = Field(
        default=None,
        description="the run starts with so many and takes the others, up to `replicas`, as they find room; null: all. "
        "For rollout, reference and reward",
    )
    idle_release_s: Seconds | None = Field(
        default=None,
        description="with `min_replicas`: those beyond it are let go after so long without work, so that an autoscaler "
        "can take their nodes, and asked for again when there is work; null: never",
    )
    cpus: NonNegativeFloat = Field(default=1.0, description="CPUs of each")
    gpus: NonNegativeFloat = Field(default=0.0, description="GPUs of each")
    resources: dict[str, NonNegativeFloat] = Field(default_factory=dict, description="custom Ray resources of each")

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if self.min_replicas is not None and self.min_replicas > self.replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is more than replicas={self.replicas}")
        if self.idle_release_s is not None and self.min_replicas is None:
            raise ValueError(f"idle_release_s={self.idle_release_s:g} would do nothing without min_replicas")
        if self.gpus > 1 and self.gpus % 1:
            raise ValueError(f"gpus={self.gpus:g}: Ray lends a share of one GPU, or whole ones; expected these")
        return self

    @property
    def needed(self) -> int:
        """Without so many the run does not start."""
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def processes(self) -> int:
        """Processes that compute in each actor."""
        return 1

    @property
    def takes(self) -> dict[str, float]:
        """What an actor takes, by Ray's resource names, all of it on one node; what it takes none of is left out."""
        each = {"CPU": self.cpus * self.processes, "GPU": self.gpus * self.processes, **self.resources}
        return {name: amount for name, amount in each.items() if amount}


class Ranks(Role):
    """A role whose actors compute together: they are placed together, and keep their places until the run ends."""

    placement: Literal["pack", "spread", "strict_pack"] = Field(
        default="pack",
        description="where Ray puts the ranks: `pack` on as few nodes as it can, `spread` on as many, `strict_pack` on "
        "one, or the run does not start",
    )

    @model_validator(mode="after")
    def _takes_something(self) -> Self:
        if not (self.cpus or self.gpus or any(self.resources.values())):
            raise ValueError("asks for nothing, so that no place can be held for it; expected cpus, gpus or resources")
        return self


class Engines(Role):
    """Rollout engines. One with tensor parallelism is still one actor, on one node, with n times the CPUs and GPUs."""

    tensor_parallel: PositiveInt = Field(
        default=1,
        description="processes that hold a share of each layer and compute together, on one node; each has `cpus` and "
        "`gpus`, an engine so many times as much. For engine vllm",
    )

    @model_validator(mode="after")
    def _a_gpu_each(self) -> Self:
        if self.tensor_parallel > 1 and self.gpus not in (0, 1):
            raise ValueError(
                f"gpus={self.gpus:g} with tensor_parallel={self.tensor_parallel}: each of the processes of an engine "
                "has a GPU of its own; expected 1, or 0 without GPUs"
            )
        return self

    @property
    def processes(self) -> int:
        return self.tensor_parallel


class StoragePlace(Section):
    """Where a copy of the run directory is kept, so that the run outlives its machine."""

    address: str | None = Field(
        default=None,
        description="any fsspec address, such as s3://bucket/run, of this run alone: checkpoints and copies of the "
        "buffer; an empty run directory is filled from it; null: off",
    )
    buffer_every: NonNegativeInt = Field(
        default=0, description="steps between uploads of the buffer; 0: only with checkpoints"
    )

    @model_validator(mode="after")
    def _goes_somewhere(self) -> Self:
        if self.address is None and self.buffer_every:
            raise ValueError(f"buffer_every={self.buffer_every} would do nothing without an address")
        return self


class Cluster(Section):
    """A whole cluster file."""

    address: str = Field(
        default="local", description="`local` starts Ray on this machine, `auto` joins the running one, or an address"
    )
    listen: Literal["loopback", "network"] = Field(
        default="loopback",
        description="with `local`: where the processes of a run listen: at 127.0.0.1 alone, or at every address of "
        "this machine. A Ray that is joined listens where it was started to",
    )
    cpus: PositiveInt | None = Field(
        default=None, description="with `local`: CPUs that Ray counts; null: the sum of the roles"
    )
    object_store_gib: PositiveFloat = Field(default=2.0, description="with `local`: memory of the object store")
    placement_timeout_s: Seconds = Field(
        default=120.0, description="longest wait for room in the cluster, at the start and when it has shrunk"
    )
    threads_per_role: Threads | None = Field(
        default=None,
        description="compute threads of each actor, and of each process of an engine with `tensor_parallel`; null: its "
        "CPUs, rounded up",
    )
    storage: StoragePlace = Field(default_factory=StoragePlace, description="a copy of the run elsewhere")
    trainer: Ranks = Field(default_factory=Ranks, description="ranks of the policy trainer")
    critic: Ranks = Field(default_factory=Ranks, description="ranks of the critic; none without one (PPO has one)")
    rollout: Engines = Field(default_factory=Engines, description="rollout engines")
    reference: Role = Field(default_factory=Role, description="reference models")
    reward: Role = Field(default_factory=lambda: Role(cpus=0.5), description="hosts of the reward function")
    buffer: Role = Field(default_factory=lambda: Role(cpus=0.5), description="the experience buffer; exactly one")

    colocation: list[list[SharingRole]] = Field(
        default_factory=list,
        description="groups of roles that take turns on the same GPUs, one actor of each role a GPU: trainer and "
        "critic while they train, rollout and reference while groups are sampled and judged. Each has `gpus: 1`",
    )

    @model_validator(mode="after")
    def _takes_turns(self) -> Self:
        named = [name for group in self.colocation for name in group]
        for name in named:
            role, place = self.roles[name], f"colocation: {name}"
            if named.count(name) > 1:
                raise ValueError(f"{place} is named {named.count(name)} times; expected once, in one group")
            if role.gpus != 1:
                raise ValueError(f"{place}.gpus={role.gpus:g}; expected 1: who takes turns has a whole GPU in its turn")
            if role.min_replicas is not None:
                raise ValueError(
                    f"{place}.min_replicas={role.min_replicas}: roles that share GPUs are placed together, and keep "
                    "their places until the run ends; leave it out"
                )
        if "rollout" in named and self.rollout.tensor_parallel > 1:
            raise ValueError(
                f"rollout.tensor_parallel={self.rollout.tensor_parallel}: an engine of a colocation group has one GPU; "
                "expected 1"
            )
        for group in self.colocation:
            if not set(group) & LEARNING or set(group) <= LEARNING:
                raise ValueError(
                    f"colocation: {group} has nobody to take turns with; expected trainer or critic, and rollout or "
                    "reference"
                )
        return self

    @model_validator(mode="after")
    def _listens_where_it_starts(self) -> Self:
        if self.listen == "network" and self.address != "local":
            raise ValueError(
                f"listen=network would do nothing: with address={self.address} Ray listens where it was started to; "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _fixed_in_number(self) -> Self:
        if self.buffer.replicas != 1:
            raise ValueError(f"buffer.replicas must be 1, the ledger has one writer; found {self.buffer.replicas}")
        for name, role in (("trainer", self.trainer), ("critic", self.critic), ("buffer", self.buffer)):
            if role.min_replicas is not None:
                raise ValueError(f"{name}.min_replicas: the {name} does not grow or shrink during a run; leave it out")
        return self

    @property
    def roles(self) -> Mapping[str, Role]:
        """All roles by name, those that a run does not have, too."""
        return {
            "trainer": self.trainer,
            "critic": self.critic,
            "rollout": self.rollout,
            "reference": self.reference,
            "reward": self.reward,
            "buffer": self.buffer,
        }

    def threads_of(self, role: Role) -> int:
        """Compute threads of each process of an actor of this role, the same in one process and on Ray."""
        return self.threads_per_role or max(1, math.ceil(role.cpus))


def this_machine(cores: int) -> Cluster:
    """What a run without a cluster file gets: every model may use all cores, since most of the time one of them works.

    cores, those of the machine. The CPUs are logical, so that they add up to more than there are.
    """
    return Cluster(
        trainer=Ranks(cpus=cores), critic=Ranks(cpus=cores), rollout=Engines(cpus=cores), reference=Role(cpus=cores)
    )
