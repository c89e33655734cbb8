"""What RLOO and REINFORCE share: the whole completion is one action, paid once, and the loss is the policy gradient.

    R = r - beta sum_t m_t d_t                       the KL price is part of the reward, before any baseline
    loss = -sum_i A_i sum_t m_t w_t l_t              arXiv 2402.14740, Eqs 3 and 6; w is the importance weight

The two differ in the baseline only, which is in their own files. d_t = l_t - l^ref_t is policy minus reference.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf.config import KlConfig
from rlhf.experience import (
    ADVANTAGES,
    BEHAVIOR_LOGPROBS,
    OLD_LOGPROBS,
    REF_LOGPROBS,
    REWARD,
    Floats,
    Group,
    Ids,
    Row,
    Sample,
    TrainBatch,
)
from rlhf.metrics import Metric, Metrics, last, mean, mean_of, total
from rlhf.ops.kl import k1, k3
from rlhf.ops.losses import k2_loss, k3_loss, policy_gradient, truncated_ratio
from rlhf.ops.microbatch import LossSums, MicroBatch, Outputs

# Log-ratios beyond this many nats a token enter k3 as this many: e^20 is 5e8, and one such token would be the whole
# mean.
K3_CLAMP = 20.0


class Episode(NamedTuple):
    """A sample that could be scored: the prompt's id and tokens, the judge's score r, and the shaped reward R."""

    prompt_id: int
    prompt_ids: Ids
    sample: Sample
    score: float
    reward: float


def needed_columns(kl: KlConfig) -> frozenset[str]:
    """The reward, and the reference's log-probabilities when leaving it has a price."""
    return frozenset({REWARD, REF_LOGPROBS}) if kl.coef > 0 else frozenset({REWARD})


def score(groups: Sequence[Group], kl: KlConfig) -> list[Episode]:
    """The scorable samples in the order of (prompt id, sample index), with R = r - beta sum_t m_t d_t.

    A sample whose reward is None leaves its group: it is not a sample of reward 0. With the KL as a loss R is r. Raises
    ValueError when a column is missing or a sample was not drawn by a policy of this run.
    """
    episodes = []
    for group in sorted(groups, key=lambda group: group.prompt.id):
        for sample in group.samples:
            where = f"prompt {group.prompt.id}, sample {sample.index}"
            if REWARD not in sample.scores:
                raise ValueError(f"{where}: no column {REWARD!r}, only {sorted(sample.scores)}")
            score = sample.scores[REWARD]
            if score is None:
                continue
            price = kl.coef * float(k1(log_ratio(where, sample)).sum()) if kl.coef and kl.place == "reward" else 0.0
            episodes.append(Episode(group.prompt.id, group.prompt.token_ids, sample, score, score - price))
    return episodes


def train_batch(groups: Sequence[Group], episodes: Sequence[Episode], advantages: Tensor, kl: KlConfig) -> TrainBatch:
    """One row an episode, its advantage on every token; the learner divides by the number of rows (Eq 6's 1/n).

    advantages (N,) for N episodes. Empty and fully masked completions stay rows: they count in n and have no gradient.
    """
    # Columns must be the same in all rows: where only some samples have old log-probs, the others' sampler's stand in,
    # which makes their importance weight 1.
    with_old = any(OLD_LOGPROBS in episode.sample.tokens for episode in episodes)
    rows = []
    for unit, (episode, advantage) in enumerate(zip(episodes, advantages.tolist(), strict=True)):
        sample, where = episode.sample, f"prompt {episode.prompt_id}, sample {episode.sample.index}"
        if sample.sampling is None or sample.behavior_logprobs is None:
            raise ValueError(f"{where}: not sampled by a policy of this run, so it has no policy gradient")
        columns = {
            ADVANTAGES: np.full(len(sample.token_ids), advantage, dtype=np.float32),
            BEHAVIOR_LOGPROBS: sample.behavior_logprobs,
        }
        if with_old:
            columns[OLD_LOGPROBS] = policy_logprobs(where, sample)
        if kl.coef and kl.place == "loss":
            columns[REF_LOGPROBS] = _token_column(where, sample, REF_LOGPROBS)
        rows.append(
            Row(
                unit=unit,
                prompt_ids=episode.prompt_ids,
                completion_ids=sample.token_ids,
                loss_mask=sample.loss_mask,
                temperature=sample.sampling.temperature,
                tokens=columns,
            )
        )
    return TrainBatch(tuple(rows), "rows", measure(groups, episodes, advantages))


