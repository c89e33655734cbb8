"""Who is compared with whom: from the scores of N completions of one prompt to pairs (winner, loser) of indices.

A pair needs a preference: equal scores make none and are counted as ties. It needs two texts: completions of equal
text, a completion and itself among them, make none and are counted as identical. `text` (N,) int holds equal numbers
where texts are equal; scores (N,) are compared only, so any units do. Random through the given generator only.
"""

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Generator, Tensor


class Pairing(NamedTuple):
    """pairs of indices (winner, loser); ties and identical, the comparisons that made none."""

    pairs: list[tuple[int, int]]
    ties: int
    identical: int


def best_against_worst(scores: Tensor, text: Tensor) -> Pairing:
    """One pair: the best against the worst, of equal ones the lower index.

    When all scores are equal there is none, and all N(N-1)/2 comparisons are ties.
    """
    best, worst = int(scores.argmax()), int(scores.argmin())
    if scores[best] == scores[worst]:
        return Pairing([], len(scores) * (len(scores) - 1) // 2, 0)
    return _compare([(best, worst)], scores, text)


def every_pair(scores: Tensor, text: Tensor) -> Pairing:
    """All N(N-1)/2 comparisons."""
    return _compare(list(combinations(range(len(scores)), 2)), scores, text)


def first_round(scores: Tensor, text: Tensor, generator: Generator) -> Pairing:
    """floor(N/2) disjoint random pairs, arXiv 2309.06657: the first round of a tournament."""
    order = _shuffled(len(scores), generator)
    return _compare(list(zip(order[::2], order[1::2], strict=False)), scores, text)


def tournament(scores: Tensor, text: Tensor, generator: Generator) -> Pairing:
    """Random pairs, then the winners against each other until one is left: N - 1 comparisons, arXiv 2309.06657.

    An odd one out has a bye. Of a comparison without a preference the first goes on.
    """
    order = _shuffled(len(scores), generator)
    matches: list[tuple[int, int]] = []
    while len(order) > 1:
        drawn = list(zip(order[::2], order[1::2], strict=False))
        matches += drawn
        order = [i if scores[i] >= scores[j] else j for i, j in drawn] + order[2 * len(drawn) :]
    return _compare(matches, scores, text)


def _shuffled(count: int, generator: Generator) -> list[int]:
    """Candidates come in the order of acceptance, which goes with their reward: never pair them in that order."""
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def _compare(matches: list[tuple[int, int]], scores: Tensor, text: Tensor) -> Pairing:
    pairs, ties, identical = [], 0, 0
    for i, j in matches:
        if text[i] == text[j]:
            identical += 1
        elif scores[i] == scores[j]:
            ties += 1
        else:
            pairs.append((i, j) if scores[i] > scores[j] else (j, i))
    return Pairing(pairs, ties, identical)
