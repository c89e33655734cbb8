"""Statistical rejection sampling, arXiv 2309.06657: of candidates y ~ pi keep N that look drawn from a better policy.

    target      pi_r(y|x) = pi(y|x) exp(r(x, y) / beta) / Z(x)             Eq 4
    accept y    with probability exp((r - r_max) / beta)                   Algorithm 1

Candidates go by their index, never by their text: equal texts are different draws and both count. beta is in units of
r. C is the number of candidates. Everything is float64 on the CPU and random through the given generator only.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor


class Accepted(NamedTuple):
    """indices (N,) int64 of the accepted candidates in the order of acceptance, and how many tries that took."""

    indices: Tensor
    tries: int


def acceptance(rewards: Tensor, beta: float) -> Tensor:
    """Probability with which each candidate is accepted: exp((r - r_max) / beta), (C,) -> (C,) float64; beta > 0.

    Its mean is the expected acceptance rate of `exact`.
    """
    rewards = rewards.double()
    return torch.exp((rewards - rewards.max()) / beta)


def exact(rewards: Tensor, count: int, beta: float, generator: Generator) -> Accepted:
    """Draws candidates WITH replacement and accepts them until there are `count`: samples of exp(r / beta) / sum.

    rewards (C,) -> indices (count,), in which a candidate may come several times. beta 0 is a branch of its own: the
    `count` best, each once (the limit itself would be copies of the best). Raises ValueError when count is not in
    1..C or beta is below 0.
    """
    _check(rewards, count, beta)
    if beta == 0:
        return _best(rewards, count)
    return with_replacement(acceptance(rewards, beta), count, generator)


def with_replacement(probabilities: Tensor, count: int, generator: Generator) -> Accepted:
    """`count` acceptances among uniform draws; probabilities (C,) of acceptance, the largest of them 1; any count.

    Ends after C tries an acceptance on average at most, because the best candidate is always accepted.
    """
    found: list[Tensor] = []
    accepted, tries, block = 0, 0, 2 * count + len(probabilities)
    while accepted < count:
        drawn = torch.randint(len(probabilities), (block,), generator=generator)
        hit = torch.rand(block, generator=generator, dtype=torch.float64) < probabilities[drawn]
        places = hit.nonzero().squeeze(1)[: count - accepted]
        found.append(drawn[places])
        accepted += len(places)
        tries += block if accepted < count else int(places[-1]) + 1
    return Accepted(torch.cat(found), tries)


def paper(rewards: Tensor, count: int, beta: float, generator: Generator) -> Accepted:
    """Algorithm 1 of the paper: scans the remaining candidates again and again, each accepted at most once.

        until `count` are accepted: r_max over the REMAINING; scan them, accept with probability
        exp((r - r_max) / beta), stop at `count`; take the accepted out

    rewards (C,) -> indices (count,), all different. Not the target's distribution (without replacement, and r_max
    falls), but no candidate is lost. Each scan is shuffled anew, which is this project's: the paper's listing scans in
    the order given, and best first that would favour the best further. beta 0: the `count` best. Raises ValueError
    when count is not in 1..C or beta is below 0.
    """
    _check(rewards, count, beta)
    if beta == 0:
        return _best(rewards, count)
    remaining = torch.ones(len(rewards), dtype=torch.bool)
    found: list[Tensor] = []
    accepted, tries = 0, 0
    while accepted < count:
        left = remaining.nonzero().squeeze(1)
        order = left[torch.randperm(len(left), generator=generator)]
        chance = torch.rand(len(order), generator=generator, dtype=torch.float64)
        places = (chance < acceptance(rewards[order], beta)).nonzero().squeeze(1)[: count - accepted]
        found.append(order[places])
        remaining[order[places]] = False
        accepted += len(places)
        tries += len(order) if accepted < count else int(places[-1]) + 1
    return Accepted(torch.cat(found), tries)


def _best(rewards: Tensor, count: int) -> Accepted:
    """The `count` best, best first; of equal ones the lower index. Every candidate was looked at once."""
    order = torch.sort(rewards.double(), descending=True, stable=True).indices
    return Accepted(order[:count], len(rewards))


def _check(rewards: Tensor, count: int, beta: float) -> None:
    if not 1 <= count <= len(rewards):
        raise ValueError(
            f"asked to accept {count} of {len(rewards)} candidates; the number to accept must be between 1 and the "
            f"number of candidates"
        )
    if beta < 0:
        raise ValueError(f"beta is {beta}, expected 0 (the best candidates) or above")
