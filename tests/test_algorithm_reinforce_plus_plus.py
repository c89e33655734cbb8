"""REINFORCE++ and REINFORCE++-baseline: credit assignment. The loss is GRPO's and tested there and in test_ops_clipped.

Not covered: the model, real ranks (statistics are taken in `prepare`, which sees the whole step).
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.algorithms.bandit import score
from rlhf.algorithms.reinforce_plus_plus import token_returns
from rlhf.algorithms.table import build
from rlhf.config import ReinforcePlusPlusBaselineConfig, ReinforcePlusPlusConfig
from rlhf.metrics import values

FREE = {"coef": 0.0}


def plain(coef, **settings):
    return ReinforcePlusPlusConfig(name="reinforce_plus_plus", kl={"coef": coef}, **settings)


def baseline(**settings):
    return ReinforcePlusPlusBaselineConfig(name="reinforce_plus_plus_baseline", **{"kl": FREE, **settings})


def credit_of(batch):
    return [row.tokens["advantages"].tolist() for row in batch.rows]


def golden_groups(make_group, padding):
    """G-RPP's two samples: r = 1 with d = (.2,-.1,.4), r = -1 with d = .3, with this many masked tokens before the last
    of the first."""
    first = make_group(0, [1.0], [3 + padding], {"ref_logprobs": [[-1.2, -0.9] + [-9.0] * padding + [-1.4]]}, {})
    mask = np.array([True, True] + [False] * padding + [True])
    first = replace(first, samples=(replace(first.samples[0], loss_mask=mask),))
    return [first, make_group(1, [-1.0], [1], {"ref_logprobs": [[-1.3]]}, {})]


def test_token_returns(make_group):
    """G-RPP: the KL of a token is paid by it and by those before it: (.95,.97,.96) and (-1.03)."""
    config = plain(0.1)
    episodes = score(golden_groups(make_group, 0), config)
    returns = token_returns(episodes, [e.paid for e in episodes], config.kl)
    assert returns[0].tolist() == pytest.approx([0.95, 0.97, 0.96], abs=1e-6)
    assert returns[1].tolist() == pytest.approx([-1.03], abs=1e-6)


@pytest.mark.parametrize("padding", [0, 3])
def test_golden_advantages(make_group, padding):
    """G-RPP: whitened over the four valid tokens of the step; tokens of tools enter neither statistics nor returns."""
    batch, state = build(plain(0.1)).prepare(golden_groups(make_group, padding), {})
    first, second = credit_of(batch)
    assert [*first[:2], first[-1], *second] == pytest.approx([0.56573, 0.58894, 0.57733, -1.73199], abs=1e-4)
    assert first[2:-1] == [0.0] * padding and state == {}
    measured = values(batch.metrics)
    assert measured["advantage/raw_mean"] == pytest.approx(0.4625, abs=1e-5)
    assert measured["advantage/raw_std"] == pytest.approx(0.861724, abs=1e-5)
    assert measured["advantage/abs_mean"] == pytest.approx((0.56573 + 0.58894 + 0.57733 + 1.73199) / 4, abs=1e-4)


def test_golden_advantages_with_a_baseline(make_group):
    """G-RPP V2: groups (1,0),(1,1), one token each."""
    groups = [make_group(0, [1.0, 0.0], [1, 1], {}, {}), make_group(1, [1.0, 1.0], [1, 1], {}, {})]
    batch, _ = build(baseline()).prepare(groups, {})
    assert [c for (c,) in credit_of(batch)] == pytest.approx([1.41421, -1.41421, 0.0, 0.0], abs=1e-5)
    assert values(batch.metrics)["group/zero_advantage_fraction"] == 0.5


def test_advantages_have_mean_0_and_deviation_1_over_valid_tokens_whatever_the_order(make_group):
    """Twenty prompts of uneven length; one step is whitened as a whole, so the order of groups changes nothing, and
    halves whitened apart would be something else."""
    draw = np.random.default_rng(0)
    groups = []
    for prompt in range(20):
        length = int(draw.integers(1, 9))
        reference = [list(-1 - draw.random(length))]
        groups.append(make_group(prompt, [float(draw.normal())], [length], {"ref_logprobs": reference}, {}))
    algorithm = build(plain(0.2))
    whole = credit_of(algorithm.prepare(groups, {})[0])
    tokens = np.concatenate(whole)
    assert tokens.mean() == pytest.approx(0.0, abs=1e-6) and tokens.std() == pytest.approx(1.0, abs=1e-6)
    assert credit_of(algorithm.prepare(groups[::-1], {})[0]) == whole
    halves = [c for half in (groups[:10], groups[10:]) for c in credit_of(algorithm.prepare(half, {})[0])]
    assert max(abs(np.concatenate(halves) - tokens)) > 0.05


def test_one_token_or_equal_returns_give_exactly_zero(make_group):
    """Trap 26: no NaN from a deviation of 0; and a step without a scorable sample is empty."""
    algorithm = build(plain(0.0))
    assert credit_of(algorithm.prepare([make_group(0, [5.0], [1], {}, {})], {})[0]) == [[0.0]]
    equal = [make_group(i, [0.35], [3], {}, {}) for i in range(7)]
    assert credit_of(algorithm.prepare(equal, {})[0]) == [[0.0] * 3] * 7
    nothing, _ = algorithm.prepare([make_group(0, [None], [2], {}, {})], {})
    assert nothing.rows == () and "advantage/raw_std" not in values(nothing.metrics)


def test_a_group_baseline_with_the_kl_in_the_reward(make_group):
    """Allowed, though the paper's second form has a loss: the mean is of scores, the price stays a token's own."""
    config = baseline(kl={"coef": 0.1, "place": "reward"})
    reference = {"ref_logprobs": [[-1.2, -0.9], [-1.0, -1.0]]}
    batch, _ = build(config).prepare([make_group(0, [1.0, 0.0], [2, 2], reference, {})], {})
    raw = np.array([0.49, 0.51, -0.5, -0.5])
    expected = (raw - raw.mean()) / raw.std()
    assert np.concatenate(credit_of(batch)) == pytest.approx(expected, abs=1e-5)


def test_the_default_price_of_each_form():
    """V1 pays token by token in the reward, V2 by the tokens' k2 as a loss; both want a reference."""
    first, second = (
        ReinforcePlusPlusConfig(name="reinforce_plus_plus"),
        ReinforcePlusPlusBaselineConfig(name="reinforce_plus_plus_baseline"),
    )
    assert first.kl.place == "reward" and second.kl.place == "loss"
    assert second.kl.loss_estimator == "k2_token"
    assert build(first).needs == build(second).needs == {"reward", "ref_logprobs"}


