"""Policy-gradient sums against closed forms. KL losses: test_ops_kl; importance weights: test_ops_importance."""

import pytest
import torch

from rlhf.ops.losses import policy_gradient


def test_policy_gradient_of_a_softmax():
    """G-REINF: logits (1,2,1,1), action 1, A = 1: the ascent direction is one-hot minus probabilities."""
    logits = torch.tensor([1.0, 2.0, 1.0, 1.0], requires_grad=True)
    chosen = logits.log_softmax(0)[1].reshape(1, 1)
    policy_gradient(chosen, torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1)).backward()
    assert (-logits.grad).tolist() == pytest.approx([-0.17488, 0.52463, -0.17488, -0.17488], abs=1e-5)


def test_gradient_is_minus_advantage_times_weight_where_the_mask_is_true():
    """A NaN log-probability at padding, and an infinite advantage there, leave no trace."""
    logprobs = torch.tensor([[-1.0, -2.0, torch.nan]], requires_grad=True)
    advantages, weights = torch.tensor([[3.0, -1.0, torch.inf]]), torch.tensor([[0.5, 2.0, 1.0]])
    loss = policy_gradient(logprobs, advantages, torch.tensor([[True, True, False]]), weights)
    loss.backward()
    assert loss.item() == pytest.approx(1.5 - 4.0)
    assert logprobs.grad.tolist() == [[-1.5, 2.0, 0.0]]


def test_no_gradient_flows_into_weights_and_advantages():
    """Both are constants of the estimator."""
    advantages, weights = torch.ones(1, 1, requires_grad=True), torch.ones(1, 1, requires_grad=True)
    logprobs = torch.zeros(1, 1, requires_grad=True)
    policy_gradient(logprobs, advantages, torch.ones(1, 1, dtype=torch.bool), weights).backward()
    assert advantages.grad is None and weights.grad is None


def test_splitting_rows_adds_up():
    """Sums over micro-batches of one row equal the sum over all rows, in value and gradient."""
    draw = torch.Generator().manual_seed(1)
    logprobs = torch.randn(4, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    advantages, weights = torch.randn(4, 5, generator=draw).double(), torch.rand(4, 5, generator=draw).double()
    mask = torch.rand(4, 5, generator=draw) > 0.3
    whole = policy_gradient(logprobs, advantages, mask, weights)
    (gradient,) = torch.autograd.grad(whole, logprobs)
    rows = [slice(i, i + 1) for i in range(4)]
    split = sum(policy_gradient(logprobs[r], advantages[r], mask[r], weights[r]) for r in rows)
    (split_gradient,) = torch.autograd.grad(split, logprobs)
    assert torch.allclose(whole, split, atol=1e-12)
    assert torch.allclose(gradient, split_gradient, atol=1e-12)
