"""Training a reward model: credit to pairs, gradients whatever the cut, learning with a control, and what is saved.

Not covered: `rlhf run` on a data set of preferences (the data's own tests), real models, more than one rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf.algorithms import reward_model
from rlhf.algorithms.table import build
from rlhf.buffer.offline import Completion, dataset_group
from rlhf.config import RewardModelConfig, RunConfig
from rlhf.experience import Group, Prompt
from rlhf.judges.build import build_reward_judge
from rlhf.learner.learner import PolicyLearner
from rlhf.metrics import values
from rlhf.models.load import load_tokenizer
from rlhf.ops.microbatch import MicroBatch, Scores

LINEAR = {"adam_eps": 1.0, "lr": 1.0, "max_grad_norm": 1e9}


def group_of(prompt_id: int, answers: Sequence[Sequence[int]], ranks: Sequence[float | None]) -> Group:
    prompt = Prompt(prompt_id, prompt_id, 0, "q", "q", np.array([5, 6], np.int32), {"by": 1.0})
    completions = [
        Completion(np.array(ids, np.int32), np.ones(len(ids), np.bool_), "", rank)
        for ids, rank in zip(answers, ranks, strict=True)
    ]
    return dataset_group(prompt, completions)


def made_up(seed: int, prompts: int, sizes: Sequence[int]) -> list[Group]:
    """Groups of random answers of 1 to 12 tokens, ranked in a random order."""
    random = np.random.default_rng(seed)
    groups = []
    for prompt_id in range(prompts):
        count = sizes[prompt_id % len(sizes)]
        answers = [random.integers(5, 320, random.integers(1, 13)).tolist() for _ in range(count)]
        groups.append(group_of(prompt_id, answers, random.permutation(count).astype(float).tolist()))
    return groups


@pytest.fixture
def make(tiny_run: Callable[..., RunConfig]) -> Callable[..., PolicyLearner]:
    def build_one(learner: Mapping[str, Any], algorithm: Mapping[str, Any], model: str) -> PolicyLearner:
        content = tiny_run({"name": model}, learner, {}, {}).model_dump()
        config = RunConfig.model_validate(
            content | {"algorithm": {"name": "reward_model", **algorithm}, "generation": None, "reward": None}
        )
        made = PolicyLearner(config, build(config.algorithm), 0, 1, None)
        made.setup()
        return made

    return build_one


def tensors(learner: PolicyLearner) -> dict[str, torch.Tensor]:
    weights = learner.publish()
    assert weights is not None
    return {name: tensor.unpack().clone() for name, tensor in weights.tensors.items()}


def step(learner: PolicyLearner, groups: Sequence[Group]) -> dict[str, float]:
    assert learner.annotate_share(groups) == []
    return values(learner.update(learner.prepare(groups)))


def test_the_loss_reads_the_last_token_of_each_answer() -> None:
    """Answers of 1, 3 and 2 tokens padded to 3, one prompt in rank order (1, 0, 2), a filler row: by hand."""
    config = RewardModelConfig(name="reward_model", centring=0.01)
    batch, _ = reward_model.prepare(config, [group_of(0, [[7], [7, 8, 9], [9, 8]], [1.0, 0.0, 2.0])], {})
    tokens = {name: torch.zeros(4, 3) for name in batch.rows[0].tokens}
    mask = torch.zeros(4, 3, dtype=torch.bool)
    for i, row in enumerate(batch.rows):
        mask[i, : len(row.completion_ids)] = True
        for name, column in row.tokens.items():
            tokens[name][i, : len(column)] = torch.tensor(column)
    scores = torch.tensor([[1.0, 99, 99], [99, 99, 2.0], [99, -0.5, 99], [99, 99, 99]], requires_grad=True)
    micro = MicroBatch(mask, torch.tensor([1.0, 1, 1, 0]), torch.tensor([0, 0, 0, -1]), tokens)
    sums = reward_model.loss(config, Scores(scores), micro)
    centred = (3.0**2 + 1.5**2 + 0.5**2) / 3
    assert sums.loss.item() == pytest.approx(0.19785 + 0.01 * centred, abs=1e-5)  # G-BT, K = 3
    (gradient,) = torch.autograd.grad(sums.loss, scores)
    assert (gradient != 0).nonzero().tolist() == [[0, 0], [1, 2], [2, 1]]
    seen = {name: (value / count).item() for name, (value, count) in sums.means.items()}
    assert seen["rewards/accuracies"] == pytest.approx(1.0) and seen["rewards/margins"] == pytest.approx(5 / 3)
    assert seen["rewards/chosen"] == pytest.approx(5 / 3) and seen["rewards/rejected"] == pytest.approx(0.0)


def test_groups_that_teach_nothing_are_dropped_and_counted() -> None:
    """Ties, equal answers of different rank (trap 41); equal answers of the same rank stay. No rank: an error."""
    config = RewardModelConfig(name="reward_model")
    groups = [
        group_of(4, [[7], [8]], [0.0, 1.0]),
        group_of(1, [[7], [8]], [1.0, 1.0]),
        group_of(2, [[7], [7]], [0.0, 1.0]),
        group_of(3, [[7], [7], [8]], [0.0, 0.0, 1.0]),
    ]
    batch, _ = reward_model.prepare(config, groups, {})
    assert [row.unit for row in batch.rows] == [0, 0, 0, 1, 1] and batch.normalizer == "units"
    assert values(batch.metrics)["groups/dropped"] == 2
    nothing, _ = reward_model.prepare(config, groups[1:3], {})
    assert nothing.rows == ()
    with pytest.raises(ValueError, match="prompt 5, sample 0: no column 'rank'"):
        reward_model.prepare(config, [group_of(5, [[7], [8]], [None, None])], {})


def test_ties_make_no_pair_and_are_counted() -> None:
    """Ranks (0, 1, 1, 1) are three pairs and three ties; the dropped group's ties are not those of pairs."""
    groups = [group_of(0, [[7], [8], [9], [10]], [0.0, 1.0, 1.0, 1.0]), group_of(1, [[7], [8]], [2.0, 2.0])]
    batch, _ = reward_model.prepare(RewardModelConfig(name="reward_model"), groups, {})
    measured = values(batch.metrics)
    assert measured["pairs/ties"] == 3 and measured["groups/dropped"] == 1 and len(batch.rows) == 4


