"""Builds the engine that a run file names, with its policy. DeepSpeed is imported only when it is asked for."""

import torch

from rlhf.config import RunConfig
from rlhf.errors import BadInput
from rlhf.learner.engine import Engine
from rlhf.learner.torch_engine import TorchEngine
from rlhf.models.load import add_lora, load_model
from rlhf.models.policy import PolicyModel


def build_policy(config: RunConfig) -> PolicyModel:
    """The trainable policy on the CPU: the whole model, or its frozen base with adapters."""
    model = load_model(config.model, config.learner.dtype)
    if config.model.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise BadInput(f"model.gradient_checkpointing: {type(model).__name__} cannot do it; use false")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = config.model.lora
    policy = PolicyModel(model if lora is None else add_lora(model, lora, config.seed), config.learner.logit_chunk)
    if config.learner.packing:
        policy.check_packing()
    return policy


def build_engine(config: RunConfig, rank: int, world_size: int, meeting_point: str | None) -> Engine:
    """The engine of this rank. meeting_point is host:port of rank 0, None with one rank."""
    policy = build_policy(config)
    if config.learner.engine == "torch":
        if world_size != 1:
            raise BadInput(
                f"learner.engine=torch runs in one process, the cluster file has trainer.replicas={world_size}; "
                f"use learner.engine=deepspeed or one replica"
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return TorchEngine(policy, config.learner, device)
    from rlhf.learner.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(policy, config.learner, rank, world_size, meeting_point)
