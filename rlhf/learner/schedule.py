"""The learning rate as a function of how many optimizer steps came before: nothing to save, nothing to resume."""

import math

from rlhf.config import LearnerConfig


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
