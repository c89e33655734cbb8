"""Scores of ranked answers: which pairs a ranking makes, and the Bradley-Terry loss over them, as sums.

An answer of rank 0 is preferred to one of rank 1. Equal ranks make no pair. All pairs of a unit (the K answers to one
prompt) belong together and weigh 1 in sum: spread over batches they make a reward model overfit within an epoch
(arXiv 2203.02155, section 3.5).
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid


class Pairs(NamedTuple):
    """P pairs of rows: better, worse (P,) int64 row numbers; weight (P,) float, 1 / (number of pairs of the unit)."""

    better: Tensor
    worse: Tensor
    weight: Tensor


def last_scores(values: Tensor, mask: Tensor) -> Tensor:
    """The score of each answer (R,): the value (R, T) at its last token; of a row without one, the first value."""
    last = (mask.sum(dim=1) - 1).clamp(min=0)
    return values.gather(1, last[:, None])[:, 0]


def ranked_pairs(ranks: Tensor, unit: Tensor) -> Pairs:
    """All pairs of rows of a unit with different ranks, (R,) float and (R,) int64: C(K, 2) a unit without ties."""
    preferred = (unit[:, None] == unit[None, :]) & (ranks[:, None] < ranks[None, :])
    better, worse = preferred.nonzero(as_tuple=True)
    of_unit = (unit[better][:, None] == unit[better][None, :]).sum(dim=1)
    return Pairs(better, worse, 1.0 / of_unit.clamp(min=1))


def bradley_terry(scores: Tensor, pairs: Pairs, margins: Tensor) -> Tensor:
    """The negative log-likelihood of the preferences, a scalar.

        sum over units of 1/C(K, 2) sum_{w above l} -log sigma(r_w - r_l - margin_w)      arXiv 2203.02155, Eq 1

    scores (R,) with gradient, in reward units; margins (R,), how much more than each row below it row w must have
    (arXiv 2307.09288, Eq 2), 0 for none. Unchanged when a constant is added to all scores of a unit. No pairs give 0.
    """
    difference = scores[pairs.better] - scores[pairs.worse] - margins[pairs.better]
    return -(pairs.weight * logsigmoid(difference)).sum()


def order_likelihood(better_first: Tensor, better_second: Tensor) -> Tensor:
    """The negative log-likelihood of each comparison, over the two orders in which it was shown, (P,).

        -1/2 [log sigma(s(w, l)) + log sigma(-s(l, w))]                  arXiv 2305.10425, section 3.1, over both orders

    s (P,) with gradient, the logit of "the first is better": better_first where that is so. ln 2 at s = 0.
    """
    return -(logsigmoid(better_first) + logsigmoid(-better_second)) / 2


def centring(scores: Tensor, pairs: Pairs) -> Tensor:
    """What holds scores around 0, which Bradley-Terry leaves open: sum over units of the mean of (r_w + r_l)^2.

    scores (R,) with gradient -> scalar, before its coefficient (arXiv 2312.09244).
    """
    return (pairs.weight * (scores[pairs.better] + scores[pairs.worse]).square()).sum()
