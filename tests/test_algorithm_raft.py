"""RAFT's selection and its likelihood. Not covered: the model, real ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.algorithms.table import build
from rlhf.config import RaftConfig
from rlhf.metrics import values

FREE = {"coef": 0.0}


def raft(**settings):
    return build(RaftConfig(name="raft", **{"kl": FREE, **settings}))


def chosen(batch):
    """The lengths of the selected completions, which tell the samples of these tests apart."""
    return [len(row.completion_ids) for row in batch.rows]


def test_the_best_of_each_prompt_is_learnt(make_group):
    """One row a prompt, by prompt id; of equal rewards the first; None is not 0 and cannot win against -1."""
    groups = [
        make_group(5, [-1.0, None], [4, 5], {}, {}),
        make_group(1, [0.0, 2.0, 1.0], [1, 2, 3], {}, {}),
        make_group(3, [1.0, 1.0], [6, 7], {}, {}),
        make_group(7, [None, None], [8, 9], {}, {}),
    ]
    batch, state = raft().prepare(groups, {})
    assert chosen(batch) == [2, 6, 4] and [row.unit for row in batch.rows] == [0, 1, 2]
    assert state == {} and batch.normalizer == "tokens"
    measured = values(batch.metrics)
    assert measured["reward/selected_mean"] == pytest.approx((2.0 + 1.0 - 1.0) / 3)
    assert measured["reward/mean"] == pytest.approx((0 + 2 + 1 + 1 + 1 - 1) / 6)
    assert measured["faults/unscorable"] == 3.0


def test_random_selection_does_not_see_rewards(make_group):
    """The control takes the same sample whatever the scores are; over many drawn groups it is as often the worst."""
    control = raft(selection="random")
    picks = [control.prepare([make_group(0, rewards, [1, 2, 3], {}, {})], {})[0] for rewards in ([1, 2, 3], [3, 2, 1])]
    assert chosen(picks[0]) == chosen(picks[1])
    draw = np.random.default_rng(0)
    groups = [make_group(i, draw.normal(size=4).tolist(), [1] * 4, {}, {}) for i in range(400)]
    assert abs(values(control.prepare(groups, {})[0].metrics)["reward/selected_mean"]) < 0.15
    assert values(raft().prepare(groups, {})[0].metrics)["reward/selected_mean"] > 0.9


def test_the_kl_takes_part_in_the_ranking(make_group):
    """Scores (2, 1), summed k1 (3, 0) at beta .5: the second is better. As a loss it is refused, with the reason."""
    group = make_group(0, [2.0, 1.0], [1, 2], {"ref_logprobs": [[-4.0], [-1.0, -1.0]]}, {})
    assert chosen(raft(kl={"coef": 0.5}).prepare([group], {})[0]) == [2]
    assert chosen(raft(kl={"coef": 0.1}).prepare([group], {})[0]) == [1]
    with pytest.raises(ValueError, match=r"use kl\.place=reward"):
        RaftConfig(name="raft", kl={"place": "loss"})


@pytest.mark.parametrize("budget", [1, 1000])
@pytest.mark.parametrize(
    ("aggregation", "expected"), [("token_mean", 10 / 6), ("sequence_mean", 1.5), ("sequence_sum", 5.0)]
)
def test_loss_is_the_negative_log_likelihood(make_group, divided_loss, aggregation, expected, budget):
    """Winners with log-probs (-1,-1) and (-2,-2,-2,-2): G-AGG; the gradient pushes every trained token up alike, the
    EOS included, and a tool's not at all."""
    groups = [make_group(0, [1.0, 0.0], [2, 9], {}, {}), make_group(1, [0.0, 1.0], [9, 5], {}, {})]
    winner = replace(groups[1].samples[1], loss_mask=np.array([True, True, False, True, True]))
    groups[1] = replace(groups[1], samples=(groups[1].samples[0], winner))
    algorithm = raft(aggregation=aggregation)
    batch, _ = algorithm.prepare(groups, {})
    logprobs = [torch.full((2,), -1.0, requires_grad=True), torch.full((5,), -2.0, requires_grad=True)]
    loss, means = divided_loss(algorithm, batch, logprobs, budget, 1)
    loss.backward()
    assert loss.item() == pytest.approx(expected) and means["loss/nll"] == pytest.approx(expected)
    pushed = logprobs[1].grad.tolist()
    assert pushed[2] == 0.0 and len(set(pushed[:2] + pushed[3:])) == 1 and pushed[0] < 0


def test_stale_winners_are_imitated_as_they_are(make_group, divided_loss):
    """Old log-probs that differ from the sampler's change nothing: a likelihood needs no importance weight."""
    columns = {"old_logprobs": [[-5.0], [-5.0]]}
    algorithm = raft()
    batch, _ = algorithm.prepare([make_group(0, [1.0, 0.0], [1, 1], columns, {})], {})
    logprobs = [torch.full((1,), -1.0, requires_grad=True)]
    divided_loss(algorithm, batch, logprobs, 1000, 1)[0].backward()
    assert logprobs[0].grad.tolist() == [-1.0]


def test_groups_without_variance_can_be_left_out(make_group):
    """All-equal scores have no best sample; off by default, counted when on."""
    groups = [make_group(0, [1.0, 1.0], [1, 2], {}, {}), make_group(1, [0.0, 1.0], [3, 4], {}, {})]
    assert chosen(raft().prepare(groups, {})[0]) == [1, 4]
    batch, _ = raft(drop_equal_groups=True).prepare(groups, {})
    assert chosen(batch) == [4] and values(batch.metrics)["groups/equal_dropped"] == 1.0
