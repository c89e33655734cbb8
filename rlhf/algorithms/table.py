"""Which algorithm a run file names: the one place that knows them all."""

from rlhf.algorithms import Algorithm, grpo, raft, reinforce, reinforce_plus_plus, rloo
from rlhf.config import (
    AlgorithmConfig,
    GrpoConfig,
    RaftConfig,
    ReinforceConfig,
    ReinforcePlusPlusBaselineConfig,
    ReinforcePlusPlusConfig,
    RlooConfig,
)


def build(config: AlgorithmConfig) -> Algorithm:
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
        case RaftConfig():
            return raft.build(config)
