"""GRPO, arXiv 2402.03300, and Dr. GRPO, arXiv 2503.20783: rewards relative to their group, PPO's clipped ratio.

    A_i = (R_i - mean) / (std + eps)                the same for each token; Dr. GRPO: R_i - mean
    loss = 1/n sum_i 1/|y_i| sum_t [clipped surrogate + beta k3_t]        Eq 3; Dr. GRPO: 1/L_max for 1/|y_i|

Dr. GRPO is `scale: none` with `aggregation: constant`, both. The loss is in `clipped`, shared with REINFORCE++.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rlhf.algorithms import Algorithm, RunState, bandit, clipped
from rlhf.config import GrpoConfig
from rlhf.experience import Group, TrainBatch
from rlhf.ops.advantages import group_deviation, group_standardized


def build(config: GrpoConfig) -> Algorithm:
    """GRPO with these settings; it carries nothing from step to step."""
    return Algorithm(
        needs=bandit.needed_columns(config.kl),
        initial_state={},
        prepare=partial(prepare, config),
        loss=partial(clipped.loss, config),
    )


def prepare(config: GrpoConfig, groups: Sequence[Group], state: RunState) -> tuple[TrainBatch, RunState]:
    """Credit assignment: each scorable sample relative to those of its prompt. Pure; the order of groups is
    irrelevant."""
    scored = bandit.score(groups, config)
    kept = bandit.varied(scored, drop_equal_groups=config.drop_equal_groups)
    rewards = torch.tensor([episode.reward for episode in kept], dtype=torch.float64)
    prompts = torch.tensor([episode.prompt_id for episode in kept], dtype=torch.int64)
    credit = [
        np.full(len(episode.sample.token_ids), advantage, dtype=np.float32)
        for episode, advantage in zip(kept, advantages(config, rewards, prompts).tolist(), strict=True)
    ]
    return clipped.train_batch(config, groups, scored, kept, credit), state


def advantages(config: GrpoConfig, rewards: Tensor, prompts: Tensor) -> Tensor:
    """A_i of each reward (N,) among those of its prompt id (N,) -> (N,) float64; 0 for the lone scorable sample of a
    prompt."""
    if config.scale == "none":
        return group_deviation(rewards, prompts)
    return group_standardized(rewards, prompts, unbiased=config.scale == "unbiased_std", eps=config.std_eps)
