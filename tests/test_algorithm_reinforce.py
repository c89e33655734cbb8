"""REINFORCE's baselines. Shaping and the loss are RLOO's and tested there. Not covered: the learner, the model."""

import pytest
import torch

from rlhf.algorithms.table import build
from rlhf.config import KlConfig, ReinforceConfig, RlooConfig
from rlhf.metrics import values
from rlhf.ops.microbatch import MicroBatch, Outputs


def reinforce(baseline, coef=0.0):
    return build(ReinforceConfig(name="reinforce", baseline=baseline, kl=KlConfig(coef=coef)))


def advantage_of(batch):
    return [float(row.tokens["advantages"][0]) for row in batch.rows]


def test_moving_average_uses_earlier_batches_only(make_group):
    """G-MA: batches (1,3), (5,7), (4): the baseline is 0, then 2, then 4. State goes in and out; nothing is kept
    inside."""
    algorithm = reinforce("moving_average")
    first, after_first = algorithm.prepare(
        [make_group(0, [1.0], [2], {}, {}), make_group(1, [3.0], [2], {}, {})], algorithm.initial_state
    )
    second, after_second = algorithm.prepare([make_group(2, [5.0, 7.0], [2, 2], {}, {})], after_first)
    third, _ = algorithm.prepare([make_group(3, [4.0], [1], {}, {})], after_second)
    assert advantage_of(first) == [1.0, 3.0]
    assert advantage_of(second) == [3.0, 5.0]
    assert advantage_of(third) == [0.0]
    assert values(third.metrics)["reward/baseline"] == 4.0
    again, _ = algorithm.prepare([make_group(2, [5.0, 7.0], [2, 2], {}, {})], after_first)
    assert advantage_of(again) == [3.0, 5.0]


def test_no_baseline_pays_the_reward_itself(make_group):
    """And carries no state."""
    algorithm = reinforce("none")
    batch, state = algorithm.prepare([make_group(0, [5.0, 7.0], [2, 2], {}, {})], algorithm.initial_state)
    assert advantage_of(batch) == [5.0, 7.0]
    assert state == algorithm.initial_state == {}


def test_the_average_is_of_shaped_rewards_and_without_unscorable_samples(make_group):
    """Summed k1 of (2, -, 1) at beta .5: R = (0, -, 2.5); the None neither adds nor counts."""
    algorithm = reinforce("moving_average", coef=0.5)
    reference = [[-2.0, -2.0], [-1.0, -1.0], [-1.5, -1.5]]
    group = make_group(0, [1.0, None, 3.0], [2, 2, 2], {"ref_logprobs": reference}, {})
    batch, state = algorithm.prepare([group], algorithm.initial_state)
    assert advantage_of(batch) == [0.0, 2.5]
    assert state == {"reward_sum": 2.5, "reward_count": 2.0}
    assert values(batch.metrics)["reward/mean"] == 2.0


def test_a_constant_baseline_leaves_the_expected_gradient_and_lowers_its_variance(make_group):
    """Enumeration of a three-armed bandit through `prepare` and `loss`; the states stand for earlier mean rewards 0,
    5, 10.9."""
    algorithm = reinforce("moving_average")
    policy, rewards = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), [10.0, 11.0, 13.0]
    moments = []
    for earlier in (0.0, 5.0, 10.9):
        state = {"reward_sum": 2 * earlier, "reward_count": 2.0}
        batch, _ = algorithm.prepare([make_group(0, rewards, [1] * 3, {}, {})], state)
        gradients = []
        for arm, advantage in enumerate(advantage_of(batch)):
            logits = policy.log().requires_grad_()
            outputs = Outputs(logits.log_softmax(0)[arm].reshape(1, 1), torch.zeros(1, 1))
            tokens = {"advantages": torch.full((1, 1), advantage)}
            micro = MicroBatch(torch.ones(1, 1, dtype=torch.bool), torch.ones(1), torch.zeros(1), tokens)
            gradients.append(torch.autograd.grad(algorithm.loss(outputs, micro).loss, logits)[0])
        stacked = torch.stack(gradients)
        mean = (policy.unsqueeze(1) * stacked).sum(0)
        moments.append((mean, (policy.unsqueeze(1) * (stacked - mean).square()).sum().item()))
    assert all(torch.allclose(mean, moments[0][0], atol=1e-5) for mean, _ in moments)
    assert moments[2][1] < moments[1][1] < moments[0][1]


def test_one_sample_a_prompt_is_fine():
    """Unlike RLOO, which refuses it at load."""
    assert ReinforceConfig(name="reinforce").samples_per_prompt == 1
    with pytest.raises(ValueError, match="samples_per_prompt"):
        RlooConfig(name="rloo", samples_per_prompt=1)