def test_margins_come_from_the_data() -> None:
    """A column of numbers; one that is missing or no number is an error that names row and column."""
    group = group_of(0, [[7], [8]], [0.0, 1.0])
    batch, _ = reward_model.prepare(RewardModelConfig(name="reward_model", margin_column="by"), [group], {})
    assert [row.tokens["margin"].tolist() for row in batch.rows] == [[1.0], [1.0]]
    for bad in ({}, {"by": "a lot"}, {"by": float("nan")}):
        other = replace(group, prompt=replace(group.prompt, columns=bad))
        with pytest.raises(ValueError, match=r"row 0.*'by'"):
            reward_model.prepare(RewardModelConfig(name="reward_model", margin_column="by"), [other], {})


def test_gradient_does_not_depend_on_how_the_batch_is_cut(make: Callable[..., PolicyLearner]) -> None:
    """Traps 30, 44, 89: groups of 2, 3 and 4 answers in micro-batches of one unit or all at once: equal to 1e-6."""
    groups = made_up(0, 6, (2, 3, 4))
    one = make({**LINEAR, "tokens_per_microbatch": 1}, {"centring": 0.01}, "tiny")
    other = make({**LINEAR, "tokens_per_microbatch": 4096}, {"centring": 0.01}, "tiny")
    start = tensors(one)
    alone, together = step(one, groups), step(other, groups)
    assert alone["loss/bradley_terry"] == pytest.approx(together["loss/bradley_terry"], abs=1e-6)
    assert alone["loss/bradley_terry"] == pytest.approx(0.6931, abs=0.2)  # near ln 2: first scores are small
    assert "entropy" not in alone
    after, expected = tensors(one), tensors(other)
    assert max(float((after[name] - expected[name]).abs().max()) for name in after) <= 1e-6
    assert all(not torch.equal(start[name], after[name]) for name in after)


@pytest.mark.parametrize("budget", [1, 4096])
def test_an_answer_goes_through_the_model_once_however_many_pairs_it_is_in(
    make: Callable[..., PolicyLearner], budget: int
) -> None:
    """Trap 89: groups of 4, 3 and 2 answers make 6, 3 and 1 pairs and 9 rows in the forward passes of an update, all of
    a group in one pass. Counted at the trunk."""
    groups = made_up(3, 3, (4, 3, 2))
    learner = make({"tokens_per_microbatch": budget}, {}, "tiny")
    trunk = learner._engine.policy.base.model
    passes: list[list[tuple[int, ...]]] = []

    def count(module: torch.nn.Module, arguments: Any, given: dict[str, Any]) -> None:
        rows = zip(given["input_ids"].tolist(), given["attention_mask"].sum(1).tolist(), strict=True)
        passes.append([tuple(ids[:length]) for ids, length in rows])

    hook = trunk.register_forward_pre_hook(count, with_kwargs=True)
    step(learner, groups)
    hook.remove()
    answers = [{tuple([*g.prompt.token_ids.tolist(), *s.token_ids.tolist()]) for s in g.samples} for g in groups]
    seen = [row for rows in passes for row in rows]
    assert len(seen) == 9 and set(seen) == set().union(*answers)
    assert all(any(own <= set(rows) for rows in passes) for own in answers)
    assert len(passes) == (3 if budget == 1 else 1)


