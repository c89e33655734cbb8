"""KL estimators against enumeration: a three-token policy's golden numbers, every sequence of a two-token one, and a
random policy and reference over five tokens, whose exact KL is differentiated (one token, and two).

Not covered: importance weights (test_algorithm_off_policy), the model's log-probs (test_ops_logprobs).
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rlhf.ops.kl import adaptive_coefficient, k1, k2, k3
from rlhf.ops.losses import k2_loss, k2_token_loss, k3_loss, policy_gradient

POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
REVERSE = [0.346243, -0.220389, -0.125854]
FORWARD = [0.3, -0.2, -0.1]
NO_CLAMP = 50.0


def logits_and_rows():
    """The policy's logits, and one row a token: its log-probability (3, 1), the reference's, a full mask."""
    logits = POLICY.log().requires_grad_()
    return logits, logits.log_softmax(0).unsqueeze(1), REFERENCE.log().unsqueeze(1), torch.ones(3, 1, dtype=torch.bool)


def test_expected_values():
    """G-KL: k1 and k3 are unbiased for the reverse KL .223805 (forward .193794, wrong sign in k3 .339529); k2 is
    biased."""
    log_ratio = POLICY.log() - REFERENCE.log()
    estimates = [k1(log_ratio), k2(log_ratio), k3(log_ratio, NO_CLAMP)[0]]
    expected = [(POLICY * estimate).sum().item() for estimate in estimates]
    assert expected == pytest.approx([0.223805, 0.265479, 0.223805], abs=1e-6)
    assert (k3(log_ratio, NO_CLAMP)[0] >= 0).all()


def test_k1_in_the_reward_has_the_gradient_of_the_reverse_kl():
    """Expectation over all tokens: the policy gradient of the detached cost k1."""
    logits, logprobs, reference, mask = logits_and_rows()
    policy_gradient(logprobs, -k1(logprobs - reference).detach(), mask, POLICY.unsqueeze(1)).backward()
    assert logits.grad.tolist() == pytest.approx(REVERSE, abs=1e-6)


@pytest.mark.parametrize("loss", [k2_loss, k2_token_loss])
def test_k2_as_a_loss_has_the_gradient_of_the_reverse_kl(loss):
    """Expectation over all tokens: the weights are the probabilities. For one token the two forms are the same."""
    logits, logprobs, reference, mask = logits_and_rows()
    loss(logprobs, reference, mask, POLICY.unsqueeze(1)).backward()
    assert logits.grad.tolist() == pytest.approx(REVERSE, abs=1e-6)


def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl():
    """GRPO's default pulls along KL(reference || policy), which the configuration says."""
    logits, logprobs, reference, mask = logits_and_rows()
    loss, clamped = k3_loss(logprobs, reference, mask, POLICY.unsqueeze(1), NO_CLAMP)
    loss.backward()
    assert logits.grad.tolist() == pytest.approx(FORWARD, abs=1e-6)
    assert clamped.item() == 0


def test_k1_as_a_loss_has_no_gradient_and_k3_in_the_reward_a_wrong_one():
    """Controls: what a mistaken use of the same functions gives, so that the tests above cannot pass by accident."""
    logits, logprobs, reference, _ = logits_and_rows()
    (POLICY * k1(logprobs - reference).squeeze(1)).sum().backward()
    assert logits.grad.abs().max().item() == pytest.approx(0.0, abs=1e-12)
    logits, logprobs, reference, mask = logits_and_rows()
    cost = k3(logprobs - reference, NO_CLAMP)[0].detach()
    policy_gradient(logprobs, -cost, mask, POLICY.unsqueeze(1)).backward()
    assert logits.grad.tolist() == pytest.approx([0.046243, -0.020389, -0.025854], abs=1e-6)


def two_token_sequences():
    """All four sequences of a two-token policy whose second token depends on the first, and the gradient of their
    exact KL.

    Returns logits (3, 2) (start, after 0, after 1), logprobs (4, 2), reference logprobs (4, 2), and the KL's gradient
    (3, 2).
    """
    start = torch.tensor([[0.3, -0.2], [1.0, -0.5], [-0.7, 0.4]], dtype=torch.float64)
    reference = torch.tensor([[-0.4, 0.1], [0.2, 0.3], [0.5, -0.9]], dtype=torch.float64).log_softmax(1)
    first, second = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])

    def tokens(table):
        return torch.stack([table[0, first], table[1 + first, second]], dim=1)

    exact = start.clone().requires_grad_()
    logprobs = tokens(exact.log_softmax(1))
    (logprobs.sum(1).exp() * (logprobs - tokens(reference)).sum(1)).sum().backward()
    logits = start.clone().requires_grad_()
    return logits, tokens(logits.log_softmax(1)), tokens(reference), exact.grad


