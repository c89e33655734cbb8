"""Masked sums, whitening. Golden numbers: hand arithmetic in float64. Not covered: GPU, ranks (the caller gathers
first)."""

import pytest
import torch

from rlhf.ops.masked import masked_sum, scale_keep_mean, whiten

ALL3 = torch.ones(3, dtype=torch.bool)


def test_masked_sum_ignores_what_stands_at_false_positions():
    """A NaN under a false mask, and no true position at all. Not covered: gradients (next test)."""
    values = torch.tensor([[1.0, torch.nan], [3.0, torch.inf]])
    mask = torch.tensor([[True, False], [True, False]])
    assert masked_sum(values, mask).item() == 4.0
    assert masked_sum(values, torch.zeros_like(mask)).item() == 0.0


def test_masked_sum_has_no_gradient_at_false_positions():
    """Not covered: a NaN that the masked value's own producer multiplies with that zero."""
    values = torch.tensor([1.0, torch.nan, 3.0], requires_grad=True)
    masked_sum(values, torch.tensor([True, False, True])).backward()
    assert values.grad.tolist() == [1.0, 0.0, 1.0]


def test_whitening_matches_hand_arithmetic():
    """G-WHITEN, the biased standard deviation, both named functions."""
    values = torch.tensor([1.0, 2.0, 3.0])
    assert torch.allclose(whiten(values, ALL3), torch.tensor([-1.22474, 0.0, 1.22474]), atol=1e-5)
    assert torch.allclose(scale_keep_mean(values, ALL3), torch.tensor([0.77526, 2.0, 3.22474]), atol=1e-5)
    four = whiten(torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.ones(4, dtype=torch.bool))
    assert torch.allclose(four, torch.tensor([-0.84853, -0.56569, -0.28284, 1.69706]), atol=1e-5)


def test_masked_positions_do_not_change_the_statistics():
    """Padding with huge values and NaN; their own result is 0."""
    values = torch.tensor([[1.0, 2.0, 1e9], [3.0, 10.0, torch.nan]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    expected = torch.tensor([[-0.84853, -0.56569, 0.0], [-0.28284, 1.69706, 0.0]])
    assert torch.allclose(whiten(values, mask), expected, atol=1e-5)


@pytest.mark.parametrize("values", [[7.0], [0.35] * 7, [-1e8] * 3], ids=["one", "equal", "equal and large"])
def test_one_or_equal_values_give_exactly_zero(values):
    """Never NaN, not even a magnified rounding error; around the kept mean the deviation is zero as well."""
    for dtype in (torch.float32, torch.float64):
        tensor = torch.tensor(values, dtype=dtype)
        mask = torch.ones(len(values), dtype=torch.bool)
        assert whiten(tensor, mask).abs().max().item() == 0.0
        assert torch.allclose(scale_keep_mean(tensor, mask), tensor)


def test_nothing_to_whiten_gives_nothing():
    """An empty batch and an all-false mask."""
    assert whiten(torch.zeros(0), torch.zeros(0, dtype=torch.bool)).shape == (0,)
    assert whiten(torch.tensor([1.0, 5.0]), torch.zeros(2, dtype=torch.bool)).tolist() == [0.0, 0.0]


def test_variance_survives_a_large_mean():
    """E[x^2] - E[x]^2 in float32 gives variance 0 here; the true one is 1.25."""
    values = torch.tensor([1e4, 1e4 + 1, 1e4 + 2, 1e4 + 3])
    whitened = whiten(values, torch.ones(4, dtype=torch.bool))
    assert torch.allclose(whitened, torch.tensor([-1.5, -0.5, 0.5, 1.5]) / 1.25**0.5, atol=1e-4)
