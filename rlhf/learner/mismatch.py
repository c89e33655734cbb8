"""How far what is trained is from what the learner would sample: in log-probabilities, and in versions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.experience import Group
from rlhf.metrics import Metrics, largest, mean, mean_of

# Ages, in versions, that share a metric: the first and the last of them, and how the metric is called.
AGES = (
    (0, 0, "staleness/fraction_0"),
    (1, 1, "staleness/fraction_1"),
    (2, 2, "staleness/fraction_2"),
    (3, 4, "staleness/fraction_3_to_4"),
    (5, 8, "staleness/fraction_5_to_8"),
    (9, None, "staleness/fraction_over_8"),
)


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


def staleness(groups: Sequence[Group], version: int) -> Metrics:
    """Age of the samples that a policy drew: learner's version minus the oldest version among a sample's tokens.

    Mean, largest, and a histogram: the shares of AGES add up to 1. Nothing for data that no policy of this run sampled:
    it never ages.
    """
    sampled = [sample.policy_version for group in groups for sample in group.samples]
    ages = [version - sampled_at for sampled_at in sampled if sampled_at is not None]
    if not ages:
        return {}
    shares = {
        name: mean_of(float(first <= age and (final is None or age <= final)) for age in ages)
        for first, final, name in AGES
    }
    return {"staleness/mean": mean_of(ages), "staleness/max": largest(max(ages)), **shares}
