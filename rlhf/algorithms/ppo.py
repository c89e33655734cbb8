"""PPO, arXiv 1707.06347, as in InstructGPT, arXiv 2203.02155: tokens are actions, a critic says what to expect.

    r_t = -beta d_t + 1[t = last token] r                    the KL is paid token by token, the score at the end
    A_t, return_t = GAE(r, V; gamma, lambda)                 arXiv 1506.02438; the returns before A is whitened
    loss = mean_t clipped surrogate;   critic: mean_t of the clipped squared error to the returns

d_t = l_t - l^ref_t and V_t are those at the start of the step, V_t read where token t is predicted. The policy's loss
is in `clipped`, shared with GRPO.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf.algorithms import ActorCriticAlgorithm, RunState, bandit, clipped
from rlhf.algorithms.bandit import Episode
from rlhf.config import PpoConfig
from rlhf.experience import RETURNS, VALUES, Floats, Group, TrainBatch
from rlhf.metrics import Metrics, last
from rlhf.ops.clipped import clipped_value_loss
from rlhf.ops.gae import gae, token_rewards
from rlhf.ops.kl import k1
from rlhf.ops.masked import scale_keep_mean, whiten
from rlhf.ops.microbatch import LossSums, MicroBatch, Scores


class Credit(NamedTuple):
    """advantages before whitening, returns, values (N, L) float64 and mask (N, L) bool; L counts trained tokens only,
    and all are 0 where the mask is false."""

    advantages: Tensor
    returns: Tensor
    values: Tensor
    mask: Tensor


def build(config: PpoConfig) -> ActorCriticAlgorithm:
    """PPO with these settings; it carries nothing from step to step."""
    return ActorCriticAlgorithm(
        needs=bandit.needed_columns(config.kl) | {VALUES},
        initial_state={},
        prepare=partial(prepare, config),
        loss=partial(clipped.loss, config),
        value_loss=partial(value_loss, config),
    )


def prepare(config: PpoConfig, groups: Sequence[Group], state: RunState) -> tuple[TrainBatch, RunState]:
    """Credit assignment from values, old and reference log-probs; whitening is over all trained tokens of the step.

    One sample a prompt is enough. Pure; the order of groups is irrelevant. Raises ValueError where a column is missing.
    """
    scored = bandit.score(groups, config)
    found = credit(config, scored)
    advantages = whiten(found.advantages, found.mask) if config.whiten_advantages else found.advantages
    batch = clipped.train_batch(config, groups, scored, scored, _columns(scored, advantages, found.mask))
    returns, values = (_columns(scored, column, found.mask) for column in (found.returns, found.values))
    rows = tuple(
        replace(row, tokens={**row.tokens, RETURNS: due, VALUES: expected})
        for row, due, expected in zip(batch.rows, returns, values, strict=True)
    )
    return TrainBatch(rows, batch.normalizer, {**batch.metrics, **_measured(found)}), state


def credit(config: PpoConfig, episodes: Sequence[Episode]) -> Credit:
    """Token rewards, then GAE. Tokens that no policy sampled are skipped: the value after a token is that of the next
    token with a true loss mask."""
    mask = _padded([torch.ones(int(e.sample.loss_mask.sum()), dtype=torch.float64) for e in episodes]) > 0
    values = _padded([_trained(e, bandit.token_column(e.where, e.sample, VALUES)) for e in episodes])
    paid = torch.tensor([episode.paid for episode in episodes], dtype=torch.float64)
    priced = bool(config.kl.coef) and config.kl.place == "reward"
    divergence = _padded([k1(bandit.log_ratio(e.where, e.sample)) for e in episodes]) if priced else mask.double() * 0
    rewards = token_rewards(paid, divergence, mask, config.kl.coef if priced else 0.0)
    if config.whiten_rewards:
        rewards = scale_keep_mean(rewards, mask)
    advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
    return Credit(advantages, returns, values, mask)


def value_loss(config: PpoConfig, outputs: Scores, batch: MicroBatch) -> LossSums:
    """The critic's clipped squared error, summed over the trained tokens of the micro-batch."""
    clip = torch.inf if config.critic.value_clip is None else config.critic.value_clip
    error, held = clipped_value_loss(outputs.values, batch.tokens[VALUES], batch.tokens[RETURNS], batch.mask, clip)
    tokens = batch.mask.sum()
    return LossSums(error, {"loss/value": (error.detach(), tokens), "clip/value_fraction": (held, tokens)})


def explained_variance(returns: Tensor, values: Tensor) -> float | None:
    """1 - Var(return - V) / Var(return) of (N,) both: 1 for a perfect critic, 0 for a constant one, below 0 for a worse
    one; None where the returns are all equal."""
    if len(returns) == 0 or bool((returns == returns[0]).all()):
        return None
    return 1 - float((returns - values).var(correction=0) / returns.var(correction=0))


def _measured(found: Credit) -> Metrics:
    raw, returns, values = (column[found.mask] for column in (found.advantages, found.returns, found.values))
    if len(raw) == 0:
        return {}
    measured = {
        "advantage/raw_mean": last(float(raw.mean())),
        "advantage/raw_std": last(float(raw.std(correction=0))),
        "value/mean": last(float(values.mean())),
        "value/return_mean": last(float(returns.mean())),
    }
    explained = explained_variance(returns, values)
    return measured if explained is None else {**measured, "value/explained_variance": last(explained)}


def _trained(episode: Episode, column: Floats) -> Tensor:
    """A column's entries at trained tokens, float64."""
    return torch.from_numpy(column[episode.sample.loss_mask].astype(np.float64))


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows of different lengths as (N, longest) float64, 0 behind their ends."""
    together = torch.zeros(len(rows), max((len(row) for row in rows), default=0), dtype=torch.float64)
    for i, row in enumerate(rows):
        together[i, : len(row)] = row
    return together


def _columns(episodes: Sequence[Episode], padded: Tensor, mask: Tensor) -> list[Floats]:
    """The way back: for each episode (T,) float32, 0 at tokens that are not trained."""
    columns = []
    for episode, own, there in zip(episodes, padded, mask, strict=True):
        column = np.zeros(len(episode.sample.token_ids), dtype=np.float32)
        column[episode.sample.loss_mask] = own[there].numpy()
        columns.append(column)
    return columns
