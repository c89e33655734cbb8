"""What a run needs, derived from its run file: the same for a team in one process and a team on Ray."""

from dataclasses import dataclass

from rlhf.algorithms import Algorithm, ScoreAlgorithm
from rlhf.algorithms.table import build
from rlhf.config import RunConfig
from rlhf.experience import REF_LOGPROBS, Sampling
from rlhf.sources import Demand


@dataclass(frozen=True, slots=True)
class Blueprint:
    """The algorithm, what is sampled, and who fills which column.

    judged, the columns a group must have before it is complete. reference_judge, whether a frozen model fills the
    reference log-probs; with LoRA the learner fills them instead, with the adapter off. learner_annotates, whether
    the learner has any column to fill: with one optimizer step on fresh samples the old log-probs are those of the
    step itself."""

    config: RunConfig
    algorithm: Algorithm | ScoreAlgorithm
    demand: Demand
    judged: frozenset[str]
    reference_judge: bool
    learner_annotates: bool


def draw(config: RunConfig) -> Blueprint:
    algorithm = build(config.algorithm)
    generation, loop = config.generation, config.loop
    learner_fills = {REF_LOGPROBS} if config.model.lora is not None else set()
    demand = Demand(
        groups_per_step=loop.groups_per_step,
        num_steps=loop.num_steps,
        max_staleness=loop.max_staleness,
        samples_per_prompt=config.algorithm.samples_per_prompt,
        sampling=Sampling(generation.temperature, generation.top_p, generation.top_k, generation.max_new_tokens),
        wait_timeout_s=loop.wait_timeout_s,
    )
    judged = algorithm.needs - learner_fills
    learner_annotates = needs_old_logprobs(config) or bool(learner_fills & algorithm.needs)
    return Blueprint(config, algorithm, demand, frozenset(judged), REF_LOGPROBS in judged, learner_annotates)


def needs_old_logprobs(config: RunConfig) -> bool:
    """Whether samples are trained under weights other than those that sampled them: stale, or in several optimizer
    steps."""
    return config.loop.max_staleness > 0 or config.learner.epochs * config.learner.minibatches > 1


def evaluation_sampling(config: RunConfig) -> Sampling:
    return Sampling(config.evaluation.temperature, 1.0, 0, config.generation.max_new_tokens)
