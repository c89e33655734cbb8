"""PPO's clipped value loss as a sum over a micro-batch. Shapes: B rows, T positions, right-padded.

Old values and returns carry no gradient. The clipped policy loss is in `ops.losses`. A position whose mask is false
contributes nothing, whatever stands there."""

import torch
from torch import Tensor


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """The clipped squared error of a critic and the number of positions where clipping took the gradient away.

        loss = sum_i sum_t m_t max((V_t - R_t)^2, (clip(V_t, V^old_t - clip, V^old_t + clip) - R_t)^2) / 2

    values (B, T) with gradient; old_values, returns (B, T); mask (B, T) bool; in units of reward squared. The
    factor 1/2 and the clip around the OLD value are those of arXiv 2403.17031; the coefficient is the caller's.
    """
    values = torch.where(mask, values, 0)
    old, target = torch.where(mask, old_values, 0).detach(), torch.where(mask, returns, 0).detach()
    held = torch.minimum(torch.maximum(values, old - clip), old + clip)
    plain_error, held_error = (values - target).square(), (held - target).square()
    return 0.5 * torch.maximum(plain_error, held_error).sum(), (held_error > plain_error).sum()
