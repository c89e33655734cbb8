"""What to train: the run file. Every key, its default and its meaning.

Pydantic models that refuse unknown keys; the algorithm is a union on its name. Imports neither torch nor ray, so that a
bad file is refused before anything heavy is loaded. `rlhf.config_file` reads YAML and `key=value` overrides.
Documented in docs/configuration.md, which a test holds together with the code.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, model_validator

from rlhf.config_online import Aggregation as Aggregation
from rlhf.config_online import GrpoConfig as GrpoConfig
from rlhf.config_online import KlConfig as KlConfig
from rlhf.config_online import OnlineConfig as OnlineConfig
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
from rlhf.config_section import Dtype as Dtype
from rlhf.config_section import Fraction as Fraction
from rlhf.config_section import NonNegativeFloat as NonNegativeFloat
from rlhf.config_section import NonNegativeInt as NonNegativeInt
from rlhf.config_section import PositiveFloat as PositiveFloat
from rlhf.config_section import PositiveInt as PositiveInt
from rlhf.config_section import Section as Section

RecordKind = Literal["prompts", "preferences", "demonstrations"]
# What an algorithm is trained on, by its name; those that are not named here answer prompts with the policy.
TRAINED_ON: Mapping[str, RecordKind] = {
    "sft": "demonstrations",
    "dpo": "preferences",
    "reward_model": "preferences",
}


class LoraConfig(Section):
    """Low-rank adapters (peft). The base stays frozen, and with the adapter off it is the reference."""

    rank: PositiveInt = Field(default=16, description="rank of the adapters")
    alpha: PositiveFloat = Field(default=32, description="scale: the adapter's output is multiplied by alpha / rank")
    target_modules: list[str] | Literal["all-linear"] = Field(
        default="all-linear", description="which layers get an adapter"
    )


class ModelConfig(Section):
    """The policy; the reference and the rollout engines start as copies of it."""

    name: str = Field(description="`tiny`, `tiny-untied`, `smollm2`, a hub name, or a local folder")
    lora: LoraConfig | None = Field(default=None, description="train low-rank adapters instead of the whole model")
    attention: Literal["eager", "sdpa", "flash_attention_2"] = Field(
        default="sdpa", description="attention implementation, the same in every log-prob pass"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass to save memory"
    )
    trust_remote_code: bool = Field(default=False, description="run model code that comes with a hub model")


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
    | DpoConfig
    | OnlineDpoConfig
    | RsoConfig,
    Discriminator("name"),
]


class DataConfig(Section):
    """The prompts, preferences or demonstrations."""

    path: str = Field(description="JSONL, Parquet or Arrow file, a folder of them, a saved data set, or a hub name")
    split: str = Field(default="train", description="split of a hub or saved data set")
    format: Literal["auto", "prompt", "preference", "implicit_preference", "prompt_completion", "messages", "text"] = (
        Field(
            default="auto",
            description="what the rows are; `auto`: told from the first row's columns and what the algorithm needs",
        )
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
        description="preferences and demonstrations: a row with an empty answer, equal answers or two prompts is "
        "refused, or dropped and counted",
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
    eval_every: NonNegativeInt = Field(
        default=0, description="steps between evaluations; 0: before the first step and after the last"
    )
    max_restarts: NonNegativeInt = Field(
        default=3, description="how often in a row, without a new step, the team is built again after an actor died"
    )
    wait_timeout_s: PositiveFloat = Field(
        default=600.0, description="longest wait for rollouts, judges, updates or weights"
    )


class GenerationConfig(Section):
    """How the policy is sampled."""

    engine: Literal["vllm", "transformers"] = Field(default="vllm", description="rollout engine")
    max_new_tokens: PositiveInt = Field(description="longest completion")
    temperature: PositiveFloat = Field(
        default=1.0, description="softmax temperature, applied in every log-prob pass too"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, description="must be 1 in training: see the error")
    top_k: NonNegativeInt = Field(default=0, description="must be 0 (all tokens) in training: see the error")
    dtype: Dtype | None = Field(
        default=None, description="precision of the engine's weights; null: that of the learner"
    )
    cache_gib: PositiveFloat = Field(default=1.0, description="memory for vLLM's KV cache, in GiB (CPU)")
    gpu_memory_fraction: Fraction = Field(default=0.5, description="share of a GPU's memory that vLLM may use")
    max_sequences: PositiveInt = Field(default=64, description="sequences that one engine samples at the same time")
    probe_tolerance: PositiveFloat | None = Field(
        default=None,
        description="largest log-prob difference at the weight probe; null: 1e-3 in float32, 1.0 in bfloat16",
    )
    mismatch_alarm: PositiveFloat | None = Field(
        default=None,
        description="mean |log-prob difference| to the learner that is reported; null: 1e-4 float32, 0.1 bfloat16",
    )
    mismatch_stop: PositiveFloat | None = Field(
        default=None, description="mean |log-prob difference| to the learner that stops the run; null: never"
    )

    @model_validator(mode="after")
    def _no_truncated_sampling(self) -> Self:
        if self.top_p < 1:
            raise ValueError(
                "top_p below 1 biases every importance ratio: the engine renormalises over the kept tokens, the "
                "learner does not. Use 1.0 in training and shape the samples with temperature"
            )
        if self.top_k > 0:
            raise ValueError(
                "top_k above 0 biases every importance ratio: the engine renormalises over the kept tokens, the "
                "learner does not. Use 0 (all tokens) in training and shape the samples with temperature"
            )
        return self


class LearnerConfig(Section):
    """How the policy is updated."""

    engine: Literal["torch", "deepspeed"] = Field(
        default="deepspeed", description="plain torch (one process) or DeepSpeed"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(default=2, description="what DeepSpeed shards over ranks")
    dtype: Dtype = Field(
        default="float32", description="precision of the passes; bfloat16 keeps float32 master weights"
    )
    lr: PositiveFloat = Field(default=1e-6, description="peak learning rate of AdamW")
    schedule: Literal["constant", "linear", "cosine"] = Field(default="constant", description="after the warm-up")
    warmup_steps: NonNegativeInt = Field(default=0, description="optimizer steps in which the rate rises from 0")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="of AdamW")
    adam_betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), description="of AdamW")
    adam_eps: PositiveFloat = Field(default=1e-8, description="of AdamW")
    max_grad_norm: PositiveFloat = Field(default=1.0, description="gradients are scaled down to this norm")
    epochs: PositiveInt = Field(default=1, description="passes over a step's batch")
    minibatches: PositiveInt = Field(default=1, description="optimizer steps in one pass")
    tokens_per_microbatch: PositiveInt = Field(
        default=4096, description="padded tokens in one forward pass; more are accumulated. A single row may be longer"
    )
    packing: bool = Field(default=False, description="rows of a micro-batch one behind the other instead of padded")
    logit_chunk: PositiveInt = Field(
        default=512, description="completion positions whose logits exist at the same time"
    )
    threads: PositiveInt | None = Field(
        default=None, description="CPU threads of a trainer rank; null: what the cluster file gives"
    )


class RewardConfig(Section):
    """What is good: a Python function or a reward model, one of the two."""

    function: str | None = Field(
        default=None,
        description="`package.module:name` or `path/to/file.py:name`: "
        "f(prompts, completions, **columns) -> list[float | None]",
    )
    model: str | None = Field(
        default=None, description="a reward model (sequence classifier with one label): a local folder or a hub name"
    )
    timeout_s: PositiveFloat = Field(
        default=60.0, description="with `function`: time limit of one call, which scores one group"
    )
    isolate: bool = Field(
        default=True,
        description="with `function`: run it in a worker process; false: in this one, for a debugger, without limit",
    )
    dtype: Dtype = Field(default="float32", description="with `model`: precision of the reward model")
    read_at: Literal["eos", "end"] = Field(
        default="eos",
        description="with `model`: the token that is scored: the EOS behind the answer (reward models trained here), "
        "or the last of what the model's chat template writes",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.function is None) == (self.model is None):
            found = "neither is set" if self.function is None else "both are set"
            raise ValueError(f"exactly one of function and model says what is good; {found}")
        idle = {"dtype", "read_at"} if self.model is None else {"timeout_s", "isolate"}
        ignored = [key for key, value in self if key in idle and value != type(self).model_fields[key].default]
        if ignored:
            other, this = ("model", "function") if self.model is None else ("function", "model")
            raise ValueError(f"{' and '.join(ignored)} would do nothing: with {this} set there is no reward {other}")
        return self


class EvaluationConfig(Section):
    """Held-out prompts, answered before, during and after training."""

    samples: NonNegativeInt = Field(default=3, description="prompts whose answers before and after stand in the report")
    temperature: NonNegativeFloat = Field(default=0.0, description="0: greedy")


class RunConfig(Section):
    """A whole run file."""

    seed: NonNegativeInt = Field(default=0, description="every random number of the run is derived from it")
    model: ModelConfig = Field(description="the policy")
    algorithm: AlgorithmConfig = Field(description="how credit is assigned and what the loss is; a union on its name")
    data: DataConfig = Field(description="the prompts, preferences or demonstrations")
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
    def _fits_together(self) -> Self:
        if (
            self.learner.engine == "torch"
            and self.learner.zero_stage != 2
            and "zero_stage" in self.learner.model_fields_set
        ):
            raise ValueError("learner.zero_stage is DeepSpeed's: with learner.engine=torch nothing is sharded")
        if isinstance(self.algorithm, RewardModelConfig):
            self._fits_a_reward_model()
        if self.learner.minibatches > self.loop.groups_per_step * self.algorithm.samples_per_prompt:
            raise ValueError(
                f"learner.minibatches={self.learner.minibatches} is more than the samples of a step "
                f"({self.loop.groups_per_step} groups x {self.algorithm.samples_per_prompt})"
            )
        return self

    def _fits_a_reward_model(self) -> None:
        if self.model.lora is not None:
            raise ValueError("model.lora: a reward model is trained whole, a new head would be frozen; leave it out")
        if self.learner.packing:
            raise ValueError("learner.packing: a reward model's rows are padded; use false")
