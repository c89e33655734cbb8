"""PPO's clipped losses as sums over a micro-batch (arXiv 1707.06347). Shapes: B rows, T positions, right-padded.

Old log-probs, old values, advantages and returns carry no gradient. A position whose mask is false contributes nothing,
whatever stands there.
"""

import torch
from torch import Tensor

# e^20 is 5e8: a log-ratio beyond it is held there, so that the loss stays finite. Such a position has no gradient and
# is counted as clipped.
LOG_RATIO_LIMIT = 20.0


def clipped_policy_gradient(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    low: float,
    high: float,
    dual: float | None,
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate and the number of positions where clipping took the gradient away (scalars).

        rho_t = exp(l_t - l^old_t)
        loss = sum_i sum_t m_t max(-A_t rho_t, -A_t clip(rho_t, 1 - low, 1 + high))       arXiv 1707.06347, Eq 7

    logprobs (B, T) with gradient; old_logprobs, advantages (B, T); mask (B, T) bool. high above low is
    "clip-higher" (arXiv 2503.14476). dual c > 1, or None: where A < 0 the loss is at most -c A (arXiv 1912.09729),
    because the maximum alone does not bound it. At rho = 1 the gradient is that of REINFORCE.
    """
    difference = torch.where(mask, logprobs - old_logprobs.detach(), 0)
    ratio = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    credit = torch.where(mask, advantages, 0).detach()
    plain = -credit * ratio
    held = -credit * ratio.clamp(1 - low, 1 + high)
    loss, clipped = torch.maximum(plain, held), held > plain
    if dual is not None:
        ceiling = torch.where(credit < 0, -dual * credit, torch.inf)
        loss, clipped = torch.minimum(loss, ceiling), clipped | (loss > ceiling)
    beyond = (difference.abs() > LOG_RATIO_LIMIT) & (credit != 0)
    return loss.sum(), (clipped | beyond).sum()


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