def test_sequence_k2_is_the_gradient_of_the_sequence_kl_where_token_k2_is_not():
    """Enumeration of all sequences; control: the sum of the tokens' squares misses what the first token does to the
    second."""
    logits, logprobs, reference, expected = two_token_sequences()
    mask, weights = torch.ones(4, 2, dtype=torch.bool), logprobs.detach().sum(1, keepdim=True).exp().expand(4, 2)
    k2_loss(logprobs, reference, mask, weights).backward()
    assert torch.allclose(logits.grad, expected, atol=1e-12)

    logits, logprobs, reference, expected = two_token_sequences()
    k2_token_loss(logprobs, reference, mask, weights).backward()
    assert (logits.grad[0] - expected[0]).abs().max() > 0.01


def test_sequence_k1_in_the_reward_is_the_gradient_of_the_sequence_kl():
    """The summed k1 as a bandit's cost."""
    logits, logprobs, reference, expected = two_token_sequences()
    mask, weights = torch.ones(4, 2, dtype=torch.bool), logprobs.detach().sum(1, keepdim=True).exp().expand(4, 2)
    cost = k1(logprobs - reference).detach().sum(1, keepdim=True).expand(4, 2)
    policy_gradient(logprobs, -cost, mask, weights).backward()
    assert torch.allclose(logits.grad, expected, atol=1e-12)


class Sequences(NamedTuple):
    """Every completion of `length` tokens over a vocabulary of five, where the second token depends on the first.

    logits (P, 5) of the policy, with gradient, one row a prefix (none, then each first token); logprobs and reference
    (N, length); probability (N, length), detached, of the whole completion; policy and ref (P, 5), log-softmax rows.
    """

    logits: Tensor
    logprobs: Tensor
    reference: Tensor
    probability: Tensor
    policy: Tensor
    ref: Tensor


def sequences(length: int) -> Sequences:
    """A random policy and a random reference, about a nat apart."""
    random = torch.Generator().manual_seed(11)
    prefixes = 1 if length == 1 else 6
    logits, other = (torch.randn(prefixes, 5, generator=random, dtype=torch.float64) for _ in range(2))
    policy, ref = logits.requires_grad_().log_softmax(1), other.log_softmax(1)
    if length == 1:
        logprobs, reference = policy[0][:, None], ref[0][:, None]
    else:
        first, second = (place.flatten() for place in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
        logprobs, reference = (torch.stack([t[0, first], t[1 + first, second]], 1) for t in (policy, ref))
    probability = logprobs.detach().sum(1, keepdim=True).exp().expand_as(logprobs)
    return Sequences(logits, logprobs, reference, probability, policy, ref)


def of_sequences(one: Sequences, *, forward: bool) -> Tensor:
    """KL(policy || reference) of whole completions, or KL(reference || policy): the sum over all of them."""
    policy, reference = one.logprobs.sum(1), one.reference.sum(1)
    if forward:
        return (reference.exp() * (reference - policy)).sum()
    return (policy.exp() * (policy - reference)).sum()


def of_next_tokens(one: Sequences, *, forward: bool) -> Tensor:
    """The KL of the next token, summed over the places of a completion; the policy draws what stands before it, and
    that draw has no gradient here."""
    reached = torch.cat([torch.ones(1, dtype=torch.float64), one.policy[0].exp()])[: len(one.policy)].detach()
    above, below = (one.ref, one.policy) if forward else (one.policy, one.ref)
    return (reached * (above.exp() * (above - below)).sum(1)).sum()


def k1_in_the_reward(one: Sequences, mask: Tensor) -> Tensor:
    cost = k1(one.logprobs - one.reference).detach().sum(1, keepdim=True).expand_as(mask)
    return policy_gradient(one.logprobs, -cost, mask, one.probability)


def k2_as_a_loss(one: Sequences, mask: Tensor) -> Tensor:
    return k2_loss(one.logprobs, one.reference, mask, one.probability)


def k2_of_tokens_as_a_loss(one: Sequences, mask: Tensor) -> Tensor:
    return k2_token_loss(one.logprobs, one.reference, mask, one.probability)


def k3_as_a_loss(one: Sequences, mask: Tensor) -> Tensor:
    return k3_loss(one.logprobs, one.reference, mask, one.probability, NO_CLAMP)[0]


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize(
    ("estimator", "exact", "forward"),
    [
        (k1_in_the_reward, of_sequences, False),
        (k2_as_a_loss, of_sequences, False),
        (k2_of_tokens_as_a_loss, of_next_tokens, False),
        (k3_as_a_loss, of_next_tokens, True),
    ],
)
def test_expected_gradient_of_each_estimator_is_that_of_the_exact_kl_over_five_tokens(
    length: int,
    estimator: Callable[[Sequences, Tensor], Tensor],
    exact: Callable[..., Tensor],
    forward: bool,
) -> None:
    """Expectation by enumeration (5 tokens, 25 completions) against autograd of the exact KL, every logit to 1e-12.

    k1 in the reward and k2 as a loss: the reverse KL of whole completions. k3 as a loss: the forward KL. It and the
    tokens' k2 take it token by token, so that of two tokens the prefixes stay the policy's. Control: the other KL.
    """
    one = sequences(length)
    mask = torch.ones_like(one.logprobs, dtype=torch.bool)
    (found,) = torch.autograd.grad(estimator(one, mask), one.logits, retain_graph=True)
    (expected,) = torch.autograd.grad(exact(one, forward=forward), one.logits, retain_graph=True)
    (other,) = torch.autograd.grad(exact(one, forward=not forward), one.logits)
    assert torch.allclose(found, expected, atol=1e-12)
    assert not torch.allclose(found, other, atol=0.01)


@pytest.mark.parametrize("length", [1, 2])
def test_k1_as_a_loss_has_no_expected_gradient_over_five_tokens(length: int) -> None:
    """Each completion's own gradient is far from 0; their expectation is 0 at every logit."""
    one = sequences(length)
    (found,) = torch.autograd.grad((one.probability * k1(one.logprobs - one.reference)).sum(), one.logits)
    assert found.abs().max().item() == pytest.approx(0.0, abs=1e-12)


def test_forward_kl_of_completions_is_not_what_k3_of_tokens_pulls_along() -> None:
    """Two tokens: k3 reads the reference along prefixes of the POLICY, the completions' forward KL along its own."""
    one, mask = sequences(2), torch.ones(25, 2, dtype=torch.bool)
    (tokens,) = torch.autograd.grad(k3_as_a_loss(one, mask), one.logits, retain_graph=True)
    (whole,) = torch.autograd.grad(of_sequences(one, forward=True), one.logits)
    assert torch.allclose(tokens[0], whole[0], atol=1e-12) and not torch.allclose(tokens[1:], whole[1:], atol=0.01)


def test_k2_loss_without_weights_is_half_the_square_of_the_sum():
    """The value that is logged; the masked position, NaN in both columns, is not in it."""
    logprobs = torch.tensor([[-1.0, -2.0, torch.nan]], requires_grad=True)
    reference = torch.tensor([[-1.5, -1.0, torch.nan]])
    mask = torch.tensor([[True, True, False]])
    loss = k2_loss(logprobs, reference, mask, torch.ones(1, 3))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0.5 - 1.0) ** 2)
    assert logprobs.grad.tolist() == [[-0.5, -0.5, 0.0]]


