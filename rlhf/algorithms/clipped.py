"""What GRPO, REINFORCE++ and PPO share: tokens with credit, the clipped ratio, and a named aggregation.

    loss = sum_i sum_t a_it w_t max(-A_t rho_t, -A_t clip(rho_t, 1 - low, 1 + high)) + beta KL
    rho_t = exp(l_t - l^old_t);   w_t = sg[min(exp(l^old_t - l^b_t), cap)];   a_it from `aggregation`

The clip is centred on the weights at the start of the step, and w corrects for the weights and the sampler that drew
the completion (decoupled: arXiv 2110.00641). The algorithms differ in A only, which is in their own files.
"""

from collections.abc import Sequence

from rlhf.algorithms import bandit
from rlhf.algorithms.aggregation import divisor, normalizer, token_weights
from rlhf.algorithms.bandit import Episode
from rlhf.config import GrpoConfig, PpoConfig, ReinforcePlusPlusBaselineConfig, ReinforcePlusPlusConfig
from rlhf.experience import ADVANTAGES, LOSS_WEIGHTS, OLD_LOGPROBS, Floats, Group, TrainBatch
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
    measured = bandit.measure(groups, scored, kept)
    measured["advantage/abs_mean"] = mean_of(size for sizes in trained for size in sizes)
    measured["group/zero_advantage_fraction"] = bandit.zero_groups(kept, [max(sizes, default=0) for sizes in trained])
    return TrainBatch(bandit.rows(kept, columns, config.kl), normalizer(config.aggregation), measured)


def loss(config: ClippedConfig, outputs: Outputs, batch: MicroBatch) -> LossSums:
    """The clipped policy loss, plus beta times the KL when that is a loss; sums over the micro-batch.

    Rows without old log-probs are fresh and trained in one optimizer step: the ratio is 1, with the policy's gradient.
    The KL loss weighs each token by both of its importance weights, as `bandit.loss` does.
    """
    staleness, drift, truncated = bandit.importance(outputs.logprobs, batch, config.ratio_cap)
    old = batch.tokens[OLD_LOGPROBS] if OLD_LOGPROBS in batch.tokens else outputs.logprobs.detach()
    weights, clip = batch.tokens[LOSS_WEIGHTS], config.clip
    policy = clipped_policy_loss(
        outputs.logprobs,
        old,
        batch.tokens[ADVANTAGES],
        batch.mask,
        staleness * weights,
        clip.low,
        clip.high,
        clip.dual,
    )
    count, tokens = divisor(config.aggregation, batch), batch.mask.sum()
    means = {
        "loss/policy": (policy.loss.detach(), count),
        "clip/fraction": ((truncated & batch.mask).sum(), tokens),
        "clip/above_fraction": (policy.above.sum(), tokens),
        "clip/below_fraction": (policy.below.sum(), tokens),
        "clip/dual_fraction": (policy.dual.sum(), tokens),
        "clip/log_ratio_held_fraction": (policy.held.sum(), tokens),
    }
    price = bandit.kl_loss(config.kl, outputs, batch, staleness * drift * weights, count)
    return LossSums(policy.loss + price.loss, {**means, **price.means})
