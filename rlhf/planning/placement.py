"""Who stands where: the roles that a run has, and what each of their actors takes from the cluster."""

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf.cluster import Cluster, Ranks, Role
from rlhf.colocation import shared_gpus
from rlhf.config import PpoConfig, RunConfig
from rlhf.passes import needs_reference


@dataclass(frozen=True, slots=True)
class Placed:
    """A role of the run. needed, the actors without which it does not start; takes, of each, by Ray's resource names;
    threads, of each of its processes; together, how Ray places actors that compute together (pack, spread,
    strict_pack), None where each is by itself; shares_with, the roles on the same GPUs (colocation of the cluster
    file)."""

    role: str
    replicas: int
    needed: int
    takes: Mapping[str, float]
    threads: int
    processes: int
    together: str | None
    shares_with: tuple[str, ...]
    settings: Role


def placed_roles(config: RunConfig, cluster: Cluster) -> tuple[Placed, ...]:
    """The roles that are started: no critic but for PPO, no rollout for a run on data, no reference where nothing
    compares with it or LoRA has it, no reward where there is none."""
    named: dict[str, Role] = {"trainer": cluster.trainer}
    if isinstance(config.algorithm, PpoConfig):
        named["critic"] = cluster.critic
    if config.records == "prompts":
        named["rollout"] = cluster.rollout
    if needs_reference(config) and config.model.lora is None:
        named["reference"] = cluster.reference
    if config.reward is not None:
        named["reward"] = cluster.reward
    named["buffer"] = cluster.buffer
    groups = {name: tuple(shared.roles) for shared in shared_gpus(cluster, named) for name in shared.roles}
    return tuple(
        Placed(
            role=name,
            replicas=role.replicas,
            needed=role.needed,
            takes=role.takes,
            threads=cluster.threads_of(role),
            processes=role.processes,
            together=role.placement if isinstance(role, Ranks) else None,
            shares_with=tuple(other for other in groups.get(name, ()) if other != name),
            settings=role,
        )
        for name, role in named.items()
    )


def demand_of(roles: tuple[Placed, ...], *, least: bool) -> dict[str, float]:
    """What all actors take together, or (least) those without which the run does not start. Roles that share GPUs are
    counted with as many places as the largest of them has actors, each with one GPU and what one of each role takes."""
    demand: dict[str, float] = {}
    groups = {placed.role: frozenset({placed.role, *placed.shares_with}) for placed in roles}
    counts = {placed.role: placed.needed if least else placed.replicas for placed in roles}
    for placed in roles:
        group = groups[placed.role]
        count = max(counts[name] for name in group)
        for name, amount in placed.takes.items():
            part = amount / len(group) if name == "GPU" else amount  # a GPU of the group is counted once
            demand[name] = demand.get(name, 0.0) + part * count
    return demand
