"""From comparisons of two answers to a reward of each: pure functions on numbers.

A comparison is asked in both orders, since judges prefer a place: the first, mostly. What is told of the answer that
stood first once and second once is put together here.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

WIN, TIE, LOSS = 1.0, 0.5, 0.0


class Outcome(NamedTuple):
    """What a comparison is worth to its first answer (the second has the rest to 1), and whether the orders agreed."""

    worth: float
    inconsistent: bool


def both_orders(forward: float | None, backward: float | None) -> Outcome | None:
    """One comparison out of two: worth of the first-shown answer in each order. None when one of them told nothing.

    The same answer must win in both orders; everything else is a tie.
    """
    if forward is None or backward is None:
        return None
    if forward == 1.0 - backward:
        return Outcome(forward, False)
    return Outcome(TIE, True)


def every_two(texts: Sequence[str]) -> list[tuple[int, int]]:
    """The comparisons of a group: each two answers of different text, the lower index first. Equal ones are ties."""
    return [(i, j) for i, j in combinations(range(len(texts)), 2) if texts[i] != texts[j]]


def mean_worth(texts: Sequence[str], outcomes: Mapping[tuple[int, int], Outcome | None]) -> list[float | None]:
    """The reward of each answer: its mean worth against the others; None where no comparison of it told anything."""
    worths: list[list[float]] = [[] for _ in texts]
    for i, j in combinations(range(len(texts)), 2):
        outcome = Outcome(TIE, False) if texts[i] == texts[j] else outcomes[i, j]
        if outcome is not None:
            worths[i].append(outcome.worth)
            worths[j].append(1.0 - outcome.worth)
    return [sum(own) / len(own) if own else None for own in worths]


def inconsistency(count: int, outcomes: Mapping[tuple[int, int], Outcome | None]) -> list[float | None]:
    """Of each answer, the share of its comparisons in which the order decided; None where none told anything."""
    seen: list[list[bool]] = [[] for _ in range(count)]
    for (i, j), outcome in outcomes.items():
        if outcome is not None:
            seen[i].append(outcome.inconsistent)
            seen[j].append(outcome.inconsistent)
    return [sum(own) / len(own) if own else None for own in seen]
