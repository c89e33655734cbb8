"""Builds the engine that a run file names, with its policy. DeepSpeed is imported only when it is asked for."""

import torch
from transformers import PreTrainedModel

from rlhf.config import Dtype, LearnerConfig, LoraConfig, PpoConfig, RunConfig
from rlhf.errors import BadInput
from rlhf.learner.engine import Engine, TrainedModel
from rlhf.learner.torch_engine import TorchEngine
from rlhf.models.load import add_lora, add_lora_beside_head, load_model, load_tokenizer
from rlhf.models.policy import PolicyModel
from rlhf.models.score import ReadAt, ScoreModel, load_score_model, start_score_model


def build_policy(config: RunConfig) -> PolicyModel:
    """The trainable policy on the CPU: the whole model, or its frozen base with adapters."""
    model = load_model(config.model, config.learner.dtype)
    _save_memory(model, config)
    lora = config.model.lora
    policy = PolicyModel(model if lora is None else add_lora(model, lora, config.seed), config.learner.logit_chunk)
    if config.learner.packing:
        policy.check_packing()
    return policy


def build_scorer(config: RunConfig) -> ScoreModel:
    """The reward model to train, on the CPU: a new head on a language model's trunk, or a reward model as it is; whole,
    or its frozen trunk with adapters, and its head."""
    model = start_score_model(config.model, config.learner.dtype, config.seed)
    _save_memory(model, config)
    return _scorer(model, config.model.lora, config.seed, "token")


def _scorer(model: PreTrainedModel, lora: LoraConfig | None, run_seed: int, read_at: ReadAt) -> ScoreModel:
    whole = ScoreModel(model, read_at)  # refuses what is no trunk with one head
    if lora is None:
        return whole
    return ScoreModel(add_lora_beside_head(model, whole.head_name, lora, run_seed), read_at)


def _save_memory(model: PreTrainedModel, config: RunConfig) -> None:
    if config.model.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise BadInput(f"model.gradient_checkpointing: {type(model).__name__} cannot do it; use false")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def build_engine(config: RunConfig, rank: int, world_size: int, meeting_point: str | None) -> Engine:
    """The engine of this rank, which joins the ranks' process group where there is one. meeting_point is host:port of
    rank 0, None with one rank."""
    policy: TrainedModel = build_scorer(config) if config.trains_scores else build_policy(config)
    return _engine(policy, config.learner, "trainer", rank, world_size, meeting_point)


def build_critic_engine(
    config: RunConfig, settings: LearnerConfig, rank: int, world_size: int, meeting_point: str | None
) -> Engine:
    """The same for a critic, which is trained whole, with these settings in place of the learner section."""
    if not isinstance(config.algorithm, PpoConfig):
        raise TypeError(f"algorithm.name={config.algorithm.name} has no critic")
    init = config.algorithm.critic.init
    if init == "policy":
        model = start_score_model(config.model, settings.dtype, config.seed)
    else:
        model = _reward_model_as_critic(config, init, settings.dtype)
    _save_memory(model, config)
    return _engine(ScoreModel(model, "predictor"), settings, "critic", rank, world_size, meeting_point)


def _engine(
    model: TrainedModel, settings: LearnerConfig, role: str, rank: int, world_size: int, meeting_point: str | None
) -> Engine:
    """role, as the cluster file calls it."""
    if settings.engine == "torch":
        if world_size != 1:
            raise BadInput(
                f"learner.engine=torch runs in one process, the cluster file has {role}.replicas={world_size}; "
                f"use learner.engine=deepspeed or one replica"
            )
        return TorchEngine(model, settings, _device())
    from rlhf.learner.deepspeed_engine import DeepSpeedEngine, join

    leaves_group = join(rank, world_size, meeting_point)
    return DeepSpeedEngine(model, settings, world_size, leaves_group=leaves_group)


def _reward_model_as_critic(config: RunConfig, init: str, dtype: Dtype) -> PreTrainedModel:
    """A trained reward model, head included. A critic reads the policy's token ids, so both must have one vocabulary.

    Raises BadInput, with the key, where they have not or where the model has no trained head."""
    own = config.model
    try:
        vocabularies = [
            load_tokenizer(name, trust_remote_code=own.trust_remote_code).get_vocab() for name in (init, own.name)
        ]
        if vocabularies[0] != vocabularies[1]:
            raise BadInput(
                f"the tokenizer of {init} has {len(vocabularies[0])} tokens, that of {own.name} "
                f"{len(vocabularies[1])}, and they are not the same: a critic reads the policy's token ids. "
                "Use init=policy, or a reward model that was trained from this policy's model"
            )
        return load_score_model(own.model_copy(update={"name": init, "lora": None}), dtype)
    except BadInput as error:
        raise BadInput(f"algorithm.critic.init: {str(error).removeprefix('model.name: ')}") from error


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
