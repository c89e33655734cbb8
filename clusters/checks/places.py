"""Whether the machines of a file can hold the roles of a cluster file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from clusters.checks.documents import Fault
from rlhf.cluster import Cluster
from rlhf.colocation import places_of


@dataclass(frozen=True, slots=True)
class Kind:
    """Nodes that are alike: what each has by Ray's resource names, and how many there can be."""

    name: str
    resources: Mapping[str, float]
    most: int


def missing_room(cluster: Cluster, kinds: Sequence[Kind]) -> Iterator[Fault]:
    """Roles that cannot be placed even when there are as many nodes as there can be; fields are the cluster file's.

    A first fit, the largest actors first: it may miss a placement that exists only where nodes are all but full.
    """
    free = [dict(kind.resources) for kind in kinds for _ in range(kind.most)]
    known = sorted({name for kind in kinds for name in kind.resources} - {"CPU", "GPU"})
    unknown = False
    places = places_of(cluster, cluster.roles)
    for name, role in places.items():
        for tag in role.takes.keys() - {"CPU", "GPU", *known}:
            unknown = True
            yield Fault(f"{name}.resources", f"asks for '{tag}', which no node has; there are: {', '.join(known)}")
    if unknown:
        return
    for name, role in sorted(places.items(), key=lambda place: -place[1].takes.get("GPU", 0.0)):
        placed = 0
        while placed < role.replicas and _place(role.takes, free):
            placed += 1
        if placed < role.replicas:
            asked = ", ".join(f"{resource}: {amount:g}" for resource, amount in role.takes.items())
            yield Fault(
                f"{name}.replicas",
                f"{placed} of {role.replicas} find a place ({asked} each) on {_nodes(kinds)}, less what others take",
            )


def _place(actor: Mapping[str, float], free: Sequence[dict[str, float]]) -> bool:
    for node in free:
        if all(node.get(name, 0.0) >= amount - 1e-9 for name, amount in actor.items()):
            for name, amount in actor.items():
                node[name] -= amount
            return True
    return False


def _nodes(kinds: Sequence[Kind]) -> str:
    return "; ".join(
        f"{kind.most} {kind.name} with " + ", ".join(f"{name}: {amount:g}" for name, amount in kind.resources.items())
        for kind in kinds
    )
