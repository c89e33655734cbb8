"""What a run needs, derived from its run file: the same for a team in one process and a team on Ray."""

from dataclasses import dataclass, replace

from rlhf.admission import Demand
from rlhf.algorithms import ActorCriticAlgorithm, Algorithm, ScoreAlgorithm
from rlhf.algorithms.table import build
from rlhf.config import RunConfig
from rlhf.experience import REF_LOGPROBS, VALUES, Sampling
from rlhf.passes import needs_old_logprobs

# Stands where rollouts say how they are drawn: rows of the data are not, and their log-probs are the plain model's.
NOT_SAMPLED = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=1)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """The algorithm, what is sampled, and who fills which column.

    judged, the columns a group must have before it is complete. reference_judge, whether a frozen model fills the
    reference log-probs; with LoRA the learner fills them instead, with the adapter off. learner_annotates, whether
    the learner has any column to fill: with one optimizer step on fresh samples the old log-probs are those of the
    step itself. samples, whether a policy is sampled; otherwise groups are rows of the data."""

    config: RunConfig
    algorithm: Algorithm | ActorCriticAlgorithm | ScoreAlgorithm
    demand: Demand
    judged: frozenset[str]
    reference_judge: bool
    learner_annotates: bool
    samples: bool

    @property
    def has_critic(self) -> bool:
        """Whether a second model is trained beside the policy, with ranks of its own."""
        return isinstance(self.algorithm, ActorCriticAlgorithm)

    @property
    def mid_sequence(self) -> bool:
        """Whether engines take weights between two tokens of a sequence."""
        return self.config.generation is not None and self.config.generation.weights_mid_sequence


def draw(config: RunConfig) -> Blueprint:
    algorithm = build(config.algorithm)
    loop = config.loop
    learner_fills = {VALUES, REF_LOGPROBS} if config.model.lora is not None else {VALUES}
    demand = Demand(
        groups_per_step=loop.groups_per_step,
        num_steps=loop.num_steps,
        max_staleness=loop.max_staleness,
        samples_per_prompt=config.algorithm.samples_per_prompt,
        sampling=training_sampling(config),
        wait_timeout_s=loop.wait_timeout_s,
    )
    judged = algorithm.needs - learner_fills
    learner_annotates = needs_old_logprobs(config) or bool(learner_fills & algorithm.needs)
    return Blueprint(
        config,
        algorithm,
        demand,
        frozenset(judged),
        REF_LOGPROBS in judged,
        learner_annotates,
        config.records == "prompts",
    )


def without_rollouts(blueprint: Blueprint) -> Blueprint:
    """The same training where all groups are there, judged, before it begins: nobody samples and nobody judges."""
    config = blueprint.config.model_copy(update={"reward": None})
    return replace(blueprint, config=config, reference_judge=False, samples=False)


def training_sampling(config: RunConfig) -> Sampling:
    """How answers to train on are drawn; for a run on data a stand-in that nobody reads."""
    generation = config.generation
    if generation is None:
        return NOT_SAMPLED
    return Sampling(generation.temperature, generation.top_p, generation.top_k, generation.max_new_tokens)


def evaluation_sampling(config: RunConfig) -> Sampling:
    """How held-out prompts are answered; for a run on data, whose held-out rows have their answers, a stand-in."""
    if config.generation is None:
        return NOT_SAMPLED
    return Sampling(config.evaluation.temperature, 1.0, 0, config.generation.max_new_tokens)