def test_k3_clamp_is_counted():
    """G-K3 values; beyond the clamp the value stays, the gradient is 0 and the position is reported."""
    log_ratio = torch.tensor([-10.0, -1.0, 1.0, 10.0], dtype=torch.float64)
    free, clamped = k3(log_ratio, NO_CLAMP)
    assert free.tolist() == pytest.approx([22015.4658, 0.71828, 0.36788, 9.00005], abs=1e-4)
    assert not clamped.any()
    held, clamped = k3(log_ratio, 5.0)
    assert held.tolist() == pytest.approx([142.41316, 0.71828, 0.36788, 4.00674], abs=1e-4)
    assert clamped.tolist() == [True, False, False, True]


def test_long_answers_far_from_the_reference_stay_finite():
    """4096 tokens, each 100 nats under the reference: a finite loss and gradient, all positions counted."""
    logprobs = torch.full((1, 4096), -120.0, requires_grad=True)
    mask = torch.ones(1, 4096, dtype=torch.bool)
    loss, clamped = k3_loss(logprobs, torch.full((1, 4096), -20.0), mask, torch.ones(1, 4096), 20.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logprobs.grad).all()
    assert clamped.item() == 4096


@pytest.mark.parametrize(("kl", "expected"), [(9.0, 0.050512), (3.0, 0.049488), (6.0, 0.05)])
def test_adaptive_coefficient(kl, expected):
    """G-AKL: target 6, horizon 10 000, 512 samples."""
    assert adaptive_coefficient(0.05, kl, 6.0, 512, 10_000.0) == pytest.approx(expected, abs=1e-9)


def test_no_step_turns_the_price_negative():
    """The least factor, 1 - 0.2 samples / horizon, reaches 0 at five horizons a step."""
    assert 0 < adaptive_coefficient(0.05, 0.0, 6.0, 499, 100.0) < 1e-3
    with pytest.raises(ValueError, match="horizon of 100 for 500 samples a step: expected more than a fifth"):
        adaptive_coefficient(0.05, 0.0, 6.0, 500, 100.0)
