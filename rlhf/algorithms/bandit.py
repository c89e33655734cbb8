"""What the online algorithms share: how scores become rewards, rows, metrics; RLOO's loss.

    R = r - beta sum_t m_t d_t                       the KL price is part of the reward, before any baseline
    loss = -sum_i A_i sum_t m_t w_t l_t              arXiv 2402.14740, Eqs 3 and 6; w is that of `off_policy`

In RLOO and REINFORCE the whole completion is one action, paid once; they differ in the baseline only, which is in their
own files. GRPO and REINFORCE++ have the loss of `clipped`. d_t = l_t - l^ref_t is policy minus reference.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf.algorithms import off_policy
from rlhf.algorithms.pay import paid
from rlhf.config import KlConfig, OnlineConfig, ReinforceConfig, RlooConfig
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
from rlhf.ops.losses import k2_loss, k2_token_loss, k3_loss, policy_gradient
from rlhf.ops.microbatch import LossSums, MicroBatch, Outputs

# Log-ratios beyond this many nats a token enter k3 as this many: e^20 is 5e8, and one such token would be the whole
# mean.
K3_CLAMP = 20.0


class Episode(NamedTuple):
    """A sample that could be scored: the prompt's id and tokens, what the judge gave, and what that became.

    score, the judge's r as it is; paid, r within reward_clip and after the rule for a missing end; reward, R: paid
    minus the KL price where that is part of the reward.
    """

    prompt_id: int
    prompt_ids: Ids
    sample: Sample
    score: float
    paid: float
    reward: float

    @property
    def where(self) -> str:
        return f"prompt {self.prompt_id}, sample {self.sample.index}"


def needed_columns(kl: KlConfig) -> frozenset[str]:
    """The reward, and the reference's log-probabilities when leaving it has a price."""
    return frozenset({REWARD, REF_LOGPROBS}) if kl.coef > 0 else frozenset({REWARD})


def score(groups: Sequence[Group], config: OnlineConfig) -> list[Episode]:
    """The scorable samples in the order of (prompt id, sample index), with R = r - beta sum_t m_t d_t.

    A sample whose reward is None leaves its group: it is not a sample of reward 0. With the KL as a loss R is r. Raises
    ValueError when a column is missing or a sample was not drawn by a policy of this run.
    """
    beta = config.kl.coef if config.kl.place == "reward" else 0.0
    episodes = []
    for group in sorted(groups, key=lambda group: group.prompt.id):
        for sample in group.samples:
            where = f"prompt {group.prompt.id}, sample {sample.index}"
            if REWARD not in sample.scores:
                raise ValueError(f"{where}: no column {REWARD!r}, only {sorted(sample.scores)}")
            score = sample.scores[REWARD]
            if score is None:
                continue
            worth = paid(score, sample, config)
            price = beta * float(k1(log_ratio(where, sample)).sum()) if beta else 0.0
            episodes.append(Episode(group.prompt.id, group.prompt.token_ids, sample, score, worth, worth - price))
    return episodes


def varied(episodes: Sequence[Episode], *, drop_equal_groups: bool) -> list[Episode]:
    """The episodes without those of groups whose scorable samples all have one score, where the run file says so.

    The judge's own score decides: an all-wrong group stays one when its samples differ in length or KL only.
    """
    scores: dict[int, set[float]] = {}
    for episode in episodes:
        scores.setdefault(episode.prompt_id, set()).add(episode.score)
    return [episode for episode in episodes if not drop_equal_groups or len(scores[episode.prompt_id]) > 1]


def train_batch(
    config: RlooConfig | ReinforceConfig,
    groups: Sequence[Group],
    scored: Sequence[Episode],
    kept: Sequence[Episode],
    advantages: Tensor,
) -> TrainBatch:
    """One row a kept episode, its advantage on every token; the learner divides by the number of rows, N.

    advantages (N,) for N kept episodes. Empty and fully masked completions stay rows: they count in N and have no
    gradient.
    """
    columns = [
        {ADVANTAGES: np.full(len(episode.sample.token_ids), advantage, dtype=np.float32)}
        for episode, advantage in zip(kept, advantages.tolist(), strict=True)
    ]
    sizes = advantages.abs().tolist()
    made = rows(kept, columns, config.kl)
    measured = measure(groups, scored, kept) | off_policy.measure(config.off_policy, made)
    measured["advantage/abs_mean"] = mean_of(sizes)
    measured["group/zero_advantage_fraction"] = zero_groups(kept, sizes)
    return TrainBatch(made, "rows", measured)


def rows(episodes: Sequence[Episode], columns: Sequence[Mapping[str, Floats]], kl: KlConfig) -> tuple[Row, ...]:
    """One row an episode with these token columns and those of its sampler, learner and (KL as a loss) reference.

    Raises ValueError when a sample was not drawn by a policy of this run.
    """
    # Columns must be the same in all rows: where only some samples have old log-probs, the others' sampler's stand in,
    # which makes their weight for age 1.
    with_old = any(OLD_LOGPROBS in episode.sample.tokens for episode in episodes)
    made = []
    for unit, (episode, own) in enumerate(zip(episodes, columns, strict=True)):
        sample = episode.sample
        if sample.sampling is None or sample.behavior_logprobs is None:
            raise ValueError(f"{episode.where}: not sampled by a policy of this run, so it has no policy gradient")
        tokens = {**own, BEHAVIOR_LOGPROBS: sample.behavior_logprobs}
        if with_old:
            tokens[OLD_LOGPROBS] = policy_logprobs(episode.where, sample)
        if kl.coef and kl.place == "loss":
            tokens[REF_LOGPROBS] = token_column(episode.where, sample, REF_LOGPROBS)
        made.append(
            Row(
                unit=unit,
                prompt_ids=episode.prompt_ids,
                completion_ids=sample.token_ids,
                loss_mask=sample.loss_mask,
                temperature=sample.sampling.temperature,
                tokens=tokens,
            )
        )
    return tuple(made)


