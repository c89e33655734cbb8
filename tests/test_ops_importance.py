"""Importance weights, rejection and the decoupled objective against enumeration of a small autoregressive policy.

Five tokens, completions of one or two of them, every one of the 30 enumerated in float64, so that expectations are
exact. Not covered: the learner, several ranks, what a correction is worth in a run (test_staleness_learning).
"""

import itertools
import math

import pytest
import torch

from rlhf.ops.importance import effective_share, importance_weights, outside_bounds
from rlhf.ops.losses import clipped_policy_loss, policy_gradient

VOCABULARY, END, LENGTH = 5, 0, 2
FAR = 1e9
DRAW = torch.Generator().manual_seed(3)
REWARDS = torch.randn(VOCABULARY, VOCABULARY, generator=DRAW, dtype=torch.float64)
POLICY = torch.randn(VOCABULARY + 1, VOCABULARY, generator=DRAW, dtype=torch.float64)
SAMPLER = POLICY + 0.7 * torch.randn(VOCABULARY + 1, VOCABULARY, generator=DRAW, dtype=torch.float64)


def completions():
    """Token 0 ends a completion: (0,), then (a, b) for a in 1..4 and any b."""
    yield (END,)
    yield from itertools.product(range(1, VOCABULARY), range(VOCABULARY))


ALL = list(completions())
MASK = torch.tensor([[True, len(y) == LENGTH] for y in ALL])
RETURNS = torch.tensor([REWARDS[y[0], y[-1]] for y in ALL], dtype=torch.float64)


def says(logits):
    """(21, 2) log-probabilities of every completion under a table of logits: row 5 starts, row a follows token a."""
    table = logits.log_softmax(-1)
    second = [table[y[0], y[1]] if len(y) == LENGTH else torch.tensor(torch.nan, dtype=torch.float64) for y in ALL]
    return torch.stack([torch.stack([table[VOCABULARY, y[0]] for y in ALL]), torch.stack(second)], dim=1)


def probabilities(logprobs):
    return torch.where(MASK, logprobs, 0).sum(1).exp()


def true_gradient():
    """grad of E_pi[R], by differentiating the expectation itself: no estimator, no log-derivative trick."""
    logits = POLICY.clone().requires_grad_()
    (probabilities(says(logits)) * RETURNS).sum().backward()
    return logits.grad


def estimated_gradient(weigh):
    """E_b[sum_t w_t R grad l_t] over all completions of the sampler; weigh(log-ratios) -> (21, 2)."""
    logits = POLICY.clone().requires_grad_()
    logprobs, sampled = says(logits), says(SAMPLER)
    weights = weigh(logprobs.detach() - sampled) * probabilities(sampled)[:, None]
    policy_gradient(logprobs, RETURNS[:, None].expand(-1, LENGTH), MASK, weights).backward()
    return -logits.grad


def corrected(level, cap):
    return estimated_gradient(lambda difference: importance_weights(difference, MASK, level, cap).weights)


def test_enumeration_is_complete():
    """Both policies' completions have total probability 1."""
    assert len(ALL) == 21
    for logits in (POLICY, SAMPLER):
        assert probabilities(says(logits)).sum().item() == pytest.approx(1.0)


def test_sequence_weights_without_truncation_are_unbiased_and_the_control_is_not():
    """The true gradient is found from the sampler's completions; without weights it is another one."""
    true = true_gradient()
    assert torch.allclose(corrected("sequence", FAR), true, atol=1e-12)
    uncorrected = estimated_gradient(torch.ones_like)
    assert (uncorrected - true).norm() > 0.3 * true.norm()