def test_loss_of_the_second_form(make_group, divided_loss):
    """At ratio 1: -(1/n) sum (1/|y|) sum A l plus beta times the tokens' k2, gradient by hand."""
    group = make_group(0, [1.0, 0.0], [2, 1], {"ref_logprobs": [[-1.5, -0.8], [-1.0]]}, {})
    algorithm = build(baseline(kl={"coef": 0.1}))
    batch, _ = algorithm.prepare([group], {})
    credit = credit_of(batch)
    logprobs = [torch.full((n,), -1.0, requires_grad=True) for n in (2, 1)]
    divided_loss(algorithm, batch, logprobs, 1000, 1)[0].backward()
    expected = (np.array([0.1 * 0.5, 0.1 * -0.2]) - credit[0]) / 4
    assert logprobs[0].grad.tolist() == pytest.approx(expected, abs=1e-6)
    assert logprobs[1].grad.tolist() == pytest.approx([-credit[1][0] / 2], abs=1e-6)


def test_stale_tokens_weigh_their_truncated_ratio(make_group, divided_loss):
    """Old minus behavior (ln 1.5, ln 3), policy not moved: the gradient is weighted by 1.5 and the cap 2."""
    columns = {
        "behavior_logprobs": [[-2.0, -2.0], [-2.0, -2.0]],
        "old_logprobs": [[-2.0 + np.log(1.5), -2.0 + np.log(3.0)], [-2.0, -2.0]],
    }
    algorithm = build(plain(0.0, aggregation="sequence_sum"))
    batch, _ = algorithm.prepare([make_group(0, [1.0, 0.0], [2, 2], columns, {})], {})
    logprobs = [torch.tensor(old, dtype=torch.float32, requires_grad=True) for old in columns["old_logprobs"]]
    loss, means = divided_loss(algorithm, batch, logprobs, 1000, 1)
    loss.backward()
    assert logprobs[0].grad.tolist() == pytest.approx([-0.75, -1.0], abs=1e-5)
    assert logprobs[1].grad.tolist() == pytest.approx([0.5, 0.5], abs=1e-5)
    assert means["clip/fraction"] == 0.25
