"""Reward models: a scalar head trained on ranked answers, arXiv 2203.02155, section 3.5.

    loss = 1/U sum_u [ 1/C(K, 2) sum_{w above l} -log sigma(r_w - r_l - margin) + c (r_w + r_l)^2 ]      Eq 1

U prompts, K ranked answers each: a pair is K = 2. All pairs of a prompt are one unit, which is never split, with one
forward pass an answer. r is the score at the last token of prompt and answer. The pairs and the loss: `ops.ranking`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from rlhf.algorithms import RunState, ScoreAlgorithm
from rlhf.algorithms.ranked import answer_row, ranked_batch
from rlhf.config import RewardModelConfig
from rlhf.experience import RANK, Group, Row, TrainBatch
from rlhf.metrics import total
from rlhf.ops.microbatch import LossSums, MicroBatch, Scores
from rlhf.ops.ranking import bradley_terry, centring, last_scores, ranked_pairs

MARGIN = "margin"


def build(config: RewardModelConfig) -> ScoreAlgorithm:
    """Bradley-Terry with these settings; it carries nothing from step to step."""
    return ScoreAlgorithm(
        needs=frozenset({RANK}), initial_state={}, prepare=partial(prepare, config), loss=partial(loss, config)
    )


def prepare(config: RewardModelConfig, groups: Sequence[Group], state: RunState) -> tuple[TrainBatch, RunState]:
    """One unit a group, its answers as rows with their ranks; pure, the order of groups is irrelevant.

    Left out and counted in groups/dropped: groups that teach nothing, because all ranks are equal, an answer is empty,
    or two answers of different rank are the same tokens. Answers of equal rank make no pair: pairs/ties. Raises
    ValueError where a rank or a margin is missing.
    """
    rows: list[Row] = []
    kept, ties = 0, 0
    for group in sorted(groups, key=lambda group: group.prompt.id):
        ranks = [_rank(group, index) for index in range(len(group.samples))]
        if not _is_a_preference(group, ranks):
            continue
        margin = _margin(group, config.margin_column)
        for sample, rank in zip(group.samples, ranks, strict=True):
            rows.append(answer_row(kept, group, sample, {RANK: rank, MARGIN: margin}))
        kept += 1
        ties += sum(count * (count - 1) // 2 for count in Counter(ranks).values())
    batch = ranked_batch(rows, len(groups) - kept)
    return replace(batch, metrics={**batch.metrics, "pairs/ties": total(ties)}), state


def loss(config: RewardModelConfig, outputs: Scores, batch: MicroBatch) -> LossSums:
    """The loss above without its 1/U, summed over the units of the micro-batch."""
    scores = last_scores(outputs.values, batch.mask)
    pairs = ranked_pairs(batch.tokens[RANK][:, 0], batch.unit)
    likelihood = bradley_terry(scores, pairs, batch.tokens[MARGIN][:, 0])
    centred = centring(scores, pairs)
    units, seen = pairs.weight.sum(), scores.detach()
    better, worse = seen[pairs.better], seen[pairs.worse]
    means = {
        "loss/bradley_terry": (likelihood.detach(), units),
        "loss/centring": (centred.detach(), units),
        "rewards/chosen": ((pairs.weight * better).sum(), units),
        "rewards/rejected": ((pairs.weight * worse).sum(), units),
        "rewards/margins": ((pairs.weight * (better - worse)).sum(), units),
        "rewards/accuracies": ((pairs.weight * (better > worse)).sum(), units),
    }
    return LossSums(likelihood + config.centring * centred, means)


def _rank(group: Group, index: int) -> float:
    scores = group.samples[index].scores
    rank = scores.get(RANK)
    if rank is None:
        raise ValueError(f"prompt {group.prompt.id}, sample {index}: no column {RANK!r}, only {sorted(scores)}")
    return rank


def _is_a_preference(group: Group, ranks: Sequence[float]) -> bool:
    ids = [tuple(sample.token_ids.tolist()) for sample in group.samples]
    contradicted = any(
        ids[i] == ids[j] and ranks[i] != ranks[j] for i in range(len(ids)) for j in range(i + 1, len(ids))
    )
    return len(set(ranks)) > 1 and all(ids) and not contradicted


def _margin(group: Group, column: str | None) -> float:
    if column is None:
        return 0.0
    found = group.prompt.columns.get(column)
    if not isinstance(found, int | float) or not np.isfinite(found):
        raise ValueError(
            f"prompt {group.prompt.id} (row {group.prompt.row}): column {column!r} (algorithm.margin_column) is "
            f"{found!r}, expected a number"
        )
    return float(found)
