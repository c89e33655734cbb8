"""Losses as sums over a micro-batch: the learner divides once, by a global count. Shapes: B rows, T positions,
right-padded.

Weights and advantages carry no gradient. A position whose mask is false contributes nothing, whatever stands there.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.ops.kl import k2, k3

# Log-ratios beyond this many nats enter a clipped loss as this many: e^20 is 5e8, far outside any clip. e^89 is beyond
# float32, and infinity times an advantage of 0 is no number.
LOG_RATIO_LIMIT = 20.0


class Clipped(NamedTuple):
    """A clipped policy loss, and where (B, T) bool it has no gradient.

    above 1 + high, below 1 - low, above dual; held, where the log-ratio itself was cut before its exponential.
    """

    loss: Tensor
    above: Tensor
    below: Tensor
    dual: Tensor
    held: Tensor


def policy_gradient(logprobs: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """REINFORCE: -sum_i sum_t m_t sg[w_t] A_t l_t, a scalar whose gradient is the negative policy gradient.

    logprobs (B, T) with gradient; advantages, weights (B, T) float; mask (B, T) bool. The value means nothing by
    itself.
    """
    credit = torch.where(mask, advantages * weights, 0).detach()
    return -(credit * torch.where(mask, logprobs, 0)).sum()


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    low: float,
    high: float,
    dual: float | None,
) -> Clipped:
    """PPO's clipped surrogate, token by token.

        sum_i sum_t m_t w_t max(-A_t rho_t, -A_t clip(rho_t, 1 - low, 1 + high)),   rho_t = exp(l_t - l^old_t)
                                                              arXiv 1707.06347, Eq 7; low != high: arXiv 2503.14476
        and at most -A_t dual where A_t < 0                   arXiv 1912.09729, Eq 5

    logprobs (B, T) with gradient; the others (B, T) without. Where rho is 1 the gradient is that of `policy_gradient`.
    Log-ratios are held within [-20, 20], so that the loss stays finite.
    """
    difference = torch.where(mask, logprobs - old_logprobs.detach(), 0)
    ratio = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    credit = torch.where(mask, advantages, 0).detach()
    surrogate = torch.maximum(-credit * ratio, -credit * ratio.clamp(1 - low, 1 + high))
    above, below = (credit > 0) & (ratio > 1 + high), (credit < 0) & (ratio < 1 - low)
    over = torch.zeros_like(mask) if dual is None else (credit < 0) & (ratio > dual)
    if dual is not None:
        surrogate = torch.where(over, -credit * dual, surrogate)
    held = difference.abs() > LOG_RATIO_LIMIT
    return Clipped((torch.where(mask, weights, 0).detach() * surrogate).sum(), above, below, over, held)


def negative_log_likelihood(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Maximum likelihood: -sum_i sum_t m_t l_t in nats, a scalar; logprobs (B, T) with gradient, mask (B, T) bool."""
    return -torch.where(mask, logprobs, 0).sum()


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


def k2_token_loss(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """The tokens' k2 as a loss: sum_i sum_t m_t w_t d_t^2 / 2, a scalar.       arXiv 2501.03262, Eq 8

    Its gradient is that of the reverse KL of the next token for a fixed prefix, and not that of the sequence's KL
    (`k2_loss`). Shapes as there.
    """
    estimate = k2(torch.where(mask, logprobs - ref_logprobs, 0))
    return (torch.where(mask, weights, 0).detach() * estimate).sum()


def k3_loss(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, weights: Tensor, clamp: float
) -> tuple[Tensor, Tensor]:
    """GRPO's KL loss: sum_i sum_t m_t w_t k3(d_t), a scalar, and how many positions were clamped (scalar int).

    Its gradient on samples of the policy is that of the FORWARD KL(pi_ref || pi), arXiv 2402.03300 Eq 4. Shapes as in
    k2_loss; d is held within [-clamp, clamp].
    """
    estimate, clamped = k3(torch.where(mask, logprobs - ref_logprobs, 0), clamp)
    return (torch.where(mask, weights, 0).detach() * estimate).sum(), (clamped & mask).sum()
