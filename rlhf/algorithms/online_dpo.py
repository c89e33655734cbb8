"""Online DPO: the policy samples, a judge scores, the best completion is compared with the worst, arXiv 2402.04792.

    y_1..y_n ~ pi;     (y_w, y_l) = (argmax r, argmin r);     -log sigma(beta h), or another preference loss

The reference of h is the frozen model that the run started from. How a pair becomes rows and what it costs:
`preference` and `ops.preferences`.
"""

from collections.abc import Sequence
from functools import partial

from rlhf import metrics
from rlhf.algorithms import Algorithm, RunState, preference
from rlhf.config import OnlineDpoConfig
from rlhf.experience import REF_LOGPROBS, REWARD, Group, TrainBatch
from rlhf.ops.pairing import best_against_worst


def build(config: OnlineDpoConfig) -> Algorithm:
    """Online DPO with these settings; it carries nothing from step to step."""
    return Algorithm(
        needs=frozenset({REWARD, REF_LOGPROBS} if config.loss.has_reference else {REWARD}),
        initial_state={},
        prepare=partial(prepare, config),
        loss=partial(preference.loss, config.loss),
    )


def prepare(config: OnlineDpoConfig, groups: Sequence[Group], state: RunState) -> tuple[TrainBatch, RunState]:
    """At most one pair a prompt. Pure; the order of groups is irrelevant.

    A prompt whose rewards are all equal makes no pair, and its comparisons are counted as ties. One with fewer than two
    scorable samples is dropped and counted.
    """
    pairs, parts = [], [preference.measure(groups)]
    for candidates in preference.worth(preference.scored(groups, REWARD), config):
        if len(candidates.samples) < 2:
            parts.append({"groups/dropped": metrics.total(1)})
            continue
        made, counts = preference.pairs_of(candidates, best_against_worst(candidates.scores, candidates.text))
        pairs += made
        parts.append(counts)
    reference = REF_LOGPROBS if config.loss.has_reference else None
    return preference.train_batch(pairs, reference, metrics.merge(parts)), state
