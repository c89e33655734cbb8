"""PPO's clipped losses against golden vectors, finite differences and REINFORCE.

Not covered: how the sums are divided (the learner), advantages (ops.gae).
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.ops.clipped import clipped_value_loss
from rlhf.ops.losses import clipped_policy_loss, policy_gradient

ONE = torch.ones(1, 1, dtype=torch.bool)


def clipped_policy_gradient(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    low: float,
    high: float,
    dual: float | None,
) -> tuple[Tensor, Tensor]:
    """The loss at weight 1, and how many positions have lost their gradient."""
    found = clipped_policy_loss(logprobs, old, advantages, mask, torch.ones_like(logprobs), low, high, dual)
    return found.loss, (found.above | found.below | found.dual | found.held).sum()


def policy(ratio: float, advantage: float, high: float, dual: float | None) -> tuple[float, float, int]:
    """Loss, gradient in the log-prob and clipped count of one token; low is 0.2."""
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, clipped = clipped_policy_gradient(
        logprobs, torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), advantage), ONE, 0.2, high, dual
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), gradient.item(), int(clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "high", "dual", "loss", "moves"),
    [
        (1.5, 1.0, 0.2, None, -1.2, False),
        (0.5, 1.0, 0.2, None, -0.5, True),
        (1.5, -1.0, 0.2, None, 1.5, True),
        (0.5, -1.0, 0.2, None, 0.8, False),
        (5.0, -1.0, 0.2, None, 5.0, True),
        (5.0, -1.0, 0.2, 3.0, 3.0, False),
        (5.0, 1.0, 0.2, 3.0, -1.2, False),
        (1.25, 1.0, 0.28, None, -1.25, True),
    ],
)
def test_golden_vectors(
    ratio: float, advantage: float, high: float, dual: float | None, loss: float, moves: bool
) -> None:
    """G-CLIP with dual clip and clip-higher: the loss, whether there is a gradient, and that its absence is counted."""
    found, gradient, clipped = policy(ratio, advantage, high, dual)
    assert found == pytest.approx(loss) and (gradient != 0) == moves and clipped == int(not moves)
    if moves:
        assert gradient == pytest.approx(-advantage * ratio)


def test_gradient_at_ratio_one_is_that_of_reinforce() -> None:
    """Exactly, clip or no clip, with a mask and advantages of both signs; nothing is clipped."""
    random = torch.Generator().manual_seed(0)
    logprobs = torch.randn(4, 6, generator=random).requires_grad_()
    advantages, mask = torch.randn(4, 6, generator=random), torch.rand(4, 6, generator=random) < 0.7
    loss, clipped = clipped_policy_gradient(logprobs, logprobs.detach(), advantages, mask, 0.2, 0.28, 3.0)
    plain = policy_gradient(logprobs, advantages, mask, torch.ones(4, 6))
    (one,), (other,) = torch.autograd.grad(loss, logprobs), torch.autograd.grad(plain, logprobs)
    assert torch.equal(one, other) and clipped == 0


def differences(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Central differences of a scalar function of one tensor."""
    gradient, step = torch.zeros_like(at), 1e-6
    for place in range(at.numel()):
        up, down = at.clone().flatten(), at.clone().flatten()
        up[place] += step
        down[place] -= step
        slope = (function(up.view(at.shape)) - function(down.view(at.shape))) / (2 * step)
        gradient.view(-1)[place] = slope
    return gradient


def test_gradients_are_the_finite_differences() -> None:
    """Both losses at random points, float64; clipped positions included."""
    random = torch.Generator().manual_seed(1)
    at, old, credit = (torch.randn(3, 5, generator=random, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(3, 5, generator=random) < 0.8

    def actor(x: Tensor) -> Tensor:
        return clipped_policy_gradient(x, old, credit, mask, 0.2, 0.3, 1.5)[0]

    def critic(x: Tensor) -> Tensor:
        return clipped_value_loss(x, old, credit, mask, 0.2)[0]

    for function in (actor, critic):
        x = at.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x), x)
        assert torch.allclose(gradient, differences(function, at), atol=1e-6)


def test_masked_positions_do_not_enter() -> None:
    """NaN and infinity at false positions of every argument: no loss, no gradient, no count."""
    bad = torch.tensor([[0.1, torch.nan, torch.inf]])
    mask = torch.tensor([[True, False, False]])
    x = bad.clone().requires_grad_()
    loss, clipped = clipped_policy_gradient(x, bad, bad, mask, 0.2, 0.2, 3.0)
    value, held = clipped_value_loss(x, bad, bad, mask, 0.2)
    (gradient,) = torch.autograd.grad(loss + value, x)
    assert torch.isfinite(loss + value) and not gradient[0, 1:].any() and clipped == 0 and held == 0


@pytest.mark.parametrize(
    ("value", "target", "loss", "moves"), [(1.0, 1.0, 0.045, False), (0.6, 1.0, 0.08, True), (0.9, 0.0, 0.405, True)]
)
def test_value_golden_vectors(value: float, target: float, loss: float, moves: bool) -> None:
    """G-VCLIP: old value 0.5, clip 0.2."""
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    found, clipped = clipped_value_loss(values, torch.tensor([[0.5]]), torch.tensor([[target]]), ONE, 0.2)
    (gradient,) = torch.autograd.grad(found, values)
    assert found.item() == pytest.approx(loss) and bool(gradient != 0) == moves and clipped == int(not moves)
