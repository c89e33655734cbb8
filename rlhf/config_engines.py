"""Settings of the engines: how the policy is sampled, and how it is updated. Part of the run file (rlhf/config.py)."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf.config_section import (
    LEAST_TEMPERATURE,
    MOST_TEMPERATURE,
    BelowOne,
    Dtype,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Threads,
)


class GenerationConfig(Section):
    """How the policy is sampled."""

    engine: Literal["vllm", "transformers"] = Field(default="vllm", description="rollout engine")
    max_new_tokens: PositiveInt = Field(le=10_000_000, description="longest completion, in tokens")
    temperature: float = Field(
        default=1.0,
        ge=LEAST_TEMPERATURE,
        le=MOST_TEMPERATURE,
        description="softmax temperature, applied in every log-prob pass too",
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="only 1.0: an engine would renormalise over the kept tokens, the learner does not"
    )
    top_k: NonNegativeInt = Field(default=0, description="only 0 (all tokens), as with top_p")
    dtype: Dtype | None = Field(
        default=None, description="precision of the engine's weights; null: that of the learner"
    )
    cache_gib: PositiveFloat = Field(default=1.0, description="memory for vLLM's KV cache, in GiB (CPU)")
    gpu_memory_fraction: Fraction = Field(default=0.5, description="share of a GPU's memory that vLLM may use")
    max_sequences: PositiveInt = Field(default=64, description="sequences that one engine samples at the same time")
    weights_mid_sequence: bool = Field(
        default=False,
        description="engines take new weights between two tokens of what they are sampling, keep the KV cache, and go "
        "on; needs loop.max_staleness above 0. false: an engine first finishes what it samples",
    )
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
    warmup_steps: NonNegativeInt = Field(
        default=0, description="optimizer steps in which the rate rises; it starts at lr / (warmup_steps + 1)"
    )
    weight_decay: NonNegativeFloat = Field(default=0.0, description="of AdamW")
    adam_betas: tuple[BelowOne, BelowOne] = Field(default=(0.9, 0.999), description="of AdamW")
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
    threads: Threads | None = Field(
        default=None, description="CPU threads of a trainer or critic rank; null: what the cluster file gives"
    )
