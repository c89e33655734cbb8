"""What the policy-gradient algorithms do about samples that other weights, or another sampler, drew.

    age    a_t = sg[W(l^old - l^b)]       from the sampler to the weights at the start of the step; rejected: 0
    drift  b_t = sg[W(l - l^old)]         from there to the weights of this optimizer step

W is the truncated ratio of a token or of its completion, or 1 (`algorithm.off_policy`, docs/off_policy.md). Rows
without old log-probs are fresh and trained in one optimizer step: both are exactly 1. Rejection goes by age only, and
a rejected token stays in the count that the loss is divided by.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf.config import OffPolicyConfig
from rlhf.experience import BEHAVIOR_LOGPROBS, OLD_LOGPROBS, Row
from rlhf.metrics import Metrics, last
from rlhf.ops.importance import Truncated, effective_share, importance_weights, outside_bounds
from rlhf.ops.microbatch import MicroBatch


class Importance(NamedTuple):
    """Weights for age and for drift, and where one of them was truncated and not rejected; (B, T) all, without
    gradient."""

    age: Tensor
    drift: Tensor
    truncated: Tensor


def weigh(config: OffPolicyConfig, logprobs: Tensor, batch: MicroBatch) -> Importance:
    """The weights of a micro-batch; logprobs (B, T) are those of the current weights."""
    if OLD_LOGPROBS not in batch.tokens:
        fresh = torch.ones_like(logprobs).detach()
        return Importance(fresh, fresh, torch.zeros_like(batch.mask))
    old = batch.tokens[OLD_LOGPROBS]
    age = _weights(config, old - batch.tokens[BEHAVIOR_LOGPROBS], batch.mask)
    rejected = _rejected(config, old - batch.tokens[BEHAVIOR_LOGPROBS], batch.mask)
    drift = _weights(config, logprobs - old, batch.mask)
    truncated = (age.truncated | drift.truncated) & ~rejected
    return Importance(torch.where(rejected, 0, age.weights), drift.weights, truncated)


def measure(config: OffPolicyConfig, rows: Sequence[Row]) -> Metrics:
    """How far the sampler of a step's rows was from the learner, and what was done about it; nothing for fresh rows.

    Over all trained tokens of the step, before the first optimizer step.
    """
    if not rows or OLD_LOGPROBS not in rows[0].tokens:
        return {}
    ratios, ages, cut, rejected = [], [], 0.0, 0.0
    for row in rows:
        old, behavior = (row.tokens[name].astype(np.float64) for name in (OLD_LOGPROBS, BEHAVIOR_LOGPROBS))
        log_ratio, mask = torch.from_numpy(old - behavior)[None], torch.tensor(row.loss_mask)[None]
        age, outside = _weights(config, log_ratio, mask), _rejected(config, log_ratio, mask)
        ratios.append(log_ratio[mask])
        ages.append(torch.where(outside, 0, age.weights)[mask])
        cut += float((age.truncated & ~outside).sum())
        rejected += float(outside.sum())
    log_ratios, weights = torch.cat(ratios), torch.cat(ages)
    if not len(weights):
        return {}
    return {
        "off_policy/kl": last(float((torch.expm1(log_ratios) - log_ratios).mean())),
        "off_policy/weight_mean": last(float(weights.mean())),
        "off_policy/ess_fraction": last(effective_share(weights)),
        "off_policy/truncated_fraction": last(cut / len(weights)),
        "off_policy/rejected_fraction": last(rejected / len(weights)),
    }


def _weights(config: OffPolicyConfig, log_ratios: Tensor, mask: Tensor) -> Truncated:
    if config.weight == "none":
        return Truncated(torch.ones_like(log_ratios).detach(), torch.zeros_like(mask))
    return importance_weights(log_ratios, mask, config.weight, config.cap)


def _rejected(config: OffPolicyConfig, log_ratios: Tensor, mask: Tensor) -> Tensor:
    if config.reject == "none":
        return torch.zeros_like(mask)
    return outside_bounds(log_ratios, mask, config.reject, config.low, config.high)
