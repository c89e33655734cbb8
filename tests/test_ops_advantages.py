"""Baselines against hand arithmetic and invariances. Not covered: GPU."""

import pytest
import torch

from rlhf.ops.advantages import group_deviation, group_standardized, leave_one_out, returns_to_go, running_mean

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


@pytest.mark.parametrize(("unbiased", "expected"), [(False, [1.73205] + [-0.57735] * 3), (True, [1.5] + [-0.5] * 3)])
def test_grpo_golden_numbers(unbiased, expected):
    """G-GRPO: (1,0,0,0) with the standard deviation over n and over n - 1."""
    rewards, group = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.int64)
    found = group_standardized(rewards, group, unbiased=unbiased, eps=0.0)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_deviation_golden_numbers():
    """G-GRPO without the std (Dr. GRPO), and G-RPP's second form before whitening; shuffled groups go by id."""
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    group = torch.tensor([5, 2, 5, 2, 5, 5, 9])
    expected = [0.75, 0.5, -0.25, -0.5, -0.25, -0.25, 0.0]
    assert group_deviation(rewards, group).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("rewards", [(3.0, 1.0), (0.001, 0.0), (900.0, -900.0)])
def test_with_two_samples_the_magnitude_is_lost(rewards):
    """n = 2: (1,-1) with the biased and .70711 with the unbiased deviation, whatever the rewards."""
    pair, group = torch.tensor(rewards, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    assert group_standardized(pair, group, unbiased=False, eps=0.0).tolist() == pytest.approx([1.0, -1.0])
    assert group_standardized(pair, group, unbiased=True, eps=0.0).tolist() == pytest.approx(
        [0.70711, -0.70711], abs=1e-5
    )


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_spread_is_no_advantage_and_little_spread_does_not_explode(unbiased, dtype):
    """Trap 26: one sample, (.35 x 8), and (.35 x 7, .95), also on top of 1e4; eps 0 gives no NaN."""

    def standardized(rewards):
        group = torch.zeros(len(rewards), dtype=torch.int64)
        return group_standardized(torch.tensor(rewards, dtype=dtype), group, unbiased=unbiased, eps=0.0)

    assert standardized([7.0]).tolist() == [0.0]
    assert standardized([0.35] * 8).tolist() == [0.0] * 8
    winner = standardized([0.35] * 7 + [0.95])
    assert winner.abs().max() < 10 and winner[-1] > 2
    assert torch.allclose(standardized([1e4, 1e4 + 1, 1e4 + 2, 1e4 + 3]), standardized([0.0, 1.0, 2.0, 3.0]), atol=1e-6)


def test_standardized_ignores_scale_and_shift_and_sums_to_zero():
    """Random groups of 8; the same up to r -> 3 r + 7. Against the definition written out with Python's own sums."""
    draw = torch.Generator().manual_seed(0)
    rewards, group = torch.randn(40, generator=draw, dtype=torch.float64), torch.arange(40) % 5
    found = group_standardized(rewards, group, unbiased=True, eps=0.0)
    assert torch.allclose(group_standardized(3 * rewards + 7, group, unbiased=True, eps=0.0), found, atol=1e-9)
    for i in range(5):
        own = rewards[group == i].tolist()
        mean = sum(own) / 8
        std = (sum((r - mean) ** 2 for r in own) / 7) ** 0.5
        assert found[group == i].tolist() == pytest.approx([(r - mean) / std for r in own], abs=1e-9)
    assert torch.zeros(5, dtype=torch.float64).index_add_(0, group, found).abs().max() < 1e-9


def test_eps_is_added_to_the_deviation():
    """Rewards (1,-1): biased deviation 1, so eps 1 halves the advantage."""
    found = group_standardized(torch.tensor([1.0, -1.0]), torch.zeros(2, dtype=torch.int64), unbiased=False, eps=1.0)
    assert found.tolist() == [0.5, -0.5]


def test_returns_to_go_skip_masked_tokens():
    """What stands at a masked token is not paid, NaN included, and a masked token has no return."""
    rewards = torch.tensor([[1.0, torch.nan, 2.0, 4.0], [1.0, 1.0, 1.0, 9.0]])
    mask = torch.tensor([[True, False, True, True], [True, True, True, False]])
    assert returns_to_go(rewards, mask).tolist() == [[7.0, 0.0, 6.0, 4.0], [3.0, 2.0, 1.0, 0.0]]
