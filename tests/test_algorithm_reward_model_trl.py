"""The loss of reward models against TRL 1.16, as an independent reference: value and gradients on the tiny model.

TRL 1.16 defines the same for pairs, margin and centring included. Where it differs: it has pairs only (no K answers),
and transformers reads its scores at the last token that is not the padding id, so answers here do not end with that.
Not covered: its trainer around the loss.
"""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.algorithms import reward_model
from rlhf.buffer.offline import Completion, dataset_group
from rlhf.config import ModelConfig, RewardModelConfig
from rlhf.experience import Group, Prompt
from rlhf.learner.collate import collate
from rlhf.learner.plan import units_of
from rlhf.models.score import ScoreModel, start_score_model

trl = pytest.importorskip("trl.trainer.reward_trainer")

MARGINS = (0.0, 0.5, 2.0)


def pairs() -> list[Group]:
    """Three pairs of uneven lengths; the second is stored with the rejected answer first."""
    random = np.random.default_rng(0)
    groups = []
    for number, margin in enumerate(MARGINS):
        prompt = Prompt(number, number, 0, "q", "q", np.array([5, 6, 7], np.int32), {"by": margin})
        ranks = (1.0, 0.0) if number == 1 else (0.0, 1.0)
        answers = [random.integers(5, 320, length).astype(np.int32) for length in random.integers(1, 9, 2)]
        completions = [
            Completion(ids, np.ones(len(ids), np.bool_), "", rank) for ids, rank in zip(answers, ranks, strict=True)
        ]
        groups.append(dataset_group(prompt, completions))
    return groups


def by_trl(model: torch.nn.Module, groups: list[Group]) -> Tensor:
    """RewardTrainer.compute_loss on the chosen answers, then the rejected ones, padded on the right."""
    rows = [
        np.append(group.prompt.token_ids, sample.token_ids)
        for rank in (0.0, 1.0)
        for group in groups
        for sample in group.samples
        if sample.scores["rank"] == rank
    ]
    width = max(map(len, rows))
    ids, attention = torch.full((6, width), 1), torch.zeros(6, width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
        attention[i, : len(row)] = 1
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=model, args=SimpleNamespace(center_rewards_coefficient=0.01), accelerator=same,
        _total_train_tokens=0, _tp_size=1, _metrics={mode: defaultdict(list) for mode in ("train", "eval")},
    )  # fmt: skip
    inputs = {"input_ids": ids, "attention_mask": attention, "margin": torch.tensor(MARGINS)}
    loss: Tensor = trl.RewardTrainer.compute_loss(trainer, model, inputs)
    return loss


def test_value_and_gradients_are_those_of_trl() -> None:
    """Same weights, same pairs, margins and centring: 1e-5."""
    groups = pairs()
    config = RewardModelConfig(name="reward_model", centring=0.01, margin_column="by")
    ours, theirs = (start_score_model(ModelConfig(name="tiny"), "float32", 0) for _ in range(2))
    batch, _ = reward_model.prepare(config, groups, {})
    collated = collate(units_of(batch.rows), sorted(batch.rows[0].tokens), packed=False)
    scores = collated.scores(*ScoreModel(ours, "token")(*collated.inputs))
    mine = reward_model.loss(config, scores, collated.batch).loss / len(groups)
    expected = by_trl(theirs, groups)
    assert mine.item() == pytest.approx(expected.item(), abs=1e-5)
    mine.backward()
    expected.backward()
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        assert torch.allclose(one.grad, other.grad, atol=1e-5), name
