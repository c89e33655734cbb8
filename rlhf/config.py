"""What to train: the run file. Every key, its default and its meaning.

Pydantic models that refuse unknown keys; the algorithm is a union on its name. Imports neither torch nor ray, so that a
bad file is refused before anything heavy is loaded. `rlhf.config_file` reads YAML and `key=value` overrides.
Documented in docs/configuration.md, which a test holds together with the code.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """A part of the run file: unknown keys are errors, values never change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


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


class KlConfig(Section):
    """The price of leaving the reference model."""

    coef: NonNegativeFloat = Field(default=0.05, description="beta, the price of one nat; 0 needs no reference model")
    place: Literal["reward", "loss"] = Field(
        default="reward",
        description="`reward`: minus beta times the sequence's k1, before the baseline; `loss`: an added loss",
    )
    loss_estimator: Literal["k2", "k3"] = Field(
        default="k2",
        description="with place `loss`: k2 has the gradient of the reverse KL, k3 (GRPO's) that of the forward KL",
    )


class RlooConfig(Section):
    """REINFORCE with a leave-one-out baseline (arXiv 2402.14740)."""

    name: Literal["rloo"] = Field(description="which algorithm")
    samples_per_prompt: PositiveInt = Field(default=4, description="completions sampled for each prompt; at least 2")
    kl: KlConfig = Field(default_factory=KlConfig, description="the price of leaving the reference")
    ratio_cap: PositiveFloat = Field(
        default=2.0, description="cap of the importance weight of stale samples; fresh ones have weight 1"
    )

    @model_validator(mode="after")
    def _needs_others(self) -> Self:
        if self.samples_per_prompt < 2:
            raise ValueError(
                "samples_per_prompt must be at least 2: RLOO's baseline is the mean of a prompt's other samples"
            )
        return self


class ReinforceConfig(Section):
    """REINFORCE, the whole completion as one action (arXiv 2402.14740, section 2)."""

    name: Literal["reinforce"] = Field(description="which algorithm")
    samples_per_prompt: PositiveInt = Field(default=1, description="completions sampled for each prompt")
    baseline: Literal["none", "moving_average"] = Field(
        default="moving_average",
        description="what is subtracted from the reward: nothing, or the mean of all earlier batches",
    )
    kl: KlConfig = Field(default_factory=KlConfig, description="the price of leaving the reference")
    ratio_cap: PositiveFloat = Field(
        default=2.0, description="cap of the importance weight of stale samples; fresh ones have weight 1"
    )


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


AlgorithmConfig = Annotated[RlooConfig | ReinforceConfig | RewardModelConfig, Discriminator("name")]


class DataConfig(Section):
    """The prompts."""

    path: str = Field(description="JSONL, Parquet or Arrow file, a folder of them, a saved data set, or a hub name")
    split: str = Field(default="train", description="split of a hub or saved data set")
    prompt_column: str = Field(
        default="prompt", description="column that holds the prompt: a string or a list of messages"
    )
    max_prompt_tokens: PositiveInt = Field(
        default=512, description="limit on the prompt's length after the chat template"
    )
    too_long: Literal["drop", "refuse", "truncate"] = Field(
        default="drop",
        description="a prompt over the limit is dropped and counted, refused with its row, or cut on the left",
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
        default=0, description="rows set aside for evaluation, chosen by a hash of the prompt"
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

    def mismatch_alarm_level(self, learner_dtype: Dtype) -> float:
        """`mismatch_alarm` with its null filled in by the engine's precision, in nats a token."""
        if self.mismatch_alarm is not None:
            return self.mismatch_alarm
        return 1e-3 if (self.dtype or learner_dtype) == "float32" else 0.1


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
    data: DataConfig = Field(description="the prompts")
    loop: LoopConfig = Field(description="how long, in what portions, and when to look")
    generation: GenerationConfig = Field(description="how the policy is sampled")
    learner: LearnerConfig = Field(default_factory=LearnerConfig, description="how the policy is updated")
    reward: RewardConfig = Field(description="what is good")
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="held-out prompts, answered during the run"
    )

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
