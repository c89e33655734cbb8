"""REINFORCE++, arXiv 2501.03262: whitening over the whole batch takes the place of a value network.

    A_t = r - beta sum_{i >= t} m_i d_i                                   Eq 4; the KL is paid token by token
    A'_t = (A_t - mean) / std over ALL valid tokens of the step           Eq 5
    -baseline: r minus its group's mean before that                       Eqs 6 and 7, the KL a k2 loss (Eq 8)

The loss is in `clipped`, shared with GRPO. d_t = l_t - l^ref_t at the start of the step.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rlhf.algorithms import Algorithm, RunState, bandit, clipped
from rlhf.algorithms.bandit import Episode
from rlhf.config import KlConfig, ReinforcePlusPlusBaselineConfig, ReinforcePlusPlusConfig
from rlhf.experience import Floats, Group, TrainBatch
from rlhf.metrics import last
from rlhf.ops.advantages import group_deviation, returns_to_go
from rlhf.ops.kl import k1
from rlhf.ops.masked import whiten


def build(config: ReinforcePlusPlusConfig | ReinforcePlusPlusBaselineConfig) -> Algorithm:
    """REINFORCE++ with or without the group's mean as a baseline; it carries nothing from step to step."""
    return Algorithm(
        needs=bandit.needed_columns(config.kl),
        initial_state={},
        prepare=(
            partial(prepare_against_group, config)
            if isinstance(config, ReinforcePlusPlusBaselineConfig)
            else partial(prepare, config)
        ),
        loss=partial(clipped.loss, config),
    )


def prepare(config: ReinforcePlusPlusConfig, groups: Sequence[Group], state: RunState) -> tuple[TrainBatch, RunState]:
    """Credit assignment from each sample's own score; one sample a prompt is enough. Pure; the order of groups is
    irrelevant."""
    scored = bandit.score(groups, config)
    returns = token_returns(scored, [episode.paid for episode in scored], config.kl)
    return _whitened_batch(config, groups, scored, scored, returns), state


def prepare_against_group(
    config: ReinforcePlusPlusBaselineConfig, groups: Sequence[Group], state: RunState
) -> tuple[TrainBatch, RunState]:
    """Credit assignment from the distance to the group's mean score; the lone scorable sample of a prompt has 0."""
    scored = bandit.score(groups, config)
    kept = bandit.varied(scored, drop_equal_groups=config.drop_equal_groups)
    paid = torch.tensor([episode.paid for episode in kept], dtype=torch.float64)
    prompts = torch.tensor([episode.prompt_id for episode in kept], dtype=torch.int64)
    returns = token_returns(kept, group_deviation(paid, prompts).tolist(), config.kl)
    return _whitened_batch(config, groups, scored, kept, returns), state


def token_returns(episodes: Sequence[Episode], scores: Sequence[float], kl: KlConfig) -> list[Tensor]:
    """A_t of each completion at its tokens with a true loss mask, (|y_i|,) float64: its score, less the KL price of the
    token and of those after it where that is part of the reward."""
    returns = []
    for episode, score in zip(episodes, scores, strict=True):
        length = int(episode.sample.loss_mask.sum())
        price = torch.zeros(length, dtype=torch.float64)
        if kl.coef and kl.place == "reward":
            divergence = k1(bandit.log_ratio(episode.where, episode.sample))
            price = kl.coef * returns_to_go(divergence, torch.ones(length, dtype=torch.bool))
        returns.append(score - price)
    return returns


def whitened(episodes: Sequence[Episode], returns: Sequence[Tensor]) -> list[Floats]:
    """The advantages (T,) of each completion: returns with mean 0 and standard deviation 1 over the tokens of them all,
    0 at masked tokens."""
    together = _all_tokens(returns)
    spread = whiten(together, torch.ones(len(together), dtype=torch.bool))
    advantages = []
    for episode, own in zip(episodes, torch.split(spread, [len(values) for values in returns]), strict=True):
        credit = np.zeros(len(episode.sample.token_ids), dtype=np.float32)
        credit[episode.sample.loss_mask] = own.numpy()
        advantages.append(credit)
    return advantages


def _whitened_batch(
    config: ReinforcePlusPlusConfig | ReinforcePlusPlusBaselineConfig,
    groups: Sequence[Group],
    scored: Sequence[Episode],
    kept: Sequence[Episode],
    returns: Sequence[Tensor],
) -> TrainBatch:
    batch = clipped.train_batch(config, groups, scored, kept, whitened(kept, returns))
    together = _all_tokens(returns)
    if len(together):
        batch.metrics["advantage/raw_mean"] = last(float(together.mean()))
        batch.metrics["advantage/raw_std"] = last(float(together.std(correction=0)))
    return batch


def _all_tokens(returns: Sequence[Tensor]) -> Tensor:
    """One behind the other, float64; of no completions: none."""
    return torch.cat([torch.zeros(0, dtype=torch.float64), *returns])
