"""Policy-gradient sums and importance weights against closed forms and enumeration. KL losses: test_ops_kl."""

import pytest
import torch

from rlhf.ops.losses import policy_gradient, truncated_ratio

POLICY = torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64)
SAMPLER = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
REWARDS = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)


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


def test_truncated_ratio():
    """G-TIS: differences (0, .5, 2), cap 2; equal log-probabilities weigh exactly 1; a huge difference stays finite."""
    weights, truncated = truncated_ratio(torch.tensor([[0.0, 0.5, 2.0, 800.0]]), torch.zeros(1, 4), 2.0)
    assert weights[0].tolist() == pytest.approx([1.0, 1.64872, 2.0, 2.0], abs=1e-5)
    assert weights[0, 0].item() == 1.0
    assert truncated[0].tolist() == [False, False, True, True]


def bandit_gradient(cap: float | None) -> list[float]:
    """Expected ascent gradient in the policy's logits over the sampler's actions, corrected with this cap, or not."""
    logits = POLICY.log().requires_grad_()
    logprobs = logits.log_softmax(0).unsqueeze(1)
    ratio = torch.ones(3, 1) if cap is None else truncated_ratio(logprobs, SAMPLER.log().unsqueeze(1), cap)[0]
    mask = torch.ones(3, 1, dtype=torch.bool)
    policy_gradient(logprobs, REWARDS.unsqueeze(1), mask, ratio * SAMPLER.unsqueeze(1)).backward()
    return (-logits.grad).tolist()


def test_importance_weights_recover_the_on_policy_gradient():
    """G-OFF: true gradient; truncated at 2; and the control, uncorrected, which must be another one."""
    assert bandit_gradient(1e6) == pytest.approx([-0.34, 0.0525, 0.2875], abs=1e-6)
    assert bandit_gradient(2.0) == pytest.approx([-0.3, 0.0875, 0.2125], abs=1e-6)
    assert bandit_gradient(None) == pytest.approx([-0.16, 0.06, 0.1], abs=1e-6)
