"""Settings of the policy's model: a part of `rlhf.config`."""

from typing import Literal

from pydantic import Field

from rlhf.config_section import PositiveFloat, PositiveInt, Section


class LoraConfig(Section):
    """Low-rank adapters (peft). The base stays frozen, and with the adapter off it is the reference. The head of a
    reward model or ranker is trained whole beside them."""

    rank: PositiveInt = Field(default=16, description="rank of the adapters")
    alpha: PositiveFloat = Field(default=32, description="scale: the adapter's output is multiplied by alpha / rank")
    target_modules: list[str] | Literal["all-linear"] = Field(
        default="all-linear", description="which layers get an adapter"
    )
    base: Literal["plain", "nf4"] = Field(
        default="plain",
        description="the frozen base: `plain`, in the precision of the passes, or `nf4`, in 4 bits (QLoRA), which "
        "needs the package bitsandbytes and learner.engine=torch",
    )


class ModelConfig(Section):
    """The policy; the reference and the rollout engines start as copies of it."""

    name: str = Field(description="`tiny`, `tiny-untied`, `tiny_t5`, `smollm2`, a hub name, or a local folder")
    lora: LoraConfig | None = Field(
        default=None,
        description="train low-rank adapters instead of the whole model; of a reward model or ranker the head, too",
    )
    attention: Literal["eager", "sdpa", "flash_attention_2"] = Field(
        default="sdpa", description="attention implementation, the same in every log-prob pass"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass to save memory"
    )
    trust_remote_code: bool = Field(default=False, description="run model code that comes with a hub model")
