"""Which algorithm a run file names: the one place that knows them all."""

from rlhf.algorithms import (
    ActorCriticAlgorithm,
    Algorithm,
    ScoreAlgorithm,
    dpo,
    grpo,
    online_dpo,
    ppo,
    raft,
    reinforce,
    reinforce_plus_plus,
    reward_model,
    rloo,
    rso,
    sft,
)
from rlhf.config import (
    AlgorithmConfig,
    DpoConfig,
    GrpoConfig,
    OnlineDpoConfig,
    PpoConfig,
    RaftConfig,
    ReinforceConfig,
    ReinforcePlusPlusBaselineConfig,
    ReinforcePlusPlusConfig,
    RewardModelConfig,
    RlooConfig,
    RsoConfig,
    SftConfig,
)


def build(config: AlgorithmConfig) -> Algorithm | ActorCriticAlgorithm | ScoreAlgorithm:  # noqa: C901  one case an algorithm
    """The algorithm that `algorithm.name` of the run file stands for, with its settings."""
    match config:
        case RlooConfig():
            return rloo.build(config)
        case ReinforceConfig():
            return reinforce.build(config)
        case GrpoConfig():
            return grpo.build(config)
        case ReinforcePlusPlusConfig() | ReinforcePlusPlusBaselineConfig():
            return reinforce_plus_plus.build(config)
        case PpoConfig():
            return ppo.build(config)
        case RaftConfig():
            return raft.build(config)
        case SftConfig():
            return sft.build(config)
        case DpoConfig():
            return dpo.build(config)
        case OnlineDpoConfig():
            return online_dpo.build(config)
        case RsoConfig():
            return rso.build(config)
        case RewardModelConfig():
            return reward_model.build(config)
