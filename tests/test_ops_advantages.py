"""Baselines against hand arithmetic and invariances. Not covered: GPU."""

import pytest
import torch

from rlhf.ops.advantages import leave_one_out, running_mean

ONE_GROUP = torch.zeros(4, dtype=torch.int64)


def test_leave_one_out_equals_hand_arithmetic():
    """G-RLOO, and two samples."""
    advantages = leave_one_out(torch.tensor([1.0, 2.0, 5.0, 8.0]), ONE_GROUP)
    assert advantages.tolist() == pytest.approx([-4.0, -2.66667, 1.33333, 5.33333], abs=1e-5)
    assert leave_one_out(torch.tensor([3.0, 1.0]), ONE_GROUP[:2]).tolist() == [2.0, -2.0]


def test_groups_go_by_id_whatever_their_order_and_size():
    """Uneven groups interleaved; each sample against the plain mean of its others."""
    rewards, group = [1.0, 10.0, 2.0, 3.0, 20.0, 4.5], [7, 3, 7, 7, 3, 3]
    expected = []
    for i, reward in enumerate(rewards):
        others = [r for j, r in enumerate(rewards) if j != i and group[j] == group[i]]
        expected.append(reward - sum(others) / len(others))
    advantages = leave_one_out(torch.tensor(rewards), torch.tensor(group))
    assert advantages.tolist() == pytest.approx(expected, abs=1e-12)


def test_each_group_sums_to_zero_and_ignores_a_constant():
    """Random groups; a constant of 1e6 added to one group."""
    draw = torch.Generator().manual_seed(0)
    rewards = torch.randn(40, generator=draw, dtype=torch.float64)
    group = torch.arange(40) % 5
    advantages = leave_one_out(rewards, group)
    assert torch.zeros(5, dtype=torch.float64).index_add_(0, group, advantages).abs().max() < 1e-12
    assert torch.allclose(leave_one_out(rewards + 1e6 * (group == 2), group), advantages, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(dtype):
    """(.35 x 8): not a rounding error's worth of gradient."""
    group = torch.zeros(8, dtype=torch.int64)
    assert leave_one_out(torch.full((8,), 0.35, dtype=dtype), group).abs().max().item() == 0.0
    winner = leave_one_out(torch.tensor([0.35] * 7 + [0.95], dtype=dtype), group)
    assert winner.tolist() == pytest.approx([-0.6 / 7] * 7 + [0.6], abs=1e-6)


def test_group_of_one_is_refused_by_id():
    """There is no other to compare with; the raw reward is not an advantage."""
    with pytest.raises(ValueError, match=r"groups with one: \[9\]"):
        leave_one_out(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4, 9, 4]))


def test_running_mean_starts_at_zero():
    """G-MA: after batches (1,3) and (5,7) the baseline is 2, then 4."""
    assert running_mean(0.0, 0.0) == 0.0
    assert running_mean(4.0, 2.0) == 2.0
    assert running_mean(16.0, 4.0) == 4.0
