"""DPO and its variants on given completions, arXiv 2305.18290.

    a prompt's completions, ordered by rank (0 is preferred to 1) or by reward -> pairs -> -log sigma(beta h), ...

Who is compared with whom: `ops.pairing`; how a pair becomes rows and what it costs: `preference` and `ops.preferences`.
"""

from collections.abc import Sequence
from functools import partial

from rlhf import metrics
from rlhf.algorithms import Algorithm, RunState, preference
from rlhf.config import DpoConfig
from rlhf.experience import RANK, REF_LOGPROBS, REWARD, Group, TrainBatch
from rlhf.ops.pairing import best_against_worst, every_pair


def build(config: DpoConfig) -> Algorithm:
    """DPO with these settings; it carries nothing from step to step."""
    column = RANK if config.preferred_by == "rank" else REWARD
    return Algorithm(
        needs=frozenset({column, REF_LOGPROBS} if config.loss.has_reference else {column}),
        initial_state={},
        prepare=partial(prepare, config),
        loss=partial(preference.loss, config.loss),
    )


def prepare(config: DpoConfig, groups: Sequence[Group], state: RunState) -> tuple[TrainBatch, RunState]:
    """Pairs of each prompt's completions. Pure; the order of groups is irrelevant.

    A prompt with fewer than two completions that have a rank (or reward) is dropped and counted.
    """
    compare = best_against_worst if config.compare == "best_worst" else every_pair
    pairs, parts = [], [preference.measure(groups)]
    for candidates in preference.scored(groups, RANK if config.preferred_by == "rank" else REWARD):
        if len(candidates.samples) < 2:
            parts.append({"groups/dropped": metrics.total(1)})
            continue
        scores = -candidates.scores if config.preferred_by == "rank" else candidates.scores
        made, counts = preference.pairs_of(candidates, compare(scores, candidates.text))
        pairs += made
        parts.append(counts)
    reference = REF_LOGPROBS if config.loss.has_reference else None
    return preference.train_batch(pairs, reference, metrics.merge(parts)), state
