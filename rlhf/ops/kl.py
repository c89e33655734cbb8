"""Estimators of KL(pi || pi_ref) from samples of pi, as functions of the log-ratio d = log pi - log pi_ref.

What they are good for (arXiv 2510.01555, 2512.21852). As values: k1 and k3 are unbiased, k2 is not; k3 is never
negative. As gradients on samples of pi: k1 in the reward and k2 as a loss have that of KL(pi || pi_ref); k1 as a loss
has none at all; k3 as a loss has that of the forward KL(pi_ref || pi). Swapping the arguments of the log-ratio swaps
the KL: d is always policy minus reference.
"""

import torch
from torch import Tensor


def k1(log_ratio: Tensor) -> Tensor:
    """k1 = d, unbiased, of either sign; any shape."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """k2 = d^2 / 2, biased as a value; any shape."""
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
    """k3 = e^(-d) - 1 + d with d held within [-clamp, clamp], and where the clamp acted.

    k3 explodes where the policy is far below the reference (d = -10 gives 22015), hence the clamp; a clamped position
    has no gradient. Any shape -> (k3, clamped), the second bool: count it and log it.
    """
    held = log_ratio.clamp(-clamp, clamp)
    return torch.expm1(-held) + held, log_ratio.abs() > clamp


def adaptive_coefficient(coefficient: float, kl: float, target: float, samples: int, horizon: float) -> float:
    """The KL price after `samples` more samples whose KL was `kl`.

        e = clip(KL / target - 1, -0.2, 0.2);   beta <- beta (1 + e samples / horizon)     arXiv 1909.08593, section 2.2

    The price is run state and belongs into the checkpoint. Raises ValueError for samples >= 5 horizon: one step could
    turn the price negative, and leaving the reference would be paid for.
    """
    if samples >= 5 * horizon:
        raise ValueError(f"a horizon of {horizon:g} for {samples} samples a step: expected more than a fifth of them")
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * samples / horizon)
