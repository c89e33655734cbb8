"""What GRPO, REINFORCE++ and PPO share: tokens with credit, the clipped ratio, and a named aggregation.

    loss = sum_i sum_t a_it w_t max(-A_t rho_t, -A_t clip(rho_t, 1 - low, 1 + high)) + beta KL
    rho_t = exp(l_t - l^old_t);   w_t = sg[exp(l^old_t - l^b_t)] as in `off_policy`;   a_it from `aggregation`

The clip is centred on the weights at the start of the step, and w corrects for the weights and the sampler that drew
the completion (decoupled: arXiv 2110.00641, Eq 11). With `clip.centre: behavior` there is no w and l^b stands where
l^old does: the coupled form. The algorithms differ in A only, which is in their own files.
"""

from collections.abc import Sequence

from torch import Tensor

from rlhf.algorithms import bandit, off_policy
from rlhf.algorithms.aggregation import divisor, normalizer, token_weights
from rlhf.algorithms.bandit import Episode
from rlhf.config import GrpoConfig, PpoConfig, ReinforcePlusPlusBaselineConfig, ReinforcePlusPlusConfig
from rlhf.experience import ADVANTAGES, BEHAVIOR_LOGPROBS, LOSS_WEIGHTS, OLD_LOGPROBS, Floats, Group, TrainBatch
from rlhf.metrics import mean_of
from rlhf.ops.losses import clipped_policy_loss
from rlhf.ops.microbatch import LossSums, MicroBatch, Outputs

ClippedConfig = GrpoConfig | PpoConfig | ReinforcePlusPlusConfig | ReinforcePlusPlusBaselineConfig


def train_batch(
    config: ClippedConfig,
    groups: Sequence[Group],
    scored: Sequence[Episode],
    kept: Sequence[Episode],
    advantages: Sequence[Floats],
) -> TrainBatch:
    """One row a kept episode with its advantages (T,) and the weights of the aggregation."""
    columns = [
        {ADVANTAGES: credit, LOSS_WEIGHTS: token_weights(config.aggregation, episode)}
        for episode, credit in zip(kept, advantages, strict=True)
    ]
    trained = [abs(credit[e.sample.loss_mask]).tolist() for e, credit in zip(kept, advantages, strict=True)]
    rows = bandit.rows(kept, columns, config.kl)
    measured = bandit.measure(groups, scored, kept) | off_policy.measure(config.off_policy, rows)
    measured["advantage/abs_mean"] = mean_of(size for sizes in trained for size in sizes)
    measured["group/zero_advantage_fraction"] = bandit.zero_groups(kept, [max(sizes, default=0) for sizes in trained])
    return TrainBatch(rows, normalizer(config.aggregation), measured)


def loss(config: ClippedConfig, outputs: Outputs, batch: MicroBatch) -> LossSums:
    """The clipped policy loss, plus beta times the KL when that is a loss; sums over the micro-batch.

    Rows without old log-probs are fresh and trained in one optimizer step: the ratio is 1, with the policy's gradient.
    The KL loss weighs each token by both of its importance weights, as `bandit.loss` does.
    """
    found = off_policy.weigh(config.off_policy, outputs.logprobs, batch)
    weights, clip = batch.tokens[LOSS_WEIGHTS], config.clip
    policy = clipped_policy_loss(
        outputs.logprobs,
        _centre(config, outputs, batch),
        batch.tokens[ADVANTAGES],
        batch.mask,
        found.age * weights,
        clip.low,
        clip.high,
        clip.dual,
    )
    count, tokens = divisor(config.aggregation, batch), batch.mask.sum()
    means = {
        "loss/policy": (policy.loss.detach(), count),
        "clip/fraction": ((found.truncated & batch.mask).sum(), tokens),
        "clip/above_fraction": (policy.above.sum(), tokens),
        "clip/below_fraction": (policy.below.sum(), tokens),
        "clip/dual_fraction": (policy.dual.sum(), tokens),
        "clip/log_ratio_held_fraction": (policy.held.sum(), tokens),
    }
    price = bandit.kl_loss(config.kl, outputs, batch, found.age * found.drift * weights, count)
    return LossSums(policy.loss + price.loss, {**means, **price.means})


def _centre(config: ClippedConfig, outputs: Outputs, batch: MicroBatch) -> Tensor:
    """The log-probabilities (B, T) that the clipped ratio is to."""
    if OLD_LOGPROBS not in batch.tokens:
        return outputs.logprobs.detach()
    return batch.tokens[BEHAVIOR_LOGPROBS if config.clip.centre == "behavior" else OLD_LOGPROBS]
