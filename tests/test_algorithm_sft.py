"""SFT: the loss against the model's own, and its independence of packing and micro-batches.

Not covered: several ranks (tests of the learner), long contexts.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.algorithms.sft import build
from rlhf.buffer.offline import Completion, dataset_group
from rlhf.config import RunConfig, SftConfig
from rlhf.experience import Group, Prompt
from rlhf.learner.learner import PolicyLearner
from rlhf.metrics import values
from rlhf.models.resolve import resolve

# With eps 1 the first step of AdamW is lr g / (|g| + 1): differences of parameters are those of gradients.
LINEAR = {"engine": "torch", "adam_eps": 1.0, "lr": 1.0, "max_grad_norm": 1e9}


def demonstration(number: int, prompt: list[int], answer: list[int], mask: list[int]) -> Group:
    issued = Prompt(number, number, 0, "", "", np.array(prompt, dtype=np.int32), {})
    completion = Completion(np.array(answer, dtype=np.int32), np.array(mask, dtype=np.bool_), "", None)
    return dataset_group(issued, [completion])


@pytest.fixture
def groups() -> list[Group]:
    """Seven demonstrations of uneven length; about a fifth of the tokens is masked, as a user's turn would be."""
    random = np.random.default_rng(3)
    made = []
    for number in range(7):
        answer = [*random.integers(5, 320, random.integers(1, 20)).tolist(), 1]
        mask = [*(random.random(len(answer) - 1) < 0.8).astype(int).tolist(), 1]
        prompt = [0, *random.integers(5, 320, random.integers(1, 12)).tolist()]
        made.append(demonstration(number, prompt, answer, mask))
    return made


def learner(**settings: Any) -> PolicyLearner:
    config = RunConfig.model_validate(
        {
            "model": {"name": "tiny"},
            "algorithm": {"name": "sft"},
            "data": {"path": "unused.jsonl"},
            "loop": {"num_steps": 4, "groups_per_step": 7},
            "learner": {**LINEAR, **settings},
        }
    )
    made = PolicyLearner(config, build(SftConfig(name="sft")), 0, 1, None)
    made.setup()
    return made


def tensors(of: PolicyLearner) -> dict[str, Tensor]:
    weights = of.publish()
    assert weights is not None
    return {name: tensor.unpack().clone() for name, tensor in weights.tensors.items()}


def test_loss_and_gradient_are_those_of_the_model_itself(groups: list[Group]) -> None:
    """Reference: transformers' own loss with labels -100 at what is not trained, a token mean over all rows."""
    model = AutoModelForCausalLM.from_pretrained(resolve("tiny"), dtype=torch.float32)
    width = max(len(g.prompt.token_ids) + len(g.samples[0].token_ids) for g in groups)
    ids = torch.zeros(len(groups), width, dtype=torch.long)
    attended, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, group in enumerate(groups):
        (sample,) = group.samples
        start, end = len(group.prompt.token_ids), len(group.prompt.token_ids) + len(sample.token_ids)
        ids[i, :end] = torch.tensor(np.concatenate([group.prompt.token_ids, sample.token_ids]))
        attended[i, :end] = 1
        labels[i, start:end] = torch.where(torch.tensor(sample.loss_mask), ids[i, start:end], -100)
    expected = model(input_ids=ids, attention_mask=attended, labels=labels).loss
    expected.backward()

    ours = learner()
    before = tensors(ours)
    measured = values(ours.update(ours.prepare(groups)))
    assert measured["loss/nll"] == pytest.approx(expected.item(), abs=1e-5)
    trained = sum(int(group.samples[0].loss_mask.sum()) for group in groups)
    assert measured["tokens/trained"] == trained
    after = tensors(ours)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        step = gradient / (gradient.abs() + 1.0)
        assert torch.allclose(before[name] - after[name], step, atol=1e-5), name


@pytest.mark.parametrize(
    "settings",
    [{"packing": True}, {"packing": True, "tokens_per_microbatch": 40}, {"tokens_per_microbatch": 1}],
)
def test_packing_changes_neither_loss_nor_gradient(groups: list[Group], settings: dict[str, Any]) -> None:
    """Trap 30 with a token mean over rows of uneven length, which is where means of means differ."""
    one, other = learner(), learner(**settings)
    first, second = one.update(one.prepare(groups)), other.update(other.prepare(groups))
    assert values(second)["loss/nll"] == pytest.approx(values(first)["loss/nll"], abs=1e-6)
    left, right = tensors(one), tensors(other)
    assert max(float((left[name] - right[name]).abs().max()) for name in left) <= 1e-6


def test_masked_tokens_teach_nothing_and_the_end_does() -> None:
    """Exact: the gradient with respect to the log-probs is -1 at trained tokens, the EOS included, and 0 elsewhere."""
    from rlhf.algorithms.sft import loss
    from rlhf.ops.microbatch import MicroBatch, Outputs

    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, False, True], [True, False, False]])
    sums = loss(Outputs(logprobs, torch.zeros(2, 3)), MicroBatch(mask, torch.ones(2), torch.arange(2), {}))
    sums.loss.backward()
    assert sums.loss.item() == 8.0 and logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-1.0, 0.0, -1.0], [-1.0, 0.0, 0.0]]
    assert [float(part) for part in sums.means["loss/nll"]] == [8.0, 3.0]


def test_evaluation_measures_and_changes_nothing(groups: list[Group]) -> None:
    """Held-out loss equals the loss that a step then reports, in another cut; the weights stay as they were."""
    ours = learner(tokens_per_microbatch=30)
    before = ours.publish()
    seen = values(ours.evaluate(groups))
    after = ours.publish()
    assert before is not None and after is not None and before.fingerprint == after.fingerprint
    step = values(learner().update(learner().prepare(groups)))
    assert seen["loss/nll"] == pytest.approx(step["loss/nll"], abs=1e-6)
    assert seen["completion/length_mean"] == step["completion/length_mean"]


def test_a_group_of_two_is_no_demonstration(sampled_groups: Callable[..., list[Group]]) -> None:
    with pytest.raises(ValueError, match="prompt 0 has 2 samples"):
        build(SftConfig(name="sft")).prepare(sampled_groups(0, 1, 2, 0, 1.0), {})
