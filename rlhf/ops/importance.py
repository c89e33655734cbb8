"""Importance weights of tokens that other weights, or another sampler, drew. Shapes: B rows, T positions, right-padded.

    D_t = l_t - l^b_t        log-probability under the policy minus that under the sampler

Nothing here has a gradient: a weight is a constant of its estimator. What stands where the mask is false never enters
a result, and there the weight is 1.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Level = Literal["token", "sequence"]
Span = Literal["token", "sequence", "sequence_mean"]


class Truncated(NamedTuple):
    """weights (B, T), and where (B, T) bool the ratio was above the cap: count it and log it."""

    weights: Tensor
    truncated: Tensor


def importance_weights(log_ratios: Tensor, mask: Tensor, level: Level, cap: float) -> Truncated:
    """Truncated importance sampling: w = min(ratio, cap), of each token or of its whole sequence.

        token       w_t = min(exp D_t, C)                        arXiv 1802.01561, section 4.1 (rho-bar)
        sequence    w   = min(exp sum_t m_t D_t, C)              Ionides 2008, Eq 3; the same w at every token

    log_ratios (B, T), mask (B, T) bool. Without truncation the sequence's weight makes the estimator unbiased; a
    token's weight leaves out what the other tokens of its sequence did and is biased, but its variance does not grow
    with the length. Truncation adds a bias towards the sampler and bounds the variance. Exactly 1 where D is 0 and
    C >= 1; finite for any finite D.
    """
    spread = _spread(log_ratios, mask, level)
    limit = math.log(cap)
    over = mask & (spread > limit)
    return Truncated(torch.where(mask, spread.clamp(max=limit).exp(), 1.0), over)


def outside_bounds(log_ratios: Tensor, mask: Tensor, span: Span, low: float, high: float) -> Tensor:
    """Where (B, T) bool a ratio is outside [low, high]: such tokens, or sequences, are given no weight.

        token           exp D_t                                  IcePop, arXiv 2510.18855
        sequence        exp sum_t m_t D_t                        the likelihood ratio of the whole completion
        sequence_mean   exp (sum_t m_t D_t / sum_t m_t)          its geometric mean a token, as in arXiv 2507.18071

    low >= 0, 0 for no lower bound. False where the mask is.
    """
    spread = _spread(log_ratios, mask, span)
    floor = math.log(low) if low > 0 else -math.inf
    return mask & ((spread < floor) | (spread > math.log(high)))


def effective_share(weights: Tensor) -> float:
    """Effective sample size over the number of samples: (sum w)^2 / (n sum w^2), 1 for equal weights, at least 1/n.

    weights (n,) >= 0, in any unit; 0 where all are 0. Kish 1965.
    """
    largest = weights.max()
    if largest <= 0:
        return 0.0
    scaled = (weights / largest).double()  # squares of large weights would overflow
    return float(scaled.sum() ** 2 / (len(scaled) * scaled.square().sum()))


def _spread(log_ratios: Tensor, mask: Tensor, span: Span) -> Tensor:
    """The log-ratio that each position is judged by, (B, T)."""
    own = torch.where(mask, log_ratios.detach(), 0)
    if span == "token":
        return own
    total = own.sum(dim=-1, keepdim=True)
    if span == "sequence_mean":
        total = total / mask.sum(dim=-1, keepdim=True).clamp(min=1)
    return total.expand_as(own)
