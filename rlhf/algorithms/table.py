"""Which algorithm a run file names: the one place that knows them all."""

from rlhf.algorithms import Algorithm, ScoreAlgorithm, reinforce, reward_model, rloo
from rlhf.config import AlgorithmConfig, ReinforceConfig, RewardModelConfig, RlooConfig


def build(config: AlgorithmConfig) -> Algorithm | ScoreAlgorithm:
    """The algorithm that `algorithm.name` of the run file stands for, with its settings."""
    match config:
        case RlooConfig():
            return rloo.build(config)
        case ReinforceConfig():
            return reinforce.build(config)
        case RewardModelConfig():
            return reward_model.build(config)
