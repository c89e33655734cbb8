"""REINFORCE with the whole completion as one action, arXiv 2402.14740, section 2.

    R_i = r_i - beta sum_t m_t d_t;     A_i = R_i - c;     gradient 1/N sum_i A_i grad log pi(y_i)

The baseline c is 0, the mean of all rewards R of EARLIER batches, which are run state, or the mean of this batch. How
rewards are shaped and what the loss is: `bandit`, shared with RLOO.
"""

from collections.abc import Sequence
from functools import partial

import torch

from rlhf.algorithms import Algorithm, RunState, bandit
from rlhf.config import ReinforceConfig
from rlhf.experience import Group, TrainBatch
from rlhf.metrics import last
from rlhf.ops.advantages import group_deviation, running_mean

REWARD_SUM = "reward_sum"
REWARD_COUNT = "reward_count"


def build(config: ReinforceConfig) -> Algorithm:
    """REINFORCE with these settings; with a moving average it carries the sum and the number of rewards so far."""
    averaged = config.baseline == "moving_average"
    return Algorithm(
        needs=bandit.needed_columns(config.kl),
        initial_state={REWARD_SUM: 0.0, REWARD_COUNT: 0.0} if averaged else {},
        prepare=partial(prepare_averaged if averaged else prepare_stateless, config),
        loss=partial(bandit.loss, config),
    )


def prepare_stateless(config: ReinforceConfig, groups: Sequence[Group], state: RunState) -> tuple[TrainBatch, RunState]:
    """Credit assignment without a baseline, A_i = R_i, or against the batch's own mean. Pure; the order of groups is
    irrelevant.

    The batch's mean contains the sample's own reward: the expected gradient is (N-1)/N times that without a baseline.
    """
    scored = bandit.score(groups, config)
    rewards = torch.tensor([episode.reward for episode in scored], dtype=torch.float64)
    if config.baseline == "none":
        return bandit.train_batch(config, groups, scored, scored, rewards), state
    advantages = group_deviation(rewards, torch.zeros(len(rewards), dtype=torch.int64))
    batch = bandit.train_batch(config, groups, scored, scored, advantages)
    if scored:
        batch.metrics["reward/baseline"] = last(float(rewards.mean()))
    return batch, state


def prepare_averaged(config: ReinforceConfig, groups: Sequence[Group], state: RunState) -> tuple[TrainBatch, RunState]:
    """Credit assignment against the mean of earlier batches' rewards; this batch's enter the returned state only."""
    scored = bandit.score(groups, config)
    rewards = torch.tensor([episode.reward for episode in scored], dtype=torch.float64)
    baseline = running_mean(state[REWARD_SUM], state[REWARD_COUNT])
    batch = bandit.train_batch(config, groups, scored, scored, rewards - baseline)
    batch.metrics["reward/baseline"] = last(baseline)
    later = {
        REWARD_SUM: state[REWARD_SUM] + float(rewards.sum()),
        REWARD_COUNT: state[REWARD_COUNT] + len(scored),
    }
    return batch, later
