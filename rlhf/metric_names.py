"""Every metric that a run may log: its unit, how its pieces are merged, what it means; the table of docs/metrics.md."""

from typing import NamedTuple

from rlhf.metrics import Reducer


class Meaning(NamedTuple):
    """unit, how pieces are merged (`mean` over what the meaning says), what the number is."""

    unit: str
    reducer: Reducer
    meaning: str


METRICS: dict[str, Meaning] = {
    "step": Meaning("steps", "last", "the step, counted from 0"),
    "policy_version": Meaning("updates", "last", "version of the policy after the step: updates so far"),
    "reward/mean": Meaning("reward", "mean", "what the judge gave, over samples that it could score; no KL in it"),
    "reward/std": Meaning(
        "reward", "last", "standard deviation of the same rewards over the whole step, population form"
    ),
    "reward/baseline": Meaning("reward", "last", "REINFORCE: the mean that was subtracted in this step"),
    "reward/selected_mean": Meaning("reward", "mean", "RAFT: what the judge gave the samples that are learnt"),
    "kl/k1": Meaning(
        "nats a completion",
        "mean",
        "sum over tokens of log-prob minus reference log-prob: unbiased for the KL to the reference, may be below 0",
    ),
    "kl/k3": Meaning(
        "nats a completion", "mean", "sum over tokens of exp(-d) - 1 + d, d as in k1: the same KL, never below 0"
    ),
    "kl/k3_clamped_fraction": Meaning(
        "share of tokens", "mean", "tokens whose log-ratio was cut before the exponential of k3"
    ),
    "kl/loss_clamped_fraction": Meaning(
        "share of tokens", "mean", "the same for the KL loss (algorithm.kl.place=loss)"
    ),
    "loss/policy": Meaning("-", "mean", "the policy loss, divided by the batch's global count as the gradient is"),
    "loss/value": Meaning(
        "reward squared", "mean", "PPO: the critic's clipped squared error to the returns, halved, over trained tokens"
    ),
    "loss/bradley_terry": Meaning("nats", "mean", "reward models: -log sigma(r_w - r_l - margin), over prompts"),
    "loss/centring": Meaning("reward squared", "mean", "reward models: (r_w + r_l)^2 before its coefficient"),
    "loss/kl": Meaning("nats", "mean", "the KL loss before its coefficient (algorithm.kl.place=loss)"),
    "loss/preference": Meaning("-", "mean", "the preference loss of a pair, without the added NLL"),
    "loss/nll": Meaning(
        "nats",
        "mean",
        "negative log-likelihood: SFT's, a trained token; RAFT's, divided as its gradient is; with algorithm.loss.nll "
        "that of a chosen completion, a token or a sequence (algorithm.loss.nll_per)",
    ),
    "rewards/chosen": Meaning(
        "reward",
        "mean",
        "of the preferred answer of a pair: its implicit reward (algorithm.loss.beta times its log-ratio to the "
        "reference), or a reward model's score",
    ),
    "rewards/rejected": Meaning("reward", "mean", "the same of the other answer"),
    "rewards/margins": Meaning("reward", "mean", "that of the preferred answer minus that of the other"),
    "rewards/accuracies": Meaning(
        "share of pairs", "mean", "pairs whose margin is above 0; ties do not count, so it is 0 where all margins are 0"
    ),
    "rewards/longer_agreement": Meaning(
        "-1 to 1", "mean", "sign of the margin times sign of the length difference; see below"
    ),
    "logps/chosen": Meaning("nats", "mean", "log-probability of the chosen completion, summed over its tokens"),
    "logps/rejected": Meaning("nats", "mean", "the same of the rejected completion"),
    "pairs/made": Meaning("pairs", "sum", "preference pairs of the step"),
    "pairs/ties": Meaning("comparisons", "sum", "comparisons of equal scores: they make no pair"),
    "pairs/identical": Meaning("comparisons", "sum", "comparisons of equal texts: they make no pair"),
    "pairs/empty": Meaning("pairs", "sum", "pairs left out because one side has no token to train on"),
    "pairs/groups_without_fraction": Meaning("share of groups", "mean", "prompts that made no pair"),
    "pairs/chosen_length_mean": Meaning("tokens", "mean", "trained tokens of a chosen completion"),
    "pairs/rejected_length_mean": Meaning("tokens", "mean", "the same of a rejected completion"),
    "pairs/longer_chosen": Meaning("-1 to 1", "mean", "+1 for a pair whose chosen completion is longer, -1 if shorter"),
    "rejection/beta": Meaning("reward", "last", "RSO: temperature of the target, in the reward's own units"),
    "rejection/acceptance_rate": Meaning("share of tries", "mean", "RSO: candidates accepted of those looked at"),
    "rejection/acceptance_expected": Meaning(
        "probability", "mean", "RSO: mean of exp((r - r_max) / beta) over a prompt's candidates"
    ),
    "rejection/accepted_reward_mean": Meaning("reward", "mean", "RSO: reward of the accepted candidates"),
    "clip/fraction": Meaning(
        "share of tokens", "mean", "tokens whose importance weight was cut at algorithm.ratio_cap"
    ),
    "clip/above_fraction": Meaning(
        "share of tokens",
        "mean",
        "tokens with positive credit and a ratio over 1 + algorithm.clip.high: no gradient",
    ),
    "clip/below_fraction": Meaning(
        "share of tokens",
        "mean",
        "tokens with negative credit and a ratio under 1 - algorithm.clip.low: no gradient",
    ),
    "clip/dual_fraction": Meaning(
        "share of tokens", "mean", "tokens with negative credit and a ratio over algorithm.clip.dual: no gradient"
    ),
    "clip/log_ratio_held_fraction": Meaning(
        "share of tokens", "mean", "tokens whose log-ratio was cut at 20 nats before its exponential: no gradient"
    ),
    "clip/value_fraction": Meaning(
        "share of tokens",
        "mean",
        "PPO: values beyond algorithm.critic.value_clip of the old ones, away from the return: no gradient",
    ),
    "advantage/abs_mean": Meaning("reward", "mean", "mean size of the advantages; 0 means that nothing is learnt"),
    "advantage/raw_mean": Meaning("reward", "last", "REINFORCE++, PPO: mean over tokens of what is whitened"),
    "advantage/raw_std": Meaning("reward", "last", "REINFORCE++, PPO: standard deviation of the same, population form"),
    "value/mean": Meaning(
        "reward", "last", "PPO: what the critic expected at the start of the step, over trained tokens"
    ),
    "value/return_mean": Meaning("reward", "last", "PPO: the returns that it learns, over the same tokens"),
    "value/explained_variance": Meaning(
        "-",
        "last",
        "PPO: 1 - Var(return - value) / Var(return) over the same tokens: 1 perfect, 0 a constant, below 0 worse",
    ),
    "value/grad_norm": Meaning(
        "-", "mean", "PPO: norm of the critic's gradient before it is clipped, over the step's optimizer steps"
    ),
    "value/lr": Meaning("-", "last", "PPO: the critic's learning rate in the last optimizer step"),
    "group/zero_advantage_fraction": Meaning("share of groups", "mean", "groups whose samples all have advantage 0"),
    "groups/equal_dropped": Meaning(
        "groups", "sum", "groups left out of the step because all their scores are equal (algorithm.drop_equal_groups)"
    ),
    "groups/dropped": Meaning("groups", "sum", "groups left out of the step for want of enough scored samples"),
    "entropy": Meaning("nats a token", "mean", "entropy of the policy's next-token distribution at the sampled tokens"),
    "completion/length_mean": Meaning("tokens", "mean", "trained tokens of a completion, its end-of-sequence included"),
    "completion/unfinished_fraction": Meaning("share of samples", "mean", "samples cut at generation.max_new_tokens"),
    "mismatch/logprob_abs_mean": Meaning(
        "nats a token",
        "mean",
        "size of the difference between the learner's and the rollout engine's log-prob; see below",
    ),
    "mismatch/logprob_abs_max": Meaning("nats", "max", "the largest such difference of one token"),
    "mismatch/kl": Meaning("nats a token", "mean", "k3 estimate of the KL from the rollout engine to the learner"),
    "staleness/mean": Meaning("versions", "mean", "how many updates lie between sampling and training, over samples"),
    "staleness/max": Meaning("versions", "max", "the same for the oldest token; never above loop.max_staleness"),
    "grad_norm": Meaning("-", "mean", "norm of the gradient before it is clipped, over the step's optimizer steps"),
    "lr": Meaning("-", "last", "learning rate of the last optimizer step"),
    "tokens/trained": Meaning("tokens", "sum", "tokens with a true loss mask, over all epochs"),
    "tokens/trained_per_s": Meaning("tokens/s", "last", "trained tokens a second of the update"),
    "tokens/generated_per_s": Meaning(
        "tokens/s", "last", "completion tokens a second of the time that engines were busy"
    ),
    "sync/bytes": Meaning("bytes", "last", "size of the published weights"),
    "sync/engines": Meaning("engines", "last", "rollout engines that verified the version"),
    "sync/seconds": Meaning("s", "last", "time until all engines had pulled and verified the version"),
    "sync/probe_abs_max": Meaning("nats", "max", "largest difference between engine and learner at the weight probe"),
    "time/generate_s": Meaning("s", "last", "time of rollout workers on this step's groups, summed over workers"),
    "time/judge_s": Meaning("s", "last", "time of judges on this step's groups, summed over workers"),
    "time/evaluate_s": Meaning("s", "last", "time of workers on held-out prompts, summed over workers"),
    "time/wait_s": Meaning("s", "last", "time until the step's groups were there"),
    "time/annotate_s": Meaning("s", "last", "time of the columns that only the learner can fill"),
    "time/update_s": Meaning("s", "last", "time of credit assignment and optimizer steps"),
    "time/sync_s": Meaning("s", "last", "time of publishing, committing the step and pulling the weights"),
    "time/step_s": Meaning("s", "last", "the whole step"),
    "faults/restarts": Meaning(
        "restarts", "last", "how often this process built the team again because an actor died (loop.max_restarts)"
    ),
    "faults/unscorable": Meaning("samples", "sum", "samples whose reward was None: left out, never counted as 0"),
    "faults/empty_minibatch": Meaning(
        "minibatches", "sum", "minibatches without a token to train on: no optimizer step"
    ),
    "faults/nonfinite_step": Meaning(
        "optimizer steps", "sum", "optimizer steps that were skipped for a non-finite gradient"
    ),
}
