"""Which algorithm a run file names: the one place that knows them all."""

from rlhf.algorithms import Algorithm, dpo, online_dpo, reinforce, rloo, rso, sft
from rlhf.config import (
    AlgorithmConfig,
    DpoConfig,
    OnlineDpoConfig,
    ReinforceConfig,
    RlooConfig,
    RsoConfig,
    SftConfig,
)


def build(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that `algorithm.name` of the run file stands for, with its settings."""
    match config:
        case RlooConfig():
            return rloo.build(config)
        case ReinforceConfig():
            return reinforce.build(config)
        case SftConfig():
            return sft.build(config)
        case DpoConfig():
            return dpo.build(config)
        case OnlineDpoConfig():
            return online_dpo.build(config)
        case RsoConfig():
            return rso.build(config)
