"""What DPO, online DPO and RSO share: pairs become rows, and a pair costs what `ops.preferences` says.

    loss = sum over pairs of l(a, b) [+ c NLL(y_w)];     a, b = L - L_ref of the chosen and the rejected completion

The three differ in who writes the completions and in who is compared with whom, which is in their own files. A pair is
a unit of two adjacent rows, chosen first: the learner never splits it, and divides by the number of pairs.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf.algorithms import bandit
from rlhf.algorithms.pay import paid
from rlhf.config import PaidConfig, PreferenceLossConfig
from rlhf.experience import (
    BEHAVIOR_LOGPROBS,
    REF_LOGPROBS,
    REWARD,
    Floats,
    Group,
    Prompt,
    Row,
    Sample,
    TrainBatch,
)
from rlhf.metrics import Metrics, last, mean_of, total
from rlhf.ops import preferences
from rlhf.ops.logprobs import sequence_logprob
from rlhf.ops.microbatch import LossSums, MicroBatch, Outputs
from rlhf.ops.pairing import Pairing


class Candidates(NamedTuple):
    """The samples of a prompt that have a score, in the order of their indices, and their scores (N,) float64."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    scores: Tensor

    @property
    def text(self) -> Tensor:
        """(N,) int64, equal numbers where texts are equal."""
        numbers = {sample.text: i for i, sample in enumerate(self.samples)}
        return torch.tensor([numbers[sample.text] for sample in self.samples], dtype=torch.int64)


class Pair(NamedTuple):
    """A prompt and two answers to it, the better one first."""

    prompt: Prompt
    chosen: Sample
    rejected: Sample


class Side(NamedTuple):
    """One side of B pairs: logprob (B,) = L; score (B,), what losses compare: L - L_ref, or L without a reference;
    length (B,) in trained tokens."""

    logprob: Tensor
    score: Tensor
    length: Tensor


def scored(groups: Sequence[Group], column: str) -> list[Candidates]:
    """The scorable samples of each group in the order of prompt ids. Raises ValueError when the column is missing."""
    found = []
    for group in sorted(groups, key=lambda group: group.prompt.id):
        kept, scores = [], []
        for sample in group.samples:
            if column not in sample.scores:
                where = f"prompt {group.prompt.id}, sample {sample.index}"
                raise ValueError(f"{where}: no column {column!r}, only {sorted(sample.scores)}")
            score = sample.scores[column]
            if score is not None:
                kept.append(sample)
                scores.append(score)
        found.append(Candidates(group.prompt, tuple(kept), torch.tensor(scores, dtype=torch.float64)))
    return found


def worth(candidates: Sequence[Candidates], config: PaidConfig) -> list[Candidates]:
    """The same with what the run file makes of their scores, `reward_clip` and `missing_eos`: what is compared."""
    found = []
    for group in candidates:
        judged = zip(group.scores.tolist(), group.samples, strict=True)
        scores = [paid(score, sample, config) for score, sample in judged]
        found.append(group._replace(scores=torch.tensor(scores, dtype=torch.float64)))
    return found


def pairs_of(candidates: Candidates, pairing: Pairing) -> tuple[list[Pair], Metrics]:
    """The pairs of one prompt, and the counts of what made none. A side without a trained token drops its pair."""
    samples = candidates.samples
    pairs = [Pair(candidates.prompt, samples[winner], samples[loser]) for winner, loser in pairing.pairs]
    whole = [pair for pair in pairs if pair.chosen.loss_mask.any() and pair.rejected.loss_mask.any()]
    counts: Metrics = {
        "pairs/made": total(len(whole)),
        "pairs/ties": total(pairing.ties),
        "pairs/identical": total(pairing.identical),
        "pairs/empty": total(len(pairs) - len(whole)),
        "pairs/groups_without_fraction": mean_of([float(not whole)]),
    }
    return whole, counts


