"""Sums and moments over the true positions of a mask. What stands at a false position, NaN included, never enters a
result.

Variances are biased (divided by the count, not the count minus one) and computed in two float64 passes: E[x^2] -
E[x]^2 in float32 turns (1e4, 1e4+1, 1e4+2, 1e4+3) into variance 0 where it is 1.25.
"""

import torch
from torch import Tensor

# Added to the variance under the root, as in the published implementations of RLHF whitening.
VARIANCE_FLOOR = 1e-8


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the true positions: values (...), mask (...) bool -> scalar. The gradient is 0 at false positions."""
    return torch.where(mask, values, 0).sum()


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Values with mean 0 and biased standard deviation 1 over the true positions; 0 at the others.

        (v - mu) / sqrt(sigma^2 + 1e-8)

    values (...), mask (...) bool -> (...) in the dtype of values. One true position, or equal values, give exactly 0.
    Call it on the whole batch: statistics of one shard or one micro-batch are another function.
    """
    deviation, _ = _standardised(values, mask)
    return deviation.to(values.dtype)


def scale_keep_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Values scaled to biased standard deviation 1 around their own mean; 0 at false positions.

        (v - mu) / sqrt(sigma^2 + 1e-8) + mu

    values (...), mask (...) bool -> (...) in the dtype of values. This is what some libraries call shift_mean=False,
    and not v / sigma. One true position, or equal values, deviate by exactly 0 and give mu.
    """
    deviation, mean = _standardised(values, mask)
    return torch.where(mask, deviation + mean, 0).to(values.dtype)


def _standardised(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The whitened values (...) float64, 0 at false positions, and the mean (scalar)."""
    count = mask.sum().clamp(min=1)
    kept = torch.where(mask, values, 0).double()
    mean = kept.sum() / count
    deviation = torch.where(mask, kept - mean, 0)
    variance = deviation.square().sum() / count
    # The mean of equal values can be off by a rounding error, which the floor under the root would magnify to 1e-13.
    high = torch.where(mask, values, -torch.inf).amax() if values.numel() else kept.sum()
    low = torch.where(mask, values, torch.inf).amin() if values.numel() else kept.sum()
    whitened = deviation / torch.sqrt(variance + VARIANCE_FLOOR)
    return torch.where(high > low, whitened, torch.zeros_like(whitened)), mean
