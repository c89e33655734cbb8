"""What the learner divides a step's loss by, whatever the micro-batches and ranks: the gradient of one step of the real
learner (torch engine) against autograd of the loss as its paper writes it, row by row on the transformers model.

Trap 30: a mean of micro-batches' means is another number wherever rows or tokens are spread unevenly over them. Ranks
are two learners in this process, told which of two they are, whose gradients are added here. Not covered: DeepSpeed's
own sum over ranks (test_learner_deepspeed), minibatches, RLOO and packing (test_learner_update).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from rlhf.algorithms.table import build
from rlhf.buffer.offline import Completion, dataset_group
from rlhf.config import RunConfig
from rlhf.experience import Group, Sample
from rlhf.learner.learner import PolicyLearner

LIMIT, TEMPERATURE, STD_EPS, BETA = 16, 0.7, 1e-4, 0.1  # the first two are those of the fixtures' samples
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant")


def masked(groups: Sequence[Group]) -> list[Group]:
    """The groups with every fourth token left out of the loss, so that neither rows nor columns count it."""
    made = []
    for group in groups:
        masks = [np.arange(len(sample.token_ids)) % 4 != 2 for sample in group.samples]
        made.append(
            replace(group, samples=tuple(replace(s, loss_mask=m) for s, m in zip(group.samples, masks, strict=True)))
        )
    return made


def as_given(groups: Sequence[Group], answers: int) -> list[Group]:
    """The same prompts and answers as a data set would hold them, the first preferred, with a reference's log-probs."""
    random, made = np.random.default_rng(5), []
    for group in groups:
        completions = [
            Completion(sample.token_ids, sample.loss_mask, f"answer {sample.index}", float(sample.index))
            for sample in group.samples[:answers]
        ]
        given = dataset_group(group.prompt, completions)
        columns = [-6 + random.random(len(s.token_ids)).astype(np.float32) for s in given.samples]
        told = tuple(replace(s, tokens={"ref_logprobs": c}) for s, c in zip(given.samples, columns, strict=True))
        made.append(replace(given, samples=told))
    return made