def train_batch(pairs: Sequence[Pair], reference: str | None, measured: Metrics) -> TrainBatch:
    """Two rows a pair; the learner divides by the number of pairs.

    reference, the token column that stands for l_ref; None for a loss without one. Where all completions have their
    sampler's log-probabilities the rows have them too, so that the learner can watch the mismatch of the engines.
    """
    sampled = all(sample.behavior_logprobs is not None for pair in pairs for sample in (pair.chosen, pair.rejected))
    rows = tuple(
        _row(unit, pair.prompt, sample, reference, with_behavior=sampled)
        for unit, pair in enumerate(pairs)
        for sample in (pair.chosen, pair.rejected)
    )
    lengths = [(float(pair.chosen.loss_mask.sum()), float(pair.rejected.loss_mask.sum())) for pair in pairs]
    about_pairs: Metrics = {
        "pairs/chosen_length_mean": mean_of(chosen for chosen, _ in lengths),
        "pairs/rejected_length_mean": mean_of(rejected for _, rejected in lengths),
        "pairs/longer_chosen": mean_of(math.copysign(1.0, c - r) if c != r else 0.0 for c, r in lengths),
    }
    return TrainBatch(rows, "units", {**measured, **about_pairs})


def loss(config: PreferenceLossConfig, outputs: Outputs, batch: MicroBatch) -> LossSums:
    """The preference loss summed over the pairs of the micro-batch, and its NLL part where the run file asks for it.

    Rows of weight 0 are fillers and make no pair. Raises ValueError when a pair is not two adjacent rows of one unit.
    """
    chosen, rejected = _sides(outputs.logprobs, batch, with_reference=config.has_reference)
    preference = (_against_reference if config.has_reference else _without_reference)(config, chosen, rejected).sum()
    count = torch.tensor(len(chosen.logprob))
    better, worse = (implicit_reward(config, side) for side in (chosen, rejected))
    margin = better - worse
    longer = torch.sign(chosen.length - rejected.length)
    means = {
        "loss/preference": (preference.detach(), count),
        "rewards/chosen": (better.sum(), count),
        "rewards/rejected": (worse.sum(), count),
        "rewards/margins": (margin.sum(), count),
        "rewards/accuracies": ((margin > 0).sum(), count),
        "rewards/longer_agreement": ((torch.sign(margin) * longer).sum(), count),
        "logps/chosen": (chosen.logprob.detach().sum(), count),
        "logps/rejected": (rejected.logprob.detach().sum(), count),
    }
    if config.nll == 0:
        return LossSums(preference, means)
    likelihood = chosen.logprob
    if config.nll_per == "token":
        likelihood = preferences.per_token(likelihood, chosen.length)
    means["loss/nll"] = (-likelihood.detach().sum(), count)
    return LossSums(preference - config.nll * likelihood.sum(), means)


def implicit_reward(config: PreferenceLossConfig, side: Side) -> Tensor:
    """What the policy's log-probabilities say a completion is worth, (B,) without gradient: beta times the log-ratio.

    Without a reference beta times the log-probability; of a token in simpo and orpo, which compare means.
    """
    score = side.score.detach()
    return config.beta * (preferences.per_token(score, side.length) if config.name in ("simpo", "orpo") else score)


def measure(groups: Sequence[Group]) -> Metrics:
    """Rewards, lengths and KL of a step's samples, before any of them is left out."""
    samples = [(f"prompt {g.prompt.id}, sample {s.index}", s) for g in groups for s in g.samples]
    measured: Metrics = {
        "completion/length_mean": mean_of(float(sample.loss_mask.sum()) for _, sample in samples),
        "completion/unfinished_fraction": mean_of(float(sample.finish_reason == "length") for _, sample in samples),
    }
    judged = [sample.scores[REWARD] for _, sample in samples if REWARD in sample.scores]
    if judged:
        rewards = [reward for reward in judged if reward is not None]
        measured["reward/mean"] = mean_of(rewards)
        measured["faults/unscorable"] = total(len(judged) - len(rewards))
        if rewards:
            measured["reward/std"] = last(float(np.std(np.array(rewards, dtype=np.float64))))
    if samples and all(REF_LOGPROBS in s.tokens and s.behavior_logprobs is not None for _, s in samples):
        ratios = [bandit.log_ratio(where, sample) for where, sample in samples]
        measured |= bandit.kl_of(ratios)
    return measured


