"""Bradley-Terry and centring against golden vectors, a loop over pairs, and finite differences.

Not covered: reading a score off a model (models.score), ties in the data (algorithms.reward_model).
"""

import itertools
import math

import pytest
import torch

from rlhf.ops.ranking import bradley_terry, centring, ranked_pairs


def loss_of(scores: list[float], margin: float) -> float:
    """Best first, one unit."""
    count = len(scores)
    pairs = ranked_pairs(torch.arange(count).float(), torch.zeros(count, dtype=torch.int64))
    return bradley_terry(torch.tensor(scores), pairs, torch.full((count,), margin)).item()


def test_golden_vectors() -> None:
    """G-BT: a pair, with a margin, with centring, three answers, equal rewards."""
    assert loss_of([2.0, 0.5], 0.0) == pytest.approx(0.20141, abs=1e-5)
    assert loss_of([2.0, 0.5], 1.0) == pytest.approx(0.47408, abs=1e-5)
    assert loss_of([2.0, 1.0, -0.5], 0.0) == pytest.approx(0.19785, abs=1e-5)
    assert loss_of([1.0, 1.0], 0.0) == pytest.approx(math.log(2), abs=1e-5)
    pairs = ranked_pairs(torch.tensor([0.0, 1.0]), torch.zeros(2, dtype=torch.int64))
    assert 0.01 * centring(torch.tensor([2.0, 0.5]), pairs).item() == pytest.approx(0.0625)


def test_equals_a_loop_over_pairs() -> None:
    """Units of 1, 2, 3 and 4 rows, ties, margins: each unit is the mean over its pairs, a unit without pairs 0."""
    random = torch.Generator().manual_seed(0)
    unit = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3, 3])
    ranks = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 2.0, 0.0, 1.0, 1.0])
    scores, margins = torch.randn(10, generator=random), torch.rand(10, generator=random)
    pairs = ranked_pairs(ranks, unit)
    likelihood, centred = 0.0, 0.0
    for u in range(4):
        members = [i for i in range(10) if unit[i] == u]
        terms = [(i, j) for i, j in itertools.permutations(members, 2) if ranks[i] < ranks[j]]
        for i, j in terms:
            sigmoid = 1 / (1 + math.exp(-(scores[i] - scores[j] - margins[i]).item()))
            likelihood -= math.log(sigmoid) / len(terms)
            centred += (scores[i] + scores[j]).item() ** 2 / len(terms)
    assert bradley_terry(scores, pairs, margins).item() == pytest.approx(likelihood, rel=1e-5)
    assert centring(scores, pairs).item() == pytest.approx(centred, rel=1e-5)
    assert pairs.weight.sum().item() == pytest.approx(3.0)


def test_gradient_pushes_the_pair_apart_and_a_constant_does_nothing() -> None:
    """d loss / d r_w = -sigma(r_l - r_w); adding 5 to both changes neither loss nor gradient."""
    pairs = ranked_pairs(torch.tensor([0.0, 1.0]), torch.zeros(2, dtype=torch.int64))
    for shift in (0.0, 5.0):
        scores = torch.tensor([2.0 + shift, 0.5 + shift], requires_grad=True)
        (gradient,) = torch.autograd.grad(bradley_terry(scores, pairs, torch.zeros(2)), scores)
        expected = 1 / (1 + math.exp(1.5))
        assert gradient.tolist() == pytest.approx([-expected, expected], abs=1e-5)


def test_swapping_the_ranks_flips_the_pair() -> None:
    """A control: the loss of (2, 0.5) with the second preferred is 1.5 higher."""
    unit = torch.zeros(2, dtype=torch.int64)
    scores, margins = torch.tensor([2.0, 0.5]), torch.zeros(2)
    right = bradley_terry(scores, ranked_pairs(torch.tensor([0.0, 1.0]), unit), margins)
    wrong = bradley_terry(scores, ranked_pairs(torch.tensor([1.0, 0.0]), unit), margins)
    assert (wrong - right).item() == pytest.approx(1.5, abs=1e-5)


def test_no_pairs_and_far_scores_are_finite() -> None:
    """One row, only ties, a difference of 1e4: no NaN, and the gradient is finite."""
    for ranks, unit in [([0.0], [0]), ([1.0, 1.0], [0, 0]), ([0.0, 1.0], [0, 1])]:
        scores = torch.tensor([1.0] * len(ranks), requires_grad=True)
        pairs = ranked_pairs(torch.tensor(ranks), torch.tensor(unit))
        loss = bradley_terry(scores, pairs, torch.zeros(len(ranks))) + centring(scores, pairs)
        (gradient,) = torch.autograd.grad(loss, scores)
        assert loss.item() == 0 and not gradient.any()
    assert loss_of([-1e4, 1e4], 0.0) == pytest.approx(2e4)
