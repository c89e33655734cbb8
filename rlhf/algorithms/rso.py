"""RSO: statistical rejection sampling optimization, arXiv 2309.06657. A step is a round.

    y_1..y_C ~ pi;   keep N of them with probability exp((r - r_max) / beta);   pair them;   -log sigma(gamma h), ...

Which candidates are kept: `ops.rejection`; who is compared with whom: `ops.pairing`; what a pair costs: `preference`
and `ops.preferences`. beta here is the temperature of the target policy, the paper's gamma is `loss.beta`.

The reference of h is the frozen model that the run started from, or the model that sampled the candidates
(`reference: sampler`), which is another one in each round. In the first round the two are the same.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Generator

from rlhf import metrics
from rlhf.algorithms import Algorithm, RunState, preference
from rlhf.algorithms.preference import Candidates, Pair
from rlhf.config import RsoConfig
from rlhf.experience import BEHAVIOR_LOGPROBS, REF_LOGPROBS, REWARD, Group, TrainBatch
from rlhf.metrics import Metrics
from rlhf.ops.pairing import first_round, tournament
from rlhf.ops.rejection import acceptance, exact, paper
from rlhf.seeding import seed_for


def build(config: RsoConfig) -> Algorithm:
    """RSO with these settings; it carries nothing from step to step."""
    frozen = config.loss.has_reference and config.reference == "frozen"
    return Algorithm(
        needs=frozenset({REWARD, REF_LOGPROBS} if frozen else {REWARD}),
        initial_state={},
        prepare=partial(prepare, config),
        loss=partial(preference.loss, config.loss),
    )


def prepare(config: RsoConfig, groups: Sequence[Group], state: RunState) -> tuple[TrainBatch, RunState]:
    """Rejection and pairing, prompt by prompt. The order of groups is irrelevant.

    Random numbers are addressed by the run's seed and the prompt's id, so the same groups give the same pairs. A prompt
    with fewer scorable candidates than are to be kept is dropped and counted.
    """
    everyone = preference.worth(preference.scored(groups, REWARD), config)
    beta = config.rejection.beta * reward_unit(config, everyone)
    pairs: list[Pair] = []
    parts: list[Metrics] = [preference.measure(groups), {"rejection/beta": metrics.last(beta)}]
    for candidates in everyone:
        if len(candidates.samples) < config.rejection.accept:
            parts.append({"groups/dropped": metrics.total(1)})
            continue
        made, measured = _pairs(config, candidates, beta)
        pairs += made
        parts.append(measured)
    reference = None
    if config.loss.has_reference:
        reference = REF_LOGPROBS if config.reference == "frozen" else BEHAVIOR_LOGPROBS
    return preference.train_batch(pairs, reference, metrics.merge(parts)), state


def reward_unit(config: RsoConfig, everyone: Sequence[Candidates]) -> float:
    """What `rejection.beta` counts, in the reward's own units: 1, or the standard deviation of the step's rewards.

    The biased form over all scorable candidates of the step. 0 when they are equal: beta is 0 then, and there is no
    pair.
    """
    if config.rejection.reward_units == "raw" or not everyone:
        return 1.0
    rewards = torch.cat([candidates.scores for candidates in everyone])
    # Equal rewards may deviate from their mean by a rounding error.
    if len(rewards) == 0 or bool((rewards == rewards[0]).all()):
        return 0.0
    return float(rewards.std(correction=0))


def _pairs(config: RsoConfig, candidates: Candidates, beta: float) -> tuple[list[Pair], Metrics]:
    """The pairs of one prompt, and how its rejection went; beta is in the reward's own units."""
    generator, wanted = _generator(candidates), config.rejection.accept
    accept = paper if config.rejection.mode == "paper" else exact
    indices, tries = accept(candidates.scores, wanted, beta, generator)
    kept = Candidates(
        candidates.prompt, tuple(candidates.samples[i] for i in indices.tolist()), candidates.scores[indices]
    )
    compare = first_round if config.pairing == "first_round" else tournament
    made, measured = preference.pairs_of(kept, compare(kept.scores, kept.text, generator))
    measured["rejection/acceptance_rate"] = metrics.mean(wanted, tries)
    measured["rejection/accepted_reward_mean"] = metrics.mean_of(kept.scores.tolist())
    if beta > 0:
        expected = acceptance(candidates.scores, beta)
        measured["rejection/acceptance_expected"] = metrics.mean_of([float(expected.mean())])
    return made, measured


def _generator(candidates: Candidates) -> Generator:
    """This prompt's own random numbers: a sample's seed is an address in the run, and so is what is derived from it."""
    first, where = candidates.samples[0], f"prompt {candidates.prompt.id}"
    if first.seed is None:
        raise ValueError(f"{where}: not sampled by a policy of this run; RSO rejects among the policy's own samples")
    return torch.Generator().manual_seed(seed_for(first.seed, "rejection", candidates.prompt.id))
