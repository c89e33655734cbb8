"""A pairwise ranker: a scalar head that reads a prompt with two answers and says whether the first is the better one.

    loss = 1/U sum_u -1/2 [log sigma(s(x, y_w, y_l)) + log sigma(-s(x, y_l, y_w))]       sigma(s) = P(A)

arXiv 2305.10425 (section 3.1) and 2309.06657 (section 3.2) train P(A) on one order, drawn at random; here both orders
of every pair are read, which is the mean over the draw. Of a group the first sample shows the preferred answer first
(rank 0), the second shows it second (rank 1): `data.comparisons` writes them so.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from rlhf.algorithms import RunState, ScoreAlgorithm
from rlhf.algorithms.ranked import answer_row, ranked_batch
from rlhf.config import PairwiseRankerConfig
from rlhf.experience import RANK, Group, Row, TrainBatch
from rlhf.ops.microbatch import LossSums, MicroBatch, Scores
from rlhf.ops.ranking import last_scores, order_likelihood, ranked_pairs


def build(config: PairwiseRankerConfig) -> ScoreAlgorithm:
    """It has no settings and carries nothing from step to step."""
    return ScoreAlgorithm(needs=frozenset({RANK}), initial_state={}, prepare=prepare, loss=partial(loss, config))


def prepare(groups: Sequence[Group], state: RunState) -> tuple[TrainBatch, RunState]:
    """One unit a group, its two orders as rows; pure, the order of groups is irrelevant.

    A group whose two orders are the same tokens (equal answers) is left out and counted in groups/dropped. Raises
    ValueError where the samples are not two orders with the ranks 0 and 1.
    """
    rows: list[Row] = []
    kept = 0
    for group in sorted(groups, key=lambda group: group.prompt.id):
        if [sample.scores.get(RANK) for sample in group.samples] != [0.0, 1.0]:
            raise ValueError(f"prompt {group.prompt.id}: not the two orders of one comparison, with ranks 0 and 1")
        if np.array_equal(group.samples[0].token_ids, group.samples[1].token_ids):
            continue
        rows += [answer_row(kept, group, sample, {RANK: rank}) for rank, sample in enumerate(group.samples)]
        kept += 1
    return ranked_batch(rows, len(groups) - kept), state


def loss(config: PairwiseRankerConfig, outputs: Scores, batch: MicroBatch) -> LossSums:
    """The loss above without its 1/U, summed over the units of the micro-batch."""
    scores = last_scores(outputs.values, batch.mask)
    pairs = ranked_pairs(batch.tokens[RANK][:, 0], batch.unit)
    likelihood = order_likelihood(scores[pairs.better], scores[pairs.worse]).sum()
    count, seen = torch.tensor(len(pairs.better)), scores.detach()
    first, second = seen[pairs.better], seen[pairs.worse]
    means = {
        "loss/ranker": (likelihood.detach(), count),
        "rewards/margins": (((first - second) / 2).sum(), count),
        "rewards/accuracies": ((first > second).sum(), count),
        "ranker/first_mean": (((first.sigmoid() + second.sigmoid()) / 2).sum(), count),
        "ranker/inconsistent": (((first > 0) == (second > 0)).sum(), count),
    }
    return LossSums(likelihood, means)
