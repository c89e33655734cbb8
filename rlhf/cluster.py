"""Where to run: the cluster file. How many of each role, and what each of them needs.

Results do not depend on it. Pydantic, unknown keys refused; imports neither torch nor ray.
"""

import math
from typing import Annotated, Self

from pydantic import Field, model_validator

from rlhf.config import NonNegativeFloat, PositiveFloat, PositiveInt, Section


class Role(Section):
    """The actors of one role. CPUs are logical: Ray counts them, and they set the thread count of the actor."""

    replicas: PositiveInt = Field(default=1, description="actors of this role")
    cpus: NonNegativeFloat = Field(default=1.0, description="CPUs of each")
    gpus: NonNegativeFloat = Field(default=0.0, description="GPUs of each")
    resources: dict[str, float] = Field(default_factory=dict, description="custom Ray resources of each")


class Cluster(Section):
    """A whole cluster file."""

    address: str = Field(
        default="local", description="`local` starts Ray on this machine, `auto` joins the running one, or an address"
    )
    cpus: PositiveInt | None = Field(
        default=None, description="with `local`: CPUs that Ray counts; null: the sum of the roles"
    )
    object_store_gib: PositiveFloat = Field(default=2.0, description="with `local`: memory of the object store")
    placement_timeout_s: PositiveFloat = Field(default=120.0, description="longest wait for the roles' resources")
    threads_per_role: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="compute threads of each actor; null: its CPUs, rounded up"
    )
    trainer: Role = Field(default_factory=Role, description="ranks of the policy trainer")
    rollout: Role = Field(default_factory=Role, description="rollout engines")
    reference: Role = Field(default_factory=Role, description="reference models")
    reward: Role = Field(default_factory=lambda: Role(cpus=0.5), description="hosts of the reward function")
    buffer: Role = Field(default_factory=lambda: Role(cpus=0.5), description="the experience buffer; exactly one")

    @model_validator(mode="after")
    def _one_ledger(self) -> Self:
        if self.buffer.replicas != 1:
            raise ValueError(f"buffer.replicas must be 1, the ledger has one writer; found {self.buffer.replicas}")
        return self

    def threads_of(self, role: Role) -> int:
        """Compute threads of an actor of this role, the same in one process and on Ray."""
        return self.threads_per_role or max(1, math.ceil(role.cpus))
