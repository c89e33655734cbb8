"""What to train: the run file. Every key, its default and its meaning.

Pydantic models that refuse unknown keys; the algorithm is a union on its name. Imports neither torch nor ray, so that a
bad file is refused before anything heavy is loaded. `rlhf.config_file` reads YAML and `key=value` overrides.
Documented in docs/configuration.md, which a test holds together with the code.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, model_validator

from rlhf.config_engines import GenerationConfig as GenerationConfig
from rlhf.config_engines import LearnerConfig as LearnerConfig
from rlhf.config_model import LoraConfig as LoraConfig
from rlhf.config_model import ModelConfig as ModelConfig
from rlhf.config_online import Aggregation as Aggregation
from rlhf.config_online import GrpoConfig as GrpoConfig
from rlhf.config_online import KlConfig as KlConfig
from rlhf.config_online import OffPolicyConfig as OffPolicyConfig
from rlhf.config_online import OffPolicyCorrected as OffPolicyCorrected
from rlhf.config_online import OnlineConfig as OnlineConfig
from rlhf.config_online import PaidConfig as PaidConfig
from rlhf.config_online import PpoConfig as PpoConfig
from rlhf.config_online import RaftConfig as RaftConfig
from rlhf.config_online import ReinforceConfig as ReinforceConfig
from rlhf.config_online import ReinforcePlusPlusBaselineConfig as ReinforcePlusPlusBaselineConfig
from rlhf.config_online import ReinforcePlusPlusConfig as ReinforcePlusPlusConfig
from rlhf.config_online import RlooConfig as RlooConfig
from rlhf.config_preferences import DpoConfig as DpoConfig
from rlhf.config_preferences import OnlineDpoConfig as OnlineDpoConfig
from rlhf.config_preferences import PreferenceLossConfig as PreferenceLossConfig
from rlhf.config_preferences import RejectionConfig as RejectionConfig
from rlhf.config_preferences import RsoConfig as RsoConfig
from rlhf.config_reward import LlmConfig as LlmConfig
from rlhf.config_reward import RankerConfig as RankerConfig
from rlhf.config_reward import ReferenceConfig as ReferenceConfig
from rlhf.config_reward import RewardConfig as RewardConfig
from rlhf.config_reward import RewardPart as RewardPart
from rlhf.config_reward import RewardSource as RewardSource
from rlhf.config_section import LEAST_TEMPERATURE, MOST_TEMPERATURE
from rlhf.config_section import DataPath as DataPath
from rlhf.config_section import Dtype as Dtype
from rlhf.config_section import Fraction as Fraction
from rlhf.config_section import NonNegativeFloat as NonNegativeFloat
from rlhf.config_section import NonNegativeInt as NonNegativeInt
from rlhf.config_section import PositiveFloat as PositiveFloat
from rlhf.config_section import PositiveInt as PositiveInt
from rlhf.config_section import Seconds as Seconds
from rlhf.config_section import Section as Section

RecordKind = Literal["prompts", "preferences", "demonstrations", "comparisons"]
# What an algorithm is trained on, by its name; those that are not named here answer prompts with the policy.
TRAINED_ON: Mapping[str, RecordKind] = {
    "sft": "demonstrations",
    "dpo": "preferences",
    "reward_model": "preferences",
    "pairwise_ranker": "comparisons",
}


class SftConfig(Section):
    """Supervised fine-tuning: the negative log-likelihood of demonstrations. It has no settings of its own."""

    name: Literal["sft"] = Field(description="which algorithm")

    @property
    def samples_per_prompt(self) -> int:
        """A demonstration is a group of one."""
        return 1


class RewardModelConfig(Section):
    """A reward model: Bradley-Terry on ranked answers (arXiv 2203.02155, section 3.5)."""

    name: Literal["reward_model"] = Field(description="which algorithm")
    centring: NonNegativeFloat = Field(
        default=0.0, description="weight of (r_w + r_l)^2, which holds scores around 0; 0: they drift freely"
    )
    margin_column: str | None = Field(
        default=None, description="column of the data: by how much the preferred answer must score higher"
    )

    @property
    def samples_per_prompt(self) -> int:
        """All answers to a prompt are one unit of the batch."""
        return 1


class PairwiseRankerConfig(Section):
    """A pairwise ranker: which of two answers is better (arXiv 2305.10425). It has no settings of its own."""

    name: Literal["pairwise_ranker"] = Field(description="which algorithm")

    @property
    def samples_per_prompt(self) -> int:
        """The two orders of a comparison are one unit of the batch."""
        return 1


AlgorithmConfig = Annotated[
    RlooConfig
    | ReinforceConfig
    | GrpoConfig
    | ReinforcePlusPlusConfig
    | ReinforcePlusPlusBaselineConfig
    | PpoConfig
    | RaftConfig
    | SftConfig
    | RewardModelConfig
    | PairwiseRankerConfig
    | DpoConfig
    | OnlineDpoConfig
    | RsoConfig,
    Discriminator("name"),
]


class DataConfig(Section):
    """The prompts, preferences or demonstrations."""

    path: DataPath = Field(
        description="JSONL, Parquet or Arrow file, a folder of them, a saved data set, or a hub name"
    )
    split: str = Field(default="train", description="split of a hub or saved data set")
    format: Literal[
        "auto", "prompt", "preference", "implicit_preference", "ranked", "prompt_completion", "messages", "text"
    ] = Field(
        default="auto",
        description="what the rows are; `auto`: told from the first row's columns and what the algorithm needs",
    )
    prompt_column: str = Field(
        default="prompt", description="column that holds the prompt: a string or a list of messages"
    )
    completion_column: str = Field(
        default="completion", description="column that holds a demonstration's answer; `chosen` trains on that of pairs"
    )
    max_prompt_tokens: PositiveInt = Field(
        default=512, description="limit on the prompt's length after the chat template"
    )
    max_completion_tokens: PositiveInt = Field(
        default=512, description="preferences and demonstrations: limit on an answer's length, its EOS included"
    )
    too_long: Literal["drop", "refuse", "truncate"] = Field(
        default="drop",
        description="a row over a limit is dropped and counted, refused, or its prompt is cut on the left; an answer "
        "is never cut, `truncate` drops it",
    )
    bad_rows: Literal["refuse", "drop"] = Field(
        default="refuse",
        description="preferences and demonstrations: a row with an empty answer, equal answers or ranks, or two "
        "prompts is refused, or dropped and counted",
    )
    chat_template: bool = Field(
        default=True, description="put plain prompts through the tokenizer's chat template where it has one"
    )
    system_prompt: str | None = Field(default=None, description="system message put before each prompt")
    shuffle: bool = Field(
        default=True, description="a seeded order, another one each epoch; otherwise the order of the file"
    )
    limit: PositiveInt | None = Field(default=None, description="use only the first rows")
    heldout: NonNegativeInt = Field(
        default=0, description="prompts set aside for evaluation with all their rows, chosen by a hash of the prompt"
    )


class MixConfig(Section):
    """Rows of data beside the policy's samples in every step; they never age.

    Preferences for online_dpo and rso, demonstrations for the other algorithms that sample."""

    data: DataConfig = Field(description="the preferences or demonstrations; their heldout must be 0")
    rows_per_step: PositiveInt = Field(description="rows a step, out of loop.groups_per_step; the rest is sampled")
    coef: PositiveFloat = Field(
        default=1.0, description="weight of the rows' mean loss, which is added to that of the samples (PPO-ptx: gamma)"
    )


MOST_SAMPLES_A_STEP = 1_000_000  # the plan counts them one by one, and a step is one transaction


class LoopConfig(Section):
    """How long, in what portions, and when to look."""

    num_steps: PositiveInt = Field(description="policy updates in the run")
    groups_per_step: PositiveInt = Field(
        description="prompts a step; each has algorithm.samples_per_prompt completions"
    )
    max_staleness: NonNegativeInt = Field(
        default=0, description="how many versions old a sample may be when it is trained"
    )
    checkpoint_every: NonNegativeInt = Field(default=10, description="steps between checkpoints; 0: only at the end")
    keep_checkpoints: PositiveInt = Field(default=2, description="how many of the newest checkpoints are kept")
    keep_best: str | None = Field(
        default=None,
        description="the best checkpoint by this held-out measure is kept, too: `reward`; for data one of the loss, "
        "such as `loss/nll` (smaller is better) or `rewards/accuracies`; null: off",
    )
    eval_every: NonNegativeInt = Field(
        default=0, description="steps between evaluations; 0: before the first step and after the last"
    )
    max_restarts: NonNegativeInt = Field(
        default=3,
        description="how often in a row, without a new step, the team, or the trainer or buffer alone, is built again "
        "after an actor died; and how often in a row, without a result, a rollout engine or judge is replaced",
    )
    wait_timeout_s: Seconds = Field(default=600.0, description="longest wait for rollouts, judges, updates or weights")
    heartbeat_timeout_s: Seconds = Field(
        default=120.0,
        description="an actor that shows no sign of life for so long, whatever it is at, is ended and replaced; so is "
        "a rollout engine or judge that holds work and does not advance (a reward function may use its "
        "reward.timeout_s on top)",
    )


class EvaluationConfig(Section):
    """Held-out prompts, answered before, during and after training."""

    samples: NonNegativeInt = Field(default=3, description="prompts whose answers before and after stand in the report")
    temperature: Annotated[float, Field(ge=0, le=MOST_TEMPERATURE)] = Field(
        default=0.0, description="0: greedy; otherwise 0.01 or more"
    )

    @model_validator(mode="after")
    def _greedy_or_not(self) -> Self:
        if 0 < self.temperature < LEAST_TEMPERATURE:
            least = f"{LEAST_TEMPERATURE:g} or more"
            raise ValueError(f"temperature={self.temperature:g}: engines sample at {least}; expected that, or 0")
        return self


class RunConfig(Section):
    """A whole run file."""

    seed: NonNegativeInt = Field(default=0, description="every random number of the run is derived from it")
    model: ModelConfig = Field(description="the policy")
    algorithm: AlgorithmConfig = Field(description="how credit is assigned and what the loss is; a union on its name")
    data: DataConfig = Field(description="the prompts, preferences or demonstrations")
    mix: MixConfig | None = Field(default=None, description="rows of data beside the policy's samples in every step")
    loop: LoopConfig = Field(description="how long, in what portions, and when to look")
    generation: GenerationConfig | None = Field(
        default=None, description="how the policy is sampled; only for algorithms that do so, which need it"
    )
    learner: LearnerConfig = Field(default_factory=LearnerConfig, description="how the policy is updated")
    reward: RewardConfig | None = Field(
        default=None, description="what is good; only for algorithms that sample, which need it"
    )
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="held-out prompts, answered during the run"
    )

    @property
    def records(self) -> RecordKind:
        """What the algorithm is trained on; with "prompts" the policy is sampled."""
        return TRAINED_ON.get(self.algorithm.name, "prompts")

    @property
    def trains_scores(self) -> bool:
        """Whether what is trained has a scalar head in place of the language model's: a reward model or a ranker."""
        return isinstance(self.algorithm, RewardModelConfig | PairwiseRankerConfig)

    @property
    def mixed_records(self) -> RecordKind | None:
        """What the rows are that are trained on beside the policy's samples."""
        if self.mix is None:
            return None
        return "preferences" if isinstance(self.algorithm, OnlineDpoConfig | RsoConfig) else "demonstrations"

    @property
    def judged_by_reward(self) -> bool:
        """Whether a reward is part of what the algorithm learns from."""
        algorithm = self.algorithm
        return self.records == "prompts" or (isinstance(algorithm, DpoConfig) and algorithm.preferred_by == "reward")

    @model_validator(mode="after")
    def _has_what_its_source_needs(self) -> Self:
        """A run that samples says how and what is good; one on preferences or demonstrations does not sample."""
        name = self.algorithm.name
        needed = {
            "generation": (self.generation, self.records == "prompts", "samples answers from the policy"),
            "reward": (self.reward, self.judged_by_reward, "learns from rewards"),
        }
        for key, (section, is_needed, why) in needed.items():
            if is_needed and section is None:
                raise ValueError(f"missing required key {key}: algorithm.name={name} {why}")
            if section is not None and not is_needed:
                raise ValueError(
                    f"{key}: algorithm.name={name} learns from the {self.records} of data.path and has no use for it; "
                    "expected no such section"
                )
        if self.records == "prompts" and self.data.format not in ("auto", "prompt"):
            raise ValueError(
                f"data.format={self.data.format}: algorithm.name={name} answers prompts; expected auto or prompt"
            )
        return self

    @model_validator(mode="after")
    def _can_tell_the_best(self) -> Self:
        loop = self.loop
        if loop.keep_best is None:
            return self
        if self.records == "prompts" and loop.keep_best != "reward":
            raise ValueError(f"loop.keep_best={loop.keep_best}: held-out answers are measured by `reward`")
        needed = {
            "data.heldout": self.data.heldout,
            "loop.eval_every": loop.eval_every,
            "loop.checkpoint_every": loop.checkpoint_every,
        }
        idle = [key for key, value in needed.items() if not value]
        if idle:
            raise ValueError(f"loop.keep_best={loop.keep_best} would do nothing: {' and '.join(idle)} must be above 0")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (
            self.learner.engine == "torch"
            and self.learner.zero_stage != 2
            and "zero_stage" in self.learner.model_fields_set
        ):
            raise ValueError("learner.zero_stage is DeepSpeed's: with learner.engine=torch nothing is sharded")
        if self.model.lora is not None and self.model.lora.base == "nf4" and self.learner.engine != "torch":
            raise ValueError("model.lora.base=nf4: DeepSpeed cannot hold a base in 4 bits; use learner.engine=torch")
        if self.trains_scores:
            self._fits_a_reward_model()
        if self.reward is not None and self.records == "prompts":
            self._fits_comparisons(self.reward)
        if self.generation is not None and self.generation.weights_mid_sequence and not self.loop.max_staleness:
            raise ValueError(
                "generation.weights_mid_sequence would do nothing: with loop.max_staleness=0 no sequence is under way "
                "when weights come; expected loop.max_staleness above 0"
            )
        if self.loop.groups_per_step * self.algorithm.samples_per_prompt > MOST_SAMPLES_A_STEP:
            raise ValueError(
                f"loop.groups_per_step={self.loop.groups_per_step} of {self.algorithm.samples_per_prompt} samples each "
                f"is more than a step can hold; expected at most {MOST_SAMPLES_A_STEP} samples"
            )
        self._fits_an_adaptive_price()
        if self.learner.minibatches > self.loop.groups_per_step * self.algorithm.samples_per_prompt:
            raise ValueError(
                f"learner.minibatches={self.learner.minibatches} is more than the samples of a step "
                f"({self.loop.groups_per_step} groups x {self.algorithm.samples_per_prompt})"
            )
        return self

    def _fits_an_adaptive_price(self) -> None:
        if not isinstance(self.algorithm, OnlineConfig) or self.algorithm.kl.target is None:
            return
        samples, horizon = self.loop.groups_per_step * self.algorithm.samples_per_prompt, self.algorithm.kl.horizon
        if samples >= 5 * horizon:
            raise ValueError(
                f"algorithm.kl.horizon={horizon:g}: a step of {samples} samples could move kl.coef to 0 or below; "
                f"expected more than {samples / 5:g}"
            )

    def _fits_comparisons(self, reward: RewardConfig) -> None:
        comparing = [key for key, source in reward.sources().items() if source.compares]
        if comparing and self.algorithm.samples_per_prompt < 2:
            raise ValueError(f"{comparing[0]} compares a group's answers: algorithm.samples_per_prompt is 1; use 2")
        if comparing and self.data.heldout:
            raise ValueError(
                f"{comparing[0]} compares the answers of a group, and a held-out prompt has one answer; use "
                "data.heldout=0, or (llm) against_column"
            )

    @model_validator(mode="after")
    def _fits_the_mix(self) -> Self:
        if self.mix is None:
            return self
        if self.records != "prompts":
            raise ValueError(f"mix: algorithm.name={self.algorithm.name} does not sample, so there is nothing beside")
        if self.mix.rows_per_step >= self.loop.groups_per_step:
            raise ValueError(
                f"mix.rows_per_step={self.mix.rows_per_step} leaves no prompt to sample: expected less than "
                f"loop.groups_per_step={self.loop.groups_per_step}"
            )
        if self.mix.data.heldout:
            raise ValueError("mix.data.heldout: what is held out are prompts of data; expected 0")
        if isinstance(self.algorithm, RsoConfig) and self.algorithm.reference == "sampler":
            raise ValueError("mix: no policy sampled the rows, so algorithm.reference=sampler has none; use frozen")
        return self

    def _fits_a_reward_model(self) -> None:
        if self.model.lora is not None and self.model.lora.base == "nf4":
            raise ValueError("model.lora.base=nf4: reward models and rankers are not loaded in 4 bits; use plain")
        if self.learner.packing:
            raise ValueError("learner.packing: a reward model's rows are padded; use false")
        if self.records == "comparisons" and self.data.system_prompt is not None:
            raise ValueError("data.system_prompt would do nothing: a pairwise ranker reads prompt and answers alone")