def loss(config: RlooConfig | ReinforceConfig, outputs: Outputs, batch: MicroBatch) -> LossSums:
    """-sum_i A_i sum_t m_t w_t l_t, plus beta times the KL when that is a loss; sums over the micro-batch.

    w is the weight for the age of the sample times that for the policy's drift within the step (`off_policy`): 1 where
    samples are fresh and trained in one optimizer step; where nothing is truncated, the ratio pi / pi_b of the token
    (or of its completion).
    """
    found = off_policy.weigh(config.off_policy, outputs.logprobs, batch)
    weights = found.age * found.drift
    policy = policy_gradient(outputs.logprobs, batch.tokens[ADVANTAGES], batch.mask, weights)
    count, tokens = batch.weight.sum(), batch.mask.sum()
    means = {
        "loss/policy": (policy.detach(), count),
        "clip/fraction": ((found.truncated & batch.mask).sum(), tokens),
    }
    price = kl_loss(config.kl, outputs, batch, weights, count)
    return LossSums(policy + price.loss, {**means, **price.means})


def kl_loss(kl: KlConfig, outputs: Outputs, batch: MicroBatch, weights: Tensor, count: Tensor) -> LossSums:
    """beta times the KL, summed, where that is a loss; 0 where it is not. weights (B, T); `count` is what the learner
    divides by."""
    if not kl.coef or kl.place == "reward":
        return LossSums(torch.zeros_like(count, dtype=torch.float32), {})
    logprobs, reference = outputs.logprobs, batch.tokens[REF_LOGPROBS]
    means = {}
    if kl.loss_estimator == "k2":
        divergence = k2_loss(logprobs, reference, batch.mask, weights)
    elif kl.loss_estimator == "k2_token":
        divergence = k2_token_loss(logprobs, reference, batch.mask, weights)
    else:
        divergence, clamped = k3_loss(logprobs, reference, batch.mask, weights, K3_CLAMP)
        means["kl/loss_clamped_fraction"] = (clamped, batch.mask.sum())
    means["loss/kl"] = (divergence.detach(), count)
    return LossSums(kl.coef * divergence, means)


def measure(groups: Sequence[Group], scored: Sequence[Episode], kept: Sequence[Episode]) -> Metrics:
    """What is worth knowing of a step's samples before it is trained: see docs/algorithms/rloo.md for each name.

    Over all samples of the step: groups that are left out of the training still count here.
    """
    samples = [(f"prompt {g.prompt.id}, sample {s.index}", s) for g in groups for s in g.samples]
    scores = [episode.score for episode in scored]
    measured: Metrics = {
        "reward/mean": mean_of(scores),
        "completion/length_mean": mean_of(float(sample.loss_mask.sum()) for _, sample in samples),
        "completion/unfinished_fraction": mean_of(float(sample.finish_reason == "length") for _, sample in samples),
        "groups/equal_dropped": total(len({e.prompt_id for e in scored} - {e.prompt_id for e in kept})),
        "faults/unscorable": total(len(samples) - len(scored)),
    }
    if scores:
        measured["reward/std"] = last(math.sqrt(float(np.var(np.array(scores, dtype=np.float64)))))
    if samples and all(REF_LOGPROBS in sample.tokens for _, sample in samples):
        measured |= kl_of([log_ratio(where, sample) for where, sample in samples])
    return measured


def kl_of(ratios: Sequence[Tensor]) -> Metrics:
    """The KL of a completion by two estimators, from the d_t of each sample's tokens, and how often k3 was held."""
    estimates = [k3(ratio, K3_CLAMP) for ratio in ratios]
    clamped = sum(float(held.sum()) for _, held in estimates)
    return {
        "kl/k1": mean_of(float(k1(ratio).sum()) for ratio in ratios),
        "kl/k3": mean_of(float(estimate.sum()) for estimate, _ in estimates),
        "kl/k3_clamped_fraction": mean(clamped, sum(len(ratio) for ratio in ratios)),
    }


def log_ratio(where: str, sample: Sample) -> Tensor:
    """d_t = l_t - l^ref_t of the tokens with a true loss mask, (sum of the mask,) float64; `where` is for the error."""
    policy, reference = policy_logprobs(where, sample), token_column(where, sample, REF_LOGPROBS)
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


def token_column(where: str, sample: Sample, name: str) -> Floats:
    """The sample's column (T,). Raises ValueError where it has none of that name."""
    if name not in sample.tokens:
        raise ValueError(f"{where}: no column {name!r}, only {sorted(sample.tokens)}")
    return sample.tokens[name]


def zero_groups(episodes: Sequence[Episode], sizes: Sequence[float]) -> Metric:
    """The share of groups whose episodes all have advantages of size 0."""
    largest: dict[int, float] = {}
    for episode, size in zip(episodes, sizes, strict=True):
        largest[episode.prompt_id] = max(size, largest.get(episode.prompt_id, 0.0))
    return mean_of(float(size == 0.0) for size in largest.values())