def accuracy(learner: PolicyLearner, groups: Sequence[Group]) -> float:
    """Share of pairs in the right order; the learner is not changed. Answers of one length, so no padding."""
    inputs = [np.stack([np.append(g.prompt.token_ids, g.samples[i].token_ids) for g in groups]) for i in (0, 1)]
    with torch.no_grad():
        best, worst = (learner._engine.policy.base(input_ids=torch.from_numpy(ids).long()).logits for ids in inputs)
    return float((best > worst).float().mean())


def test_it_learns_and_random_labels_do_not_generalise(make: Callable[..., PolicyLearner]) -> None:
    """An answer with more even ids is better. 24 steps of 16 pairs; accuracy on 96 unseen pairs rises from chance to
    above 0.8, while the same with random labels stays near chance."""

    def pairs(seed: int, count: int, *, true_labels: bool) -> list[Group]:
        random = np.random.default_rng(seed)
        made = []
        for prompt_id in range(count):
            odd = random.integers(3, 40, 6) * 2 + 1
            even = random.integers(3, 40, 6) * 2
            first_is_better = True if true_labels else bool(random.integers(2))
            made.append(
                group_of(prompt_id, [even.tolist(), odd.tolist()], [0.0, 1.0] if first_is_better else [1.0, 0.0])
            )
        return made

    unseen = pairs(999, 96, true_labels=True)
    reached = []
    for true_labels in (True, False):
        learner = make({"lr": 2e-3}, {}, "tiny")
        start = accuracy(learner, unseen)
        for number in range(24):
            step(learner, pairs(number, 16, true_labels=true_labels))
        reached.append((start, accuracy(learner, unseen)))
    (start, learnt), (_, control) = reached
    assert learnt > 0.8 and learnt > start + 0.1 and control < learnt - 0.1


def test_what_is_saved_scores_alike_as_a_judge(
    make: Callable[..., PolicyLearner], tmp_path: Path, tiny_run: Callable[..., RunConfig]
) -> None:
    """The saved folder loads with from_pretrained, passes the check before a run, trains on from where it stands, and
    as a judge of text gives the scores of the trained rows."""
    tokenizer = load_tokenizer("tiny", trust_remote_code=False)
    texts = [("hello there", "yes", "no thank you"), ("and you", "well", "the end")]
    groups = []
    for number, (question, good, bad) in enumerate(texts):
        shown = f"<s><|user|>{question}</s><|assistant|>"
        prompt_ids = np.array(tokenizer(shown, add_special_tokens=False)["input_ids"], np.int32)
        answers = [
            np.array(tokenizer(text + "</s>", add_special_tokens=False)["input_ids"], np.int32) for text in (good, bad)
        ]
        completions = [
            Completion(ids, np.ones(len(ids), np.bool_), text, rank)
            for ids, text, rank in zip(answers, (good, bad), (0.0, 1.0), strict=True)
        ]
        groups.append(dataset_group(Prompt(number, number, 0, question, shown, prompt_ids, {}), completions))
    learner = make({"lr": 1e-3}, {}, "tiny")
    for _ in range(3):
        step(learner, groups)
    learner.save(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "policy")
    assert model.config.architectures == ["LlamaForSequenceClassification"] and model.config.num_labels == 1
    next_metrics = step(learner, groups)
    config = tiny_run({}, {}, {}, {}).model_dump() | {"reward": {"model": str(tmp_path / "policy")}}
    judge = build_reward_judge(RunConfig.model_validate(config), {}, Path("unused"))
    judge.setup()
    scores = np.array([judge.judge(group).scores["reward"] for group in groups], dtype=np.float64)
    assert scores[:, 0].mean() == pytest.approx(next_metrics["rewards/chosen"], abs=1e-5)
    assert scores[:, 1].mean() == pytest.approx(next_metrics["rewards/rejected"], abs=1e-5)
    resumed = make({"lr": 1e-3}, {}, "tiny")
    resumed.load(tmp_path)
    assert step(resumed, groups)["rewards/margins"] == next_metrics["rewards/margins"]
    again = make({"lr": 1e-3}, {}, str(tmp_path / "policy"))
    assert step(again, groups)["rewards/margins"] == pytest.approx(next_metrics["rewards/margins"], abs=1e-6)


def test_settings_that_cannot_work_are_refused(make: Callable[..., PolicyLearner]) -> None:
    """Packing, and more minibatches than prompts; nothing is ignored."""
    with pytest.raises(ValueError, match="packing: a reward"):
        make({"packing": True}, {}, "tiny")
    with pytest.raises(ValueError, match="minibatches=5"):
        make({"minibatches": 5}, {}, "tiny")