def said(model: nn.Module, group: Group, sample: Sample, temperature: float) -> Tensor:
    """Log-probs of the trained tokens of one answer, by the transformers model itself, alone in its batch."""
    ids = torch.from_numpy(np.append(group.prompt.token_ids, sample.token_ids).astype(np.int64))
    logprobs = (model(input_ids=ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
    own = logprobs.gather(1, ids[1:, None])[:, 0][len(group.prompt.token_ids) - 1 :]
    return own[torch.from_numpy(sample.loss_mask)]


def grpo(model: nn.Module, groups: Sequence[Group], aggregation: str) -> Tensor:
    """-A l of all tokens, summed up as arXiv 2402.03300 and 2503.20783 do; at ratio 1 it has the gradient of theirs."""
    rows = []
    for group in groups:
        rewards = np.array([sample.scores["reward"] for sample in group.samples])
        for sample, credit in zip(group.samples, (rewards - rewards.mean()) / (rewards.std() + STD_EPS), strict=True):
            rows.append(-float(credit) * said(model, group, sample, TEMPERATURE))
    if aggregation == "token_mean":
        return torch.cat(rows).mean()
    if aggregation == "sequence_mean":
        return torch.stack([row.mean() for row in rows]).mean()
    total = torch.stack([row.sum() for row in rows]).mean()
    return total if aggregation == "sequence_sum" else total / LIMIT


def dpo(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """The mean over pairs of arXiv 2305.18290 Eq 7."""
    pairs = []
    for group in groups:
        chosen, rejected = (
            said(model, group, s, 1.0).sum() - float(s.tokens["ref_logprobs"][s.loss_mask].sum()) for s in group.samples
        )
        pairs.append(-logsigmoid(BETA * (chosen - rejected)))
    return torch.stack(pairs).mean()


def sft(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """The mean over all trained tokens of all rows."""
    return -torch.cat([said(model, group, group.samples[0], 1.0) for group in groups]).mean()


def reward_model(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """The mean over prompts of the mean over their pairs, arXiv 2203.02155 Eq 1; scores as transformers pools them."""
    prompts = []
    for group in groups:
        ids = [np.append(group.prompt.token_ids, s.token_ids).astype(np.int64) for s in group.samples]
        scores = [model(input_ids=torch.from_numpy(row)[None]).logits.reshape(()) for row in ids]
        pairs = [-logsigmoid(a - b) for i, a in enumerate(scores) for b in scores[i + 1 :]]  # rank 0 comes first
        prompts.append(torch.stack(pairs).mean())
    return torch.stack(prompts).mean()


CASES: dict[str, tuple[dict[str, Any], Callable[[nn.Module, Sequence[Group]], Tensor]]] = {
    **{
        f"grpo-{name}": (
            {"name": "grpo", "samples_per_prompt": 3, "kl": {"coef": 0}, "std_eps": STD_EPS, "aggregation": name},
            lambda model, groups, name=name: grpo(model, groups, name),
        )
        for name in AGGREGATIONS
    },
    "dpo": ({"name": "dpo", "loss": {"name": "sigmoid", "beta": BETA}}, dpo),
    "sft": ({"name": "sft"}, sft),
    "reward_model": ({"name": "reward_model"}, reward_model),
}


@pytest.fixture
def make(tiny_run: Callable[..., RunConfig]) -> Callable[..., PolicyLearner]:
    def build_one(algorithm: dict[str, Any], budget: int) -> PolicyLearner:
        content = tiny_run({}, {"tokens_per_microbatch": budget}, {}, {}).model_dump(exclude_unset=True)
        content["algorithm"] = algorithm
        if algorithm["name"] != "grpo":
            content |= {"generation": None, "reward": None}
        config = RunConfig.model_validate(content)
        made = PolicyLearner(config, build(config.algorithm), 0, 1, None)
        made.setup()
        return made

    return build_one


def gradients(learner: PolicyLearner, groups: Sequence[Group], rank: int, ranks: int) -> dict[str, Tensor]:
    """What one update hands to the optimizer on this rank, by parameter; what no gradient reached is 0."""
    found: dict[str, Tensor] = {}
    engine, step = learner._engine, learner._engine.step

    def note(lr: float) -> Any:
        for name, parameter in engine.policy.base.named_parameters():
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        return step(lr)

    engine.step = note
    learner._rank, learner._world_size = rank, ranks
    assert learner.annotate_share(groups) == []
    learner.update(learner.prepare(groups))
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_a_step_is_that_of_the_papers_loss_whatever_the_cut(
    make: Callable[..., PolicyLearner], sampled_groups: Callable[..., list[Group]], name: str
) -> None:
    """One row (or pair, or prompt) a micro-batch, two or three, all at once; and on two ranks: equal to 1e-6."""
    algorithm, loss = CASES[name]
    groups = masked(sampled_groups(2, 5, 3, 0, 1.0))
    groups[1] = replace(groups[1], samples=groups[1].samples[:2])
    if not name.startswith("grpo-"):
        groups = as_given(groups, {"sft": 1, "dpo": 2, "reward_model": 3}[name])
    if name == "reward_model":  # transformers pads a score's row with the EOS that these end with
        groups = [
            replace(
                g,
                samples=tuple(
                    replace(s, token_ids=np.append(s.token_ids[:-1], 7 + s.index).astype(np.int32)) for s in g.samples
                ),
            )
            for g in groups
        ]
    learner = make(algorithm, 1)
    model = copy.deepcopy(learner._engine.policy.base)
    loss(model, groups).backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    cuts = [gradients(learner, groups, 0, 1)]
    cuts += [gradients(make(algorithm, budget), groups, 0, 1) for budget in (100, 100_000)]
    ranks = [gradients(make(algorithm, 60), groups, rank, 2) for rank in (0, 1)]
    assert all(any(bool(g.any()) for g in rank.values()) for rank in ranks), "both ranks have a share"
    cuts.append({key: ranks[0][key] + ranks[1][key] for key in ranks[0]})
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
    for found in cuts:
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            assert torch.allclose(found[key], gradient, atol=2e-6, rtol=1e-4), key
