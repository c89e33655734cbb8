"""How token losses become a step's loss, by name. Losses are sums that the learner divides once, so a mode is a weight
on each token and what the learner divides by:

    token_mean       sum_i sum_t / sum_i |y_i|             weight 1, divided by the tokens
    sequence_mean    mean_i of (1/|y_i|) sum_t             weight 1/|y_i|, divided by the rows      arXiv 2402.03300
    sequence_sum     mean_i of sum_t                       weight 1, divided by the rows            arXiv 2402.14740
    constant         sum_i sum_t / (N L_max)               weight 1/L_max, divided by the rows      arXiv 2503.20783

|y_i| counts the tokens with a true loss mask, L_max is the limit under which the sample was drawn.
"""

import numpy as np
from torch import Tensor

from rlhf.algorithms.bandit import Episode
from rlhf.config import Aggregation
from rlhf.experience import Floats, Normalizer
from rlhf.ops.microbatch import MicroBatch


def normalizer(aggregation: Aggregation) -> Normalizer:
    """What the learner divides by."""
    return "tokens" if aggregation == "token_mean" else "rows"


def token_weights(aggregation: Aggregation, episode: Episode) -> Floats:
    """The weight of each token of a completion, (T,). Raises ValueError where no policy of this run sampled it."""
    sample = episode.sample
    if aggregation == "sequence_mean":
        weight = 1.0 / max(int(sample.loss_mask.sum()), 1)
    elif aggregation == "constant":
        if sample.sampling is None:
            raise ValueError(f"{episode.where}: not sampled by a policy of this run, so its length had no limit")
        weight = 1.0 / sample.sampling.max_new_tokens
    else:
        weight = 1.0
    return np.full(len(sample.token_ids), weight, dtype=np.float32)


def divisor(aggregation: Aggregation, batch: MicroBatch) -> Tensor:
    """This micro-batch's part of what the learner divides by; a scalar."""
    return batch.mask.sum() if normalizer(aggregation) == "tokens" else batch.weight.sum()
