"""Which rows go into which minibatch, rank and micro-batch. Pure functions; every rank computes the same plan.

A unit (one row, or the two of a pair) is never split. Every rank gets the same number of micro-batches; where it has
fewer, empty ones are added, because a rank that skips a forward pass hangs the others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf.experience import Normalizer, Row
from rlhf.seeding import seed_for


class Unit(NamedTuple):
    """Rows that stay together."""

    rows: tuple[Row, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row, prompt included."""
        return tuple(len(row.prompt_ids) + len(row.completion_ids) for row in self.rows)


def units_of(rows: Sequence[Row]) -> list[Unit]:
    """Rows, ordered by unit, gathered by unit."""
    gathered: dict[int, list[Row]] = {}
    for row in rows:
        gathered.setdefault(row.unit, []).append(row)
    return [Unit(tuple(members)) for members in gathered.values()]


def minibatches(units: int, count: int, run_seed: int, step: int, epoch: int) -> list[list[int]]:
    """`count` parts of near equal size of 0..units-1, in an order of their own each epoch; fewer when units are few."""
    generator = np.random.Generator(np.random.PCG64(seed_for(run_seed, "minibatch", step, epoch)))
    order = generator.permutation(units) if count > 1 else np.arange(units)
    return [sorted(part.tolist()) for part in np.array_split(order, count) if len(part)]


def count_of(units: Sequence[Unit], normalizer: Normalizer) -> int:
    """What their summed loss is divided by: the number of the units, of their rows, or of their trained tokens."""
    if normalizer == "units":
        return len(units)
    rows = [row for unit in units for row in unit.rows]
    return len(rows) if normalizer == "rows" else sum(int(row.loss_mask.sum()) for row in rows)


def shares(units: Sequence[Unit], ranks: int) -> list[list[Unit]]:
    """The units of each rank: longest first to the rank with the fewest tokens, ties to the lower number."""
    held: list[list[Unit]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for unit in sorted(units, key=lambda unit: -sum(unit.lengths)):
        rank = load.index(min(load))
        held[rank].append(unit)
        load[rank] += sum(unit.lengths)
    return held


def microbatches(units: Sequence[Unit], token_budget: int, *, packed: bool) -> list[list[Unit]]:
    """Units cut into micro-batches of at most `token_budget` tokens, padding included unless packed; longest first.

    A unit that is over the budget by itself has a micro-batch of its own.
    """
    batches: list[list[Unit]] = []
    for unit in sorted(units, key=lambda unit: -max(unit.lengths)):
        if batches and _cost([*batches[-1], unit], packed) <= token_budget:
            batches[-1].append(unit)
        else:
            batches.append([unit])
    return batches


def plan(units: Sequence[Unit], ranks: int, token_budget: int, *, packed: bool) -> list[list[list[Unit]]]:
    """The micro-batches of each rank, the same number for all; an empty one is a filler."""
    return plan_shares(shares(units, ranks), token_budget, packed=packed)


def plan_shares(held: Sequence[Sequence[Unit]], token_budget: int, *, packed: bool) -> list[list[list[Unit]]]:
    """The same where it is settled which rank holds what."""
    planned = [microbatches(share, token_budget, packed=packed) for share in held]
    most = max(len(batches) for batches in planned)
    return [batches + [[]] * (most - len(batches)) for batches in planned]


def _cost(units: Sequence[Unit], packed: bool) -> int:
    lengths = [length for unit in units for length in unit.lengths]
    return sum(lengths) if packed else len(lengths) * max(lengths)
