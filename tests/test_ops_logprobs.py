"""Chunked log-probabilities of selected tokens. Not covered: GPU, ZeRO-3 heads, a real model (the learner's tests)."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.ops.logprobs import sequence_logprob, token_logprobs

POSITIONS, WIDTH, VOCABULARY = 10, 6, 50


@pytest.fixture
def case():
    draw = torch.Generator().manual_seed(3)
    head = torch.randn(VOCABULARY, WIDTH, generator=draw)
    hidden = torch.randn(POSITIONS, WIDTH, generator=draw)
    targets = torch.randint(0, VOCABULARY, (POSITIONS,), generator=draw)
    temperature = 0.5 + torch.rand(POSITIONS, generator=draw)
    return head, hidden, targets, temperature


def test_temperature_divides_logits_not_logprobs():
    """G-TEMP: logits (1,2,1,1), token 1. Dividing the log-probability would give -1.06238."""
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0]]).repeat(2, 1)
    logprobs, _ = token_logprobs(lambda x: x, logits, torch.tensor([1, 1]), torch.tensor([1.0, 0.7]), 8)
    assert logprobs.tolist() == pytest.approx([-0.74367, -0.54172], abs=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 10, 512])
def test_chunks_equal_the_whole_softmax_and_its_gradient(case, chunk):
    """Values, entropy and the gradients of states and head, in float64 by hand-written formulas (logsumexp, -sum p
    log p)."""
    head, hidden, targets, temperature = case
    wide_head, wide_hidden = head.double().requires_grad_(), hidden.double().requires_grad_()
    logits = (wide_hidden @ wide_head.T) / temperature.double().unsqueeze(1)
    expected = logits[torch.arange(POSITIONS), targets] - logits.logsumexp(dim=1)
    probabilities = logits.detach().softmax(dim=1)
    coefficients = torch.linspace(-1, 2, POSITIONS)
    (expected * coefficients.double()).sum().backward()

    head, hidden = head.requires_grad_(), hidden.requires_grad_()
    logprobs, entropy = token_logprobs(lambda x: x @ head.T, hidden, targets, temperature, chunk)
    (logprobs * coefficients).sum().backward()
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert torch.allclose(logprobs.double(), expected, atol=1e-6)
    assert torch.allclose(entropy.double(), -(probabilities * probabilities.log()).sum(dim=1), atol=1e-5)
    assert torch.allclose(head.grad.double(), wide_head.grad, atol=1e-5)
    assert torch.allclose(hidden.grad.double(), wide_hidden.grad, atol=1e-5)
    assert not entropy.requires_grad


class LargestTensor(TorchDispatchMode):
    """Sees every tensor that an operation makes, in the forward and in the backward pass."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, torch.Tensor):
                self.elements = max(self.elements, made.numel())
        return result


def test_no_tensor_is_larger_than_a_chunk_of_logits(case):
    """Forward and backward. Control: with a chunk of all positions the spy does see the full size."""
    head, hidden, targets, temperature = case
    seen = {}
    for chunk in (3, POSITIONS):
        states, weight = hidden.clone().requires_grad_(), head[:, :2].clone().requires_grad_()
        with LargestTensor() as spy:
            logprobs, _ = token_logprobs(lambda x, w=weight: x[:, :2] @ w.T, states, targets, temperature, chunk)
            logprobs.sum().backward()
        seen[chunk] = spy.elements
    assert seen == {3: 3 * VOCABULARY, POSITIONS: POSITIONS * VOCABULARY}


def test_half_precision_head_gives_float32_logprobs(case):
    """The softmax of bfloat16 logits is taken in float32. Not covered: autocast."""
    head, hidden, targets, temperature = case
    half = head.bfloat16()
    logprobs, _ = token_logprobs(lambda x: x.bfloat16() @ half.T, hidden, targets, temperature, 4)
    logits = (hidden.bfloat16() @ half.T).float() / temperature.unsqueeze(1)
    expected = logits.gather(1, targets.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=1)
    assert logprobs.dtype == torch.float32
    assert torch.allclose(logprobs, expected, atol=1e-5)


def test_forbidden_tokens_do_not_poison_the_entropy():
    """A logit of minus infinity has probability 0 and adds 0 to the entropy, not NaN."""
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    logprobs, entropy = token_logprobs(lambda x: x, logits, torch.tensor([0]), torch.ones(1), 4)
    assert logprobs.item() == pytest.approx(-0.693147, abs=1e-6)
    assert entropy.item() == pytest.approx(0.693147, abs=1e-6)


def test_no_positions_keep_the_head_in_the_graph(case):
    """A rank without tokens takes part in the backward pass with zero gradients."""
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    logprobs, entropy = token_logprobs(head, hidden, torch.zeros(0, dtype=torch.int64), torch.zeros(0), 4)
    logprobs.sum().backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert head.weight.grad is not None and head.weight.grad.abs().max().item() == 0.0


@pytest.mark.parametrize(("temperature", "chunk", "named"), [(0.0, 4, "temperature 0"), (1.0, 0, "chunk is 0")])
def test_refuses_greedy_samples_and_empty_chunks(temperature, chunk, named):
    """The message says what was found."""
    with pytest.raises(ValueError, match=named):
        token_logprobs(lambda x: x, torch.zeros(1, 3), torch.tensor([0]), torch.tensor([temperature]), chunk)


def test_sequence_logprob_is_a_masked_sum():
    """Not a mean, and blind to what stands at padding."""
    logprobs = torch.tensor([[-1.0, -2.0, torch.nan], [-0.5, torch.nan, torch.nan]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert sequence_logprob(logprobs, mask).tolist() == [-3.0, -0.5]
