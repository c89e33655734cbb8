"""How far the learner's log-probabilities are from those that the rollout engine recorded, at the same weights."""

import torch
from torch import Tensor

from rlhf.metrics import Metrics, largest, mean


def mismatch(logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor) -> Metrics:
    """Metrics of the tokens where mask is true; nothing when there are none.

        abs_mean, abs_max of |d|;   kl = mean of exp(d) - 1 - d;   d = learner - engine   (k3 of KL(engine || learner))

    All arguments have one shape. Tokens of older versions must be masked out: they differ for a good reason.
    """
    difference = (logprobs.detach() - behavior_logprobs)[mask].double()
    if difference.numel() == 0:
        return {}
    count = difference.numel()
    return {
        "mismatch/logprob_abs_mean": mean(float(difference.abs().sum()), count),
        "mismatch/logprob_abs_max": largest(float(difference.abs().max())),
        "mismatch/kl": mean(float((torch.expm1(difference) - difference).sum()), count),
    }
