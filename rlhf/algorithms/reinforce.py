"""REINFORCE with the whole completion as one action, arXiv 2402.14740, section 2.

    R_i = r_i - beta sum_t m_t d_t;     A_i = R_i - c;     gradient 1/n sum_i A_i grad log pi(y_i)

The baseline c is 0 or the mean of all rewards R of EARLIER batches, which are run state. How rewards are shaped and
what the loss is: `bandit`, shared with RLOO.
"""

from collections.abc import Sequence
from functools import partial

import torch

from rlhf.algorithms import Algorithm, RunState, bandit
from rlhf.config import ReinforceConfig
from rlhf.experience import Group, TrainBatch
from rlhf.metrics import last
from rlhf.ops.advantages import running_mean

REWARD_SUM = "reward_sum"
REWARD_COUNT = "reward_count"


def build(config: ReinforceConfig) -> Algorithm:
    """REINFORCE with these settings; with a moving average it carries the sum and the number of rewards so far."""
    averaged = config.baseline == "moving_average"
    return Algorithm(
        needs=bandit.needed_columns(config.kl),
        initial_state={REWARD_SUM: 0.0, REWARD_COUNT: 0.0} if averaged else {},
        prepare=partial(prepare_averaged if averaged else prepare_raw, config),
        loss=partial(bandit.loss, config.kl, config.ratio_cap),
    )


def prepare_raw(config: ReinforceConfig, groups: Sequence[Group], state: RunState) -> tuple[TrainBatch, RunState]:
    """Credit assignment without a baseline: A_i = R_i. Pure; the order of groups is irrelevant."""
    episodes = bandit.score(groups, config.kl)
    rewards = torch.tensor([episode.reward for episode in episodes], dtype=torch.float64)
    return bandit.train_batch(groups, episodes, rewards, config.kl), state


def prepare_averaged(config: ReinforceConfig, groups: Sequence[Group], state: RunState) -> tuple[TrainBatch, RunState]:
    """Credit assignment against the mean of earlier batches' rewards; this batch's enter the returned state only."""
    episodes = bandit.score(groups, config.kl)
    rewards = torch.tensor([episode.reward for episode in episodes], dtype=torch.float64)
    baseline = running_mean(state[REWARD_SUM], state[REWARD_COUNT])
    batch = bandit.train_batch(groups, episodes, rewards - baseline, config.kl)
    batch.metrics["reward/baseline"] = last(baseline)
    later = {
        REWARD_SUM: state[REWARD_SUM] + float(rewards.sum()),
        REWARD_COUNT: state[REWARD_COUNT] + len(episodes),
    }
    return batch, later
