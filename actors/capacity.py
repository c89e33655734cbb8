"""What actors take, what the nodes of a cluster have, and what of the one fits on the other. Knows no Ray."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rlhf.cluster import Ranks, Role

Amounts = Mapping[str, float]  # by Ray's resource names

# Ray counts resources in ten-thousandths.
GRAIN = 1e-4


@dataclass(frozen=True, slots=True)
class Asked:
    """So many actors of a role, and how many of them have a place."""

    name: str
    role: Role
    count: int
    placed: int

    @property
    def on_one_node(self) -> bool:
        return isinstance(self.role, Ranks) and self.role.placement == "strict_pack"

    def describe(self) -> str:
        together = f", placed together ({self.role.placement})" if isinstance(self.role, Ranks) else ""
        return f"{self.count} x {self.name} ({in_words(self.role.takes)}{together})"

    def pieces(self) -> Iterator[tuple[Amounts, int]]:
        """What must be on one node, and how many actors that is."""
        each = self.role.takes
        if self.on_one_node:
            yield {name: amount * self.count for name, amount in each.items()}, self.count
        else:
            yield from ((each, 1) for _ in range(self.count))


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is up and stays: what it has, and what of that nobody uses now."""

    name: str
    has: Amounts
    free: Amounts


def in_words(amounts: Amounts) -> str:
    """`CPU: 2, GPU: 1`; what Ray adds for each node by itself is left out."""
    shown = [f"{name}: {amount:g}" for name, amount in sorted(amounts.items()) if is_counted(name)]
    return ", ".join(shown) or "nothing"


def is_counted(name: str) -> bool:
    """Whether a resource is one that a cluster file may ask for by number: no node's own name, no bytes, no share of a
    placement group."""
    return ":" not in name and "_group_" not in name and name not in ("memory", "object_store_memory")


def total(amounts: Sequence[Amounts]) -> dict[str, float]:
    summed: dict[str, float] = {}
    for each in amounts:
        for name, amount in each.items():
            summed[name] = summed.get(name, 0.0) + amount
    return summed


def fitting(asked: Sequence[Asked], nodes: Sequence[Node]) -> dict[str, int]:
    """How many actors of each role fit on the nodes if nothing else ran there: largest first, each where it leaves the
    least. What it finds can be done; that it finds no place for all does not prove that there is none."""
    room = [dict(node.has) for node in nodes]
    found = {each.name: 0 for each in asked}
    pieces = [(each.name, needs, actors) for each in asked for needs, actors in each.pieces()]
    for name, needs, actors in sorted(pieces, key=lambda piece: (-len(piece[1]), -sum(piece[1].values()))):
        able = [left for left in room if holds(left, needs)]
        if not able:
            continue
        tightest = min(able, key=lambda left: sum(amount for key, amount in left.items() if is_counted(key)))
        for resource, amount in needs.items():
            tightest[resource] -= amount
        found[name] += actors
    return found


def holds(has: Amounts, needs: Amounts) -> bool:
    return all(has.get(name, 0.0) + GRAIN / 2 >= amount for name, amount in needs.items())


def missing(asked: Sequence[Asked], nodes: Sequence[Node]) -> list[str]:
    """Why the nodes cannot hold what was asked, whoever else uses them; nothing where there may be a way."""
    demand = total([needs for each in asked for needs, _ in each.pieces()])
    supply = total([node.has for node in nodes])
    lines = [
        f"{name}: asked {need:g}, there are {supply.get(name, 0.0):g}"
        for name, need in demand.items()
        if not holds(supply, {name: need})
    ]
    for each in asked:
        needs, actors = next(each.pieces())
        if not holds(supply, needs) or any(holds(node.has, needs) for node in nodes):
            continue
        whom = f"all {actors} of {each.name}" if actors > 1 else f"one {each.name}"
        largest = "; ".join(sorted({in_words({name: node.has.get(name, 0.0) for name in needs}) for node in nodes}))
        lines.append(f"no single node holds {whom} ({in_words(needs)}), though all together would; they have {largest}")
    return lines


def report(asked: Sequence[Asked], nodes: Sequence[Node]) -> str:
    """What was asked, what has no place, what there is, what is missing and what would fit, in sentences."""
    without = ", ".join(f"{each.count - each.placed} of {each.count} {each.name}" for each in asked if _waits(each))
    found = fitting(asked, nodes)
    lacking = missing(asked, nodes)
    if lacking:
        why = f"Missing: {'; '.join(lacking)}"
    elif _starting(asked, nodes):
        why = "There is room for what is left: its processes are starting"
    elif all(found[each.name] == each.count for each in asked):
        free = in_words(total([node.free for node in nodes]))
        why = f"All of it would fit on these nodes if nothing else ran there; free now is {free}"
    else:
        why = "Each of them has a node that could hold it, but no way was found to place all at once"
    fits = ", ".join(f"{found[each.name]} of {each.count} {each.name}" for each in asked)
    return (
        f"Asked: {', '.join(each.describe() for each in asked)}. Without a place: {without or 'none'}. "
        f"There {'is 1 node' if len(nodes) == 1 else f'are {len(nodes)} nodes'}: "
        f"{in_words(total([node.has for node in nodes]))}. {why}. What would fit: {fits}"
    )


def _starting(asked: Sequence[Asked], nodes: Sequence[Node]) -> bool:
    """Whether what has no place yet would fit into what nobody uses."""
    left = [replace(each, count=each.count - each.placed) for each in asked if _waits(each)]
    found = fitting(left, [replace(node, has=node.free) for node in nodes])
    return all(found[each.name] == each.count for each in left)


def _waits(asked: Asked) -> bool:
    return asked.placed < asked.count


def rank_order(bundles: Sequence[str], names: Mapping[str, str], before: Sequence[str]) -> list[int]:
    """The bundle of each rank, so that ranks stay where they were and new ones are in a fixed order.

    bundles, the node of each bundle; names, what nodes are sorted by; before, the node of each rank in its last life,
    empty for a first one.
    """
    left = sorted(range(len(bundles)), key=lambda bundle: (names[bundles[bundle]], bundles[bundle], bundle))
    order: dict[int, int] = {}
    for rank, node in enumerate(before):
        stays = next((bundle for bundle in left if bundles[bundle] == node), None)
        if stays is not None:
            order[rank] = stays
            left.remove(stays)
    for rank in range(len(bundles)):
        if rank not in order:
            order[rank] = left.pop(0)
    return [order[rank] for rank in range(len(bundles))]
