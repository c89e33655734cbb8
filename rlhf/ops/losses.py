"""Losses as sums over a micro-batch: the learner divides once, by a global count. Shapes: B rows, T positions,
right-padded.

Weights and advantages carry no gradient. A position whose mask is false contributes nothing, whatever stands there.
"""

import math

import torch
from torch import Tensor

from rlhf.ops.kl import k3


def policy_gradient(logprobs: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """REINFORCE: -sum_i sum_t m_t sg[w_t] A_t l_t, a scalar whose gradient is the negative policy gradient.

    logprobs (B, T) with gradient; advantages, weights (B, T) float; mask (B, T) bool. The value means nothing by
    itself.
    """
    credit = torch.where(mask, advantages * weights, 0).detach()
    return -(credit * torch.where(mask, logprobs, 0)).sum()


def negative_log_likelihood(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Maximum likelihood: -sum_i sum_t m_t l_t in nats, a scalar; logprobs (B, T) with gradient, mask (B, T) bool."""
    return -torch.where(mask, logprobs, 0).sum()


def truncated_ratio(logprobs: Tensor, sampled_logprobs: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Truncated importance weight of each token, without gradient: min(exp(l - l_sampled), cap).

    logprobs, sampled_logprobs (B, T) -> (weight (B, T), truncated (B, T) bool: count it and log it). Truncation
    trades a bias towards the sampler for a bounded variance (truncated importance sampling, Ionides 2008). Finite for
    any finite log-probabilities, and exactly 1 where the two are equal and cap >= 1.
    """
    difference, limit = (logprobs - sampled_logprobs).detach(), math.log(cap)
    return difference.clamp(max=limit).exp(), difference > limit


def k2_loss(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Reverse KL of whole sequences as a loss: sum_i S_i^2 / 2 with S = sum_t m_t d_t; a scalar.

        gradient   sum_i S_i sum_t m_t w_t grad l_t          arXiv 2510.01555; k2 of the SUM, see below

    logprobs (B, T) with gradient, ref_logprobs, weights (B, T), mask (B, T) bool. The square is taken of the sum:
    summing the tokens' squares misses what early tokens do to later prefixes and is not the gradient of the
    sequence's KL. With importance weights w each token's gradient is weighted, and the value becomes S_i (sum_t m_t
    w_t d_t) / 2.
    """
    difference = torch.where(mask, logprobs - ref_logprobs, 0)
    total = difference.detach().sum(dim=1)
    weighted = (torch.where(mask, weights, 0).detach() * difference).sum(dim=1)
    return (total * (weighted - 0.5 * weighted.detach())).sum()


def k3_loss(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, weights: Tensor, clamp: float
) -> tuple[Tensor, Tensor]:
    """GRPO's KL loss: sum_i sum_t m_t w_t k3(d_t), a scalar, and how many positions were clamped (scalar int).

    Its gradient on samples of the policy is that of the FORWARD KL(pi_ref || pi), arXiv 2402.03300 Eq 4. Shapes as in
    k2_loss; d is held within [-clamp, clamp].
    """
    estimate, clamped = k3(torch.where(mask, logprobs - ref_logprobs, 0), clamp)
    return (torch.where(mask, weights, 0).detach() * estimate).sum(), (clamped & mask).sum()
