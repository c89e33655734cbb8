"""Optimizer steps by number, and the learning rate as a function of how many came before: nothing to save, nothing to
resume."""

import math

from rlhf.config import LearnerConfig


def steps_before(config: LearnerConfig, version: int, epoch: int, minibatch: int) -> int:
    """The optimizer steps before that of a minibatch, counted from 0, in an epoch of the update after `version` others.

    Those that were skipped count, so that a policy and its critic, which may skip different ones, agree."""
    return (version * config.epochs + epoch) * config.minibatches + minibatch


def learning_rate(config: LearnerConfig, done: int, total: int) -> float:
    """The rate of the optimizer step after `done` of `total` steps.

        warm-up     lr (done + 1) / (w + 1)                      for done < w = warmup_steps
        after it    lr * 1  |  lr (1 - x)  |  lr (1 + cos(pi x)) / 2      with x = (done - w) / (total - w)

    Starts above 0, so that no step is wasted, and ends above 0: x < 1 at the last step.
    """
    warmup = config.warmup_steps
    if done < warmup:
        return config.lr * (done + 1) / (warmup + 1)
    x = (done - warmup) / max(total - warmup, 1)
    match config.schedule:
        case "constant":
            return config.lr
        case "linear":
            return config.lr * max(1 - x, 0.0)
        case "cosine":
            return config.lr * (1 + math.cos(math.pi * min(x, 1.0))) / 2