def loss(kl: KlConfig, ratio_cap: float, outputs: Outputs, batch: MicroBatch) -> LossSums:
    """-sum_i A_i sum_t m_t w_t l_t, plus beta times the KL when that is a loss; sums over the micro-batch.

    The weight w is 1 when the rows have no old log-probs: fresh samples, one optimizer step. With old log-probs it is

        w_t = sg[min(exp(l^old_t - l^b_t), cap)] sg[min(exp(l_t - l^old_t), cap)]

    the staleness of the sample (and the engine's mismatch) times the drift within the step; where nothing is truncated,
    the importance ratio pi / pi_b of the token.
    """
    weights, truncated = _importance(outputs.logprobs, batch, ratio_cap)
    policy = policy_gradient(outputs.logprobs, batch.tokens[ADVANTAGES], batch.mask, weights)
    rows, tokens = batch.weight.sum(), batch.mask.sum()
    means = {
        "loss/policy": (policy.detach(), rows),
        "clip/fraction": ((truncated & batch.mask).sum(), tokens),
    }
    if not kl.coef or kl.place == "reward":
        return LossSums(policy, means)
    reference = batch.tokens[REF_LOGPROBS]
    if kl.loss_estimator == "k2":
        divergence = k2_loss(outputs.logprobs, reference, batch.mask, weights)
    else:
        divergence, clamped = k3_loss(outputs.logprobs, reference, batch.mask, weights, K3_CLAMP)
        means["kl/loss_clamped_fraction"] = (clamped, tokens)
    means["loss/kl"] = (divergence.detach(), rows)
    return LossSums(policy + kl.coef * divergence, means)


def measure(groups: Sequence[Group], episodes: Sequence[Episode], advantages: Tensor) -> Metrics:
    """What is worth knowing of a step before it is trained: see docs/algorithms/rloo.md for each name."""
    samples = [(f"prompt {g.prompt.id}, sample {s.index}", s) for g in groups for s in g.samples]
    scores = [episode.score for episode in episodes]
    measured: Metrics = {
        "reward/mean": mean_of(scores),
        "completion/length_mean": mean_of(float(sample.loss_mask.sum()) for _, sample in samples),
        "completion/unfinished_fraction": mean_of(float(sample.finish_reason == "length") for _, sample in samples),
        "advantage/abs_mean": mean_of(advantages.abs().tolist()),
        "group/zero_advantage_fraction": _zero_groups(episodes, advantages),
        "faults/unscorable": total(len(samples) - len(episodes)),
    }
    if scores:
        measured["reward/std"] = last(math.sqrt(float(np.var(np.array(scores, dtype=np.float64)))))
    if samples and all(REF_LOGPROBS in sample.tokens for _, sample in samples):
        ratios = [log_ratio(where, sample) for where, sample in samples]
        estimates = [k3(ratio, K3_CLAMP) for ratio in ratios]
        measured["kl/k1"] = mean_of(float(k1(ratio).sum()) for ratio in ratios)
        measured["kl/k3"] = mean_of(float(estimate.sum()) for estimate, _ in estimates)
        clamped = sum(float(held.sum()) for _, held in estimates)
        measured["kl/k3_clamped_fraction"] = mean(clamped, sum(len(ratio) for ratio in ratios))
    return measured


def log_ratio(where: str, sample: Sample) -> Tensor:
    """d_t = l_t - l^ref_t of the tokens with a true loss mask, (sum of the mask,) float64; `where` is for the error."""
    policy, reference = policy_logprobs(where, sample), _token_column(where, sample, REF_LOGPROBS)
    return torch.from_numpy((policy.astype(np.float64) - reference.astype(np.float64))[sample.loss_mask])


def policy_logprobs(where: str, sample: Sample) -> Floats:
    """The sample's log-probabilities under the weights at the start of the step, (T,).

    The learner's own (old) where it computed them. Otherwise the sampler's: those samples are of the current version,
    so both are the same weights and differ only by the mismatch of the engines, which is watched and alarmed on.
    """
    if OLD_LOGPROBS in sample.tokens:
        return sample.tokens[OLD_LOGPROBS]
    if sample.behavior_logprobs is None:
        raise ValueError(f"{where}: not sampled by a policy of this run, so it has no policy gradient")
    return sample.behavior_logprobs


def _token_column(where: str, sample: Sample, name: str) -> Floats:
    if name not in sample.tokens:
        raise ValueError(f"{where}: no column {name!r}, only {sorted(sample.tokens)}")
    return sample.tokens[name]


def _importance(logprobs: Tensor, batch: MicroBatch, cap: float) -> tuple[Tensor, Tensor]:
    """The weight of each token (B, T) and where it was truncated (B, T) bool."""
    if OLD_LOGPROBS not in batch.tokens:
        return torch.ones_like(logprobs), torch.zeros_like(batch.mask)
    old = batch.tokens[OLD_LOGPROBS]
    staleness, far = truncated_ratio(old, batch.tokens[BEHAVIOR_LOGPROBS], cap)
    drift, drifted = truncated_ratio(logprobs, old, cap)
    return staleness * drift, far | drifted


def _zero_groups(episodes: Sequence[Episode], advantages: Tensor) -> Metric:
    largest: dict[int, float] = {}
    for episode, size in zip(episodes, advantages.abs().tolist(), strict=True):
        largest[episode.prompt_id] = max(size, largest.get(episode.prompt_id, 0.0))
    return mean_of(float(size == 0.0) for size in largest.values())
