"""Which algorithm a run file names: the one place that knows them all."""

from rlhf.algorithms import (
    ActorCriticAlgorithm,
    Algorithm,
    ScoreAlgorithm,
    adaptive_kl,
    dpo,
    grpo,
    online_dpo,
    pairwise_ranker,
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
    PairwiseRankerConfig,
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
            return adaptive_kl.wrap(config, rloo.build)
        case ReinforceConfig():
            return adaptive_kl.wrap(config, reinforce.build)
        case GrpoConfig():
            return adaptive_kl.wrap(config, grpo.build)
        case ReinforcePlusPlusConfig() | ReinforcePlusPlusBaselineConfig():
            return adaptive_kl.wrap(config, reinforce_plus_plus.build)
        case PpoConfig():
            return adaptive_kl.wrap(config, ppo.build)
        case RaftConfig():
            return adaptive_kl.wrap(config, raft.build)
        case SftConfig():
            return sft.build(config)
        case DpoConfig():
            return dpo.build(config)
        case OnlineDpoConfig():
            return online_dpo.build(config)
        case RsoConfig():
            return rso.build(config)
        case PairwiseRankerConfig():
            return pairwise_ranker.build(config)
        case RewardModelConfig():
            return reward_model.build(config)