def _row(unit: int, prompt: Prompt, sample: Sample, reference: str | None, *, with_behavior: bool) -> Row:
    where = f"prompt {prompt.id}, sample {sample.index}"
    if sample.sampling is not None and sample.sampling.temperature == 0:
        raise ValueError(f"{where} was sampled greedily (temperature 0), which has no log-probability")
    columns: dict[str, Floats] = {}
    if with_behavior and sample.behavior_logprobs is not None:
        columns[BEHAVIOR_LOGPROBS] = sample.behavior_logprobs
    if reference is not None:
        columns[REF_LOGPROBS] = _reference(where, sample, reference)
    # A completion of a data set was not sampled at any temperature: its log-probabilities are those of the plain model.
    temperature = 1.0 if sample.sampling is None else sample.sampling.temperature
    return Row(unit, prompt.token_ids, sample.token_ids, sample.loss_mask, temperature, columns)


def _reference(where: str, sample: Sample, reference: str) -> Floats:
    if reference == BEHAVIOR_LOGPROBS:
        if sample.behavior_logprobs is None:
            raise ValueError(f"{where}: not sampled by a policy of this run, so its sampler cannot be the reference")
        return sample.behavior_logprobs
    return bandit.token_column(where, sample, reference)


def _sides(logprobs: Tensor, batch: MicroBatch, *, with_reference: bool) -> tuple[Side, Side]:
    real = batch.weight > 0
    unit = batch.unit[real]
    if len(unit) % 2 or not torch.equal(unit[::2], unit[1::2]) or len(set(unit.tolist())) != len(unit) // 2:
        raise ValueError(f"a pair must be two adjacent rows of one unit; found the units {unit.tolist()}")
    mask = batch.mask[real]
    logprob = sequence_logprob(logprobs[real], mask)
    score = logprob
    if with_reference:
        # Token by token: differences of sums lose digits that a long completion has not to spare.
        score = sequence_logprob(logprobs[real] - batch.tokens[REF_LOGPROBS][real], mask)
    both = Side(logprob, score, mask.sum(dim=1))
    return Side(*(column[::2] for column in both)), Side(*(column[1::2] for column in both))


def _against_reference(config: PreferenceLossConfig, chosen: Side, rejected: Side) -> Tensor:
    """(B,) losses of log-ratios a, b."""
    a, b, beta, noise = chosen.score, rejected.score, config.beta, config.label_noise or 0.0
    match config.name:
        case "sigmoid":
            return preferences.sigmoid(a, b, beta)
        case "sigmoid_length_norm":
            return preferences.sigmoid_length_norm(a, b, chosen.length, rejected.length, beta)
        case "hinge":
            return preferences.hinge(a, b, beta)
        case "ipo":
            return preferences.ipo(a, b, chosen.length, rejected.length, beta)
        case "conservative":
            return preferences.conservative(a, b, beta, noise)
        case "robust":
            return preferences.robust(a, b, beta, noise)
        case "sppo_hard":
            return preferences.sppo_hard(a, b, beta)
    raise ValueError(f"{config.name} has no reference")


def _without_reference(config: PreferenceLossConfig, chosen: Side, rejected: Side) -> Tensor:
    """(B,) losses of log-probabilities L."""
    better, worse, beta = chosen.score, rejected.score, config.beta
    match config.name:
        case "slic_hinge":
            return preferences.slic_hinge(better, worse, beta)
        case "simpo":
            margin = config.target_margin or 0.0
            return preferences.simpo(better, worse, chosen.length, rejected.length, beta, margin)
        case "orpo":
            return preferences.orpo(better, worse, chosen.length, rejected.length, beta)
    raise ValueError(f"{config.name} has a reference")
