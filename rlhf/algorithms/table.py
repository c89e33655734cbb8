"""Which algorithm a run file names: the one place that knows them all."""

from rlhf.algorithms import Algorithm, reinforce, rloo, sft
from rlhf.config import AlgorithmConfig, ReinforceConfig, RlooConfig, SftConfig


def build(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that `algorithm.name` of the run file stands for, with its settings."""
    match config:
        case RlooConfig():
            return rloo.build(config)
        case ReinforceConfig():
            return reinforce.build(config)
        case SftConfig():
            return sft.build(config)
