"""PPO's clipped surrogate against golden numbers and closed forms. Not covered: aggregation (test_algorithm_grpo)."""

import math

import pytest
import torch

from rlhf.ops.losses import clipped_policy_loss, policy_gradient


def one_token(ratio, advantage, *, low=0.2, high=0.2, dual=None):
    """The loss of one token, its derivative in the ratio, and the three flags."""
    logprob = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    here = torch.ones(1, 1, dtype=torch.bool)
    credit = torch.full((1, 1), advantage, dtype=torch.float64)
    found = clipped_policy_loss(logprob, torch.zeros(1, 1), credit, here, torch.ones(1, 1), low, high, dual)
    found.loss.backward()
    return found.loss.item(), logprob.grad.item() / ratio, [bool(f) for f in (found.above, found.below, found.dual)]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "flags"),
    [
        (1.5, 1.0, -1.2, 0.0, [True, False, False]),
        (0.5, 1.0, -0.5, -1.0, [False, False, False]),
        (1.5, -1.0, 1.5, 1.0, [False, False, False]),
        (0.5, -1.0, 0.8, 0.0, [False, True, False]),
        (1.0, 1.0, -1.0, -1.0, [False, False, False]),
        (1.0, -1.0, 1.0, 1.0, [False, False, False]),
        (5.0, 0.0, 0.0, 0.0, [False, False, False]),
    ],
)
def test_golden_numbers(ratio, advantage, loss, slope, flags):
    """G-CLIP: the gradient is 0 exactly where the clip acts to stop the token; no credit, no loss and no flag."""
    found = one_token(ratio, advantage)
    assert found[:2] == pytest.approx((loss, slope), abs=1e-9)
    assert found[2] == flags


def test_dual_clip_and_clip_higher():
    """G-CLIP: dual 3 turns (5,-1) from 5 into 3, without gradient, and leaves (2,-1) and positive credit alone; high
    .28: (1.25,1) gives -1.25, and (1.3,1) -1.28."""
    assert one_token(5.0, -1.0)[0] == pytest.approx(5.0)
    assert one_token(5.0, -1.0, dual=3.0) == (pytest.approx(3.0), 0.0, [False, False, True])
    assert one_token(2.0, -1.0, dual=3.0)[:2] == pytest.approx((2.0, 1.0))
    assert one_token(5.0, 1.0, dual=3.0)[0] == pytest.approx(-1.2)
    assert one_token(1.25, 1.0, high=0.28)[:2] == pytest.approx((-1.25, -1.0))
    assert one_token(1.3, 1.0, high=0.28)[:2] == pytest.approx((-1.28, 0.0))


def test_decoupled_weight():
    """G-DEC: pi_prox / pi_b = 1.5, ratio 1.3, A = 1 gives -1.8; clipping pi / pi_b = 1.95 itself would give -1.2."""
    logprob, here = torch.tensor([[math.log(1.3)]]), torch.ones(1, 1, dtype=torch.bool)
    found = clipped_policy_loss(
        logprob, torch.zeros(1, 1), torch.ones(1, 1), here, torch.full((1, 1), 1.5), 0.2, 0.2, None
    )
    assert found.loss.item() == pytest.approx(-1.8)


def test_at_ratio_one_the_gradient_is_reinforces():
    """Random logits, credit of both signs, weights, masks: equal in every logit to 1e-12. And G-REINF itself."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=draw, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 7, (3, 5, 1), generator=draw)
    credit, weights = torch.randn(3, 5, generator=draw).double(), torch.rand(3, 5, generator=draw).double()
    mask = torch.rand(3, 5, generator=draw) > 0.3
    logprobs = logits.log_softmax(-1).gather(2, ids)[:, :, 0]
    clipped = clipped_policy_loss(logprobs, logprobs.detach(), credit, mask, weights, 0.2, 0.2, None).loss
    (ours,) = torch.autograd.grad(clipped, logits, retain_graph=True)
    (reinforce,) = torch.autograd.grad(policy_gradient(logprobs, credit, mask, weights), logits)
    assert torch.allclose(ours, reinforce, atol=1e-12)
    golden = torch.tensor([1.0, 2.0, 1.0, 1.0], requires_grad=True)
    chosen = golden.log_softmax(0)[1].reshape(1, 1)
    here = torch.ones(1, 1, dtype=torch.bool)
    clipped_policy_loss(
        chosen, chosen.detach(), torch.ones(1, 1), here, torch.ones(1, 1), 0.2, 0.2, None
    ).loss.backward()
    assert (-golden.grad).tolist() == pytest.approx([-0.17488, 0.52463, -0.17488, -0.17488], abs=1e-5)


def test_what_stands_at_a_masked_position_leaves_no_trace():
    """NaN log-probabilities, infinite credit and weights at padding: loss finite, gradient 0 there, no flag."""
    logprobs = torch.tensor([[-1.0, torch.nan]], requires_grad=True)
    rubbish = torch.tensor([[1.0, torch.inf]])
    mask = torch.tensor([[True, False]])
    found = clipped_policy_loss(logprobs, torch.tensor([[-1.0, 5.0]]), rubbish, mask, rubbish, 0.2, 0.2, 3.0)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(-1.0)
    assert logprobs.grad.tolist() == [[-1.0, 0.0]]
    assert not any(bool(flag[0, 1]) for flag in found[1:])


def test_long_completions_and_huge_ratios_stay_finite():
    """Trap 32: 4,096 tokens each .2 nats off are all above the band; one token 900 nats off is held, and flagged."""
    old = torch.zeros(1, 4096)
    logprobs = (old + 0.2).requires_grad_()
    everywhere = torch.ones(1, 4096, dtype=torch.bool)
    found = clipped_policy_loss(logprobs, old, torch.ones(1, 4096), everywhere, torch.ones(1, 4096), 0.2, 0.2, None)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(-1.2 * 4096, rel=1e-5)
    assert found.above.float().mean().item() == 1.0 and not found.held.any()
    assert logprobs.grad.abs().max().item() == 0.0

    far = torch.tensor([[900.0]], requires_grad=True)
    here = torch.ones(1, 1, dtype=torch.bool)
    found = clipped_policy_loss(far, torch.zeros(1, 1), -torch.ones(1, 1), here, torch.ones(1, 1), 0.2, 0.2, None)
    found.loss.backward()
    assert math.isfinite(found.loss.item()) and math.isfinite(far.grad.item()) and found.held.all()
