"""RLOO: REINFORCE with a leave-one-out baseline, arXiv 2402.14740 ("Back to Basics").

    R_i = r_i - beta sum_t m_t d_t                                                              Eq 3
    A_i = R_i - 1/(n-1) sum_{j != i} R_j;     gradient 1/N sum_i A_i grad log pi(y_i)           Eq 6

n samples of a prompt, N rows of a minibatch. The KL is in the reward, before the baseline. How rewards are shaped and
what the loss is: `bandit`, shared with REINFORCE; the baseline: `ops.advantages.leave_one_out`.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rlhf.algorithms import Algorithm, RunState, bandit
from rlhf.config import RlooConfig
from rlhf.experience import Group, TrainBatch
from rlhf.ops.advantages import leave_one_out


def build(config: RlooConfig) -> Algorithm:
    """RLOO with these settings; it carries nothing from step to step."""
    return Algorithm(
        needs=bandit.needed_columns(config.kl),
        initial_state={},
        prepare=partial(prepare, config),
        loss=partial(bandit.loss, config),
    )


def prepare(config: RlooConfig, groups: Sequence[Group], state: RunState) -> tuple[TrainBatch, RunState]:
    """Credit assignment: each scorable sample against the others of its prompt. Pure; the order of groups is
    irrelevant."""
    scored = bandit.score(groups, config)
    kept = bandit.varied(scored, drop_equal_groups=config.drop_equal_groups)
    rewards = torch.tensor([episode.reward for episode in kept], dtype=torch.float64)
    prompts = torch.tensor([episode.prompt_id for episode in kept], dtype=torch.int64)
    return bandit.train_batch(config, groups, scored, kept, advantages(rewards, prompts)), state


def advantages(rewards: Tensor, prompts: Tensor) -> Tensor:
    """A_i of each reward (N,) among those of its prompt id (N,) -> (N,) float64; 0 for the lone scorable sample of a
    prompt.

    n is the number of scorable samples. A lone one has nothing to be compared with: its raw reward is no advantage.
    """
    _, row, size = torch.unique(prompts, return_inverse=True, return_counts=True)
    compared = size[row] > 1
    result = torch.zeros(len(rewards), dtype=torch.float64)
    result[compared] = leave_one_out(rewards[compared], prompts[compared])
    return result