def test_token_weights_are_biased_for_longer_completions_but_less_than_none():
    """What a token's weight leaves out is what the other token did: the estimator is that of each token alone."""
    true, found = true_gradient(), corrected("token", FAR)
    bias, uncorrected_bias = (found - true).norm(), (estimated_gradient(torch.ones_like) - true).norm()
    assert 0.01 < bias < uncorrected_bias


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_one_token_completions_are_corrected_exactly_by_either_level(level):
    """G-OFF by enumeration: without truncation the true gradient; truncated at 2 a known other one; none another."""
    policy, sampler = (torch.tensor(p, dtype=torch.float64) for p in ((0.4, 0.35, 0.25), (0.7, 0.2, 0.1)))
    mask, rewards = torch.ones(3, 1, dtype=torch.bool), torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)

    def gradient(cap):
        logits = policy.log().requires_grad_()
        logprobs = logits.log_softmax(0).unsqueeze(1)
        weights = importance_weights(logprobs - sampler.log().unsqueeze(1), mask, level, cap).weights
        policy_gradient(logprobs, rewards, mask, weights * sampler.unsqueeze(1)).backward()
        return (-logits.grad).tolist()

    assert gradient(FAR) == pytest.approx([-0.34, 0.0525, 0.2875], abs=1e-12)
    assert gradient(2.0) == pytest.approx([-0.3, 0.0875, 0.2125], abs=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_bias_of_truncation_is_what_was_cut_off(level):
    """found - untruncated = -E_b[(ratio - C)+ R grad l], exactly; it grows as the cap falls, and vanishes above the
    largest ratio."""
    untruncated, biases = corrected(level, FAR), []
    for cap in (8.0, 2.0, 1.0, 0.5):
        cut = estimated_gradient(
            lambda difference, cap=cap: (importance_weights(difference, MASK, level, FAR).weights - cap).clamp(min=0)
        )
        assert torch.allclose(corrected(level, cap) - untruncated, -cut, atol=1e-12)
        biases.append(cut.norm().item())
    assert biases == sorted(biases) and biases[1] > 0.01
    difference = says(POLICY) - says(SAMPLER)
    largest = importance_weights(difference, MASK, level, FAR).weights.max().item()
    assert torch.equal(corrected(level, largest * 1.001), untruncated)


@pytest.mark.parametrize("span", ["token", "sequence", "sequence_mean"])
def test_bias_of_rejection_is_what_was_rejected(span):
    """With weights 1 inside and 0 outside, kept and rejected parts add up to the uncorrected gradient."""
    low, high = 0.5, 1.5

    def part(inside):
        def weigh(difference):
            out = outside_bounds(difference, MASK, span, low, high)
            return (out != inside).double()

        return estimated_gradient(weigh)

    kept, rejected = part(True), part(False)
    assert torch.allclose(kept + rejected, estimated_gradient(torch.ones_like), atol=1e-12)
    assert rejected.norm() > 0.01 and kept.norm() > 0.01


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_sampler_that_is_the_policy_weighs_exactly_one_and_nothing_is_rejected(level):
    """Identity at ratio 1, to the bit, whatever stands at padding."""
    same = torch.zeros(2, 3)
    same[1, 2] = torch.nan
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = importance_weights(same, mask, level, 1.0)
    assert torch.equal(found.weights, torch.ones(2, 3)) and not found.truncated.any()
    for span in ("token", "sequence", "sequence_mean"):
        assert not outside_bounds(same, mask, span, 0.999, 1.001).any()
    assert effective_share(found.weights[mask]) == 1.0


# G-TIS: differences (0, .5, 2).
GOLDEN = torch.tensor([[0.0, 0.5, 2.0]])
WHOLE = torch.ones(1, 3, dtype=torch.bool)


def test_golden_truncated_weights_and_effective_sample_size():
    """G-TIS, cap 2: (1, 1.64872, 2), ESS 2.79992 of 3; untruncated 1.72776."""
    found = importance_weights(GOLDEN, WHOLE, "token", 2.0)
    assert found.weights[0].tolist() == pytest.approx([1.0, 1.64872, 2.0], abs=1e-5)
    assert found.truncated[0].tolist() == [False, False, True]
    assert 3 * effective_share(found.weights[0]) == pytest.approx(2.79992, abs=1e-5)
    raw = importance_weights(GOLDEN, WHOLE, "token", FAR).weights[0]
    assert 3 * effective_share(raw) == pytest.approx(1.72776, abs=1e-5)


def test_golden_bounds():
    """IcePop's band [.5, 5] drops the third token; the sequence's ratio is 12.18249, its geometric mean 2.30098."""
    assert outside_bounds(GOLDEN, WHOLE, "token", 0.5, 5.0)[0].tolist() == [False, False, True]
    for span, ratio in (("sequence", 12.18249), ("sequence_mean", 2.30098)):
        assert outside_bounds(GOLDEN, WHOLE, span, 0.5, ratio - 1e-3).all()
        assert not outside_bounds(GOLDEN, WHOLE, span, 0.0, ratio + 1e-3).any()
        assert outside_bounds(GOLDEN, WHOLE, span, ratio + 1e-3, FAR).all()


def test_masked_tokens_are_not_part_of_a_sequence():
    """A tool's token between two of the policy: neither its ratio nor its place in the length counts."""
    mask = torch.tensor([[True, False, True]])
    difference = torch.tensor([[math.log(2.0), 50.0, math.log(2.0)]])
    assert importance_weights(difference, mask, "sequence", 9.0).weights[0].tolist() == pytest.approx([4.0, 1.0, 4.0])
    assert not outside_bounds(difference, mask, "sequence_mean", 1.9, 2.1).any()
    assert outside_bounds(difference, mask, "sequence", 1.9, 2.1)[0].tolist() == [True, False, True]


def test_long_sequences_and_huge_ratios_stay_finite():
    """Trap 32: 4096 tokens of .2, where exp would be e^819; every token counted as truncated."""
    difference, mask = torch.full((1, 4096), 0.2), torch.ones(1, 4096, dtype=torch.bool)
    found = importance_weights(difference, mask, "sequence", 2.0)
    assert found.weights[0].tolist() == pytest.approx([2.0] * 4096) and found.truncated.all()
    below = importance_weights(-difference, mask, "sequence", 2.0)
    assert torch.isfinite(below.weights).all() and not below.truncated.any()
    assert effective_share(torch.tensor([1e30, 1e30], dtype=torch.float64)) == pytest.approx(1.0)
    assert effective_share(torch.zeros(3)) == 0.0


def test_weights_have_no_gradient():
    difference = torch.zeros(1, 3, requires_grad=True)
    assert not importance_weights(difference, WHOLE, "sequence", 2.0).weights.requires_grad


def test_decoupled_objective_moves_where_the_coupled_one_is_stuck():
    """G-DEC: pi_old / pi_b = 1.5, pi / pi_old = 1.3, A = 1. Decoupled -1.8; coupled, the ratio 1.95 is clipped: -1.2.

    Inside the clip both have the same gradient, that of the ratio to the sampler.
    """
    behavior = torch.tensor([[-3.0]])
    old = behavior + math.log(1.5)
    mask, one = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1)
    weights = importance_weights(old - behavior, mask, "token", 2.0).weights

    def loss(ratio, centre, weight):
        logprobs = (old + math.log(ratio)).requires_grad_()
        value = clipped_policy_loss(logprobs, centre, one, mask, weight, 0.2, 0.2, None).loss
        value.backward()
        return value.item(), logprobs.grad.item()

    assert loss(1.3, old, weights)[0] == pytest.approx(-1.8, abs=1e-5)
    assert loss(1.3, behavior, one) == (pytest.approx(-1.2, abs=1e-5), 0.0)
    assert loss(1.1, old, weights) == (pytest.approx(-1.65, abs=1e-5), pytest.approx(-1.65, abs=1e-5))
    assert loss(0.75, behavior, one) == (pytest.approx(-1.125, abs=1e-5), pytest.approx(-1.125, abs=1e-5))
    # The recentred clip leaves a gradient where the sampler is behind, which is what makes stale samples useful.
    assert loss(1.0, old, weights)[1] == pytest.approx(-1.5, abs=1e-5) and loss(1.0, behavior, one)[1] == 0.0
