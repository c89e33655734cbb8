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
    "reward/<part>/mean": Meaning(
        "reward",
        "mean",
        "what one of several rewards gave, in its own units, over samples that it could score; `raw` is the only one, "
        "before normalisation",
    ),
    "reward/inconsistent/mean": Meaning(
        "share of comparisons",
        "mean",
        "pairwise judges: comparisons whose winner changed with the order of the two answers; of a part of the reward: "
        "reward/<part>_inconsistent/mean",
    ),
    "reward/selected_mean": Meaning("reward", "mean", "RAFT: what the judge gave the samples that are learnt"),
    "kl/k1": Meaning(
        "nats a completion",
        "mean",
        "sum over tokens of log-prob minus reference log-prob, may be below 0: unbiased for the KL to the reference "
        "where samples are of the current weights (stale ones are not reweighted)",
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
    "kl/coef": Meaning("-", "last", "with algorithm.kl.target: the KL's price in this step, before it is moved"),
    "mix/nll": Meaning(
        "nats", "mean", "rows of data beside the samples: negative log-likelihood of demonstrations, a trained token"
    ),
    "mix/preference": Meaning("-", "mean", "the same: preference loss of the data's pairs, without the added NLL"),
    "mix/accuracies": Meaning("share of pairs", "mean", "the same: pairs of the data whose margin is above 0"),
    "mix/margins": Meaning("reward", "mean", "the same: implicit reward of the chosen minus that of the other answer"),
    "mix/pairs": Meaning("pairs", "sum", "the same: pairs of the step that are the data's"),
    "mix/length_mean": Meaning("tokens", "mean", "the same: tokens of an answer of the data; trained ones of a sample"),
    "loss/policy": Meaning("-", "mean", "the policy loss, divided by the batch's global count as the gradient is"),
    "loss/value": Meaning(
        "reward squared", "mean", "PPO: the critic's clipped squared error to the returns, halved, over trained tokens"
    ),
    "loss/bradley_terry": Meaning("nats", "mean", "reward models: -log sigma(r_w - r_l - margin), over prompts"),
    "loss/ranker": Meaning("nats", "mean", "pairwise ranker: -log P(label) of a comparison, over its two orders"),
    "ranker/first_mean": Meaning(
        "probability", "mean", "pairwise ranker: how likely it calls the answer that stands first better; 0.5: no bias"
    ),
    "ranker/inconsistent": Meaning(
        "share of comparisons", "mean", "pairwise ranker: comparisons whose winner changes with the order"
    ),
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
        "share of tokens", "mean", "tokens whose importance weight was cut at algorithm.off_policy.cap"
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
    "staleness/fraction_0": Meaning("share of samples", "mean", "histogram: samples of the current version"),
    "staleness/fraction_1": Meaning("share of samples", "mean", "histogram: samples one version old"),
    "staleness/fraction_2": Meaning("share of samples", "mean", "histogram: samples two versions old"),
    "staleness/fraction_3_to_4": Meaning("share of samples", "mean", "histogram: three or four versions old"),
    "staleness/fraction_5_to_8": Meaning("share of samples", "mean", "histogram: five to eight versions old"),
    "staleness/fraction_over_8": Meaning("share of samples", "mean", "histogram: more than eight versions old"),
    "off_policy/kl": Meaning(
        "nats a token",
        "last",
        "k3 estimate of the KL from the samplers of the step (of any age) to the learner, before the first update",
    ),
    "off_policy/weight_mean": Meaning(
        "-",
        "last",
        "mean importance weight for age after truncation and rejection; where nothing was stale 1 but for what engine "
        "and learner compute differently. Not logged where no old log-probs are computed: there it is exactly 1",
    ),
    "off_policy/ess_fraction": Meaning(
        "share of tokens",
        "last",
        "effective sample size of those weights over the number of tokens: (sum w)^2 / (n sum w^2); 1: all count alike",
    ),
    "off_policy/truncated_fraction": Meaning(
        "share of tokens", "last", "tokens whose weight for age was cut at algorithm.off_policy.cap"
    ),
    "off_policy/rejected_fraction": Meaning(
        "share of tokens", "last", "tokens left out of the gradient (algorithm.off_policy.reject)"
    ),
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
    "time/engine_idle_s": Meaning(
        "s",
        "last",
        "time in which rollout engines sampled nothing since the last step's end: waiting for prompts, for the learner "
        "or for weights; summed over engines. Work is booked when it is handed in",
    ),
    "time/judge_s": Meaning("s", "last", "time of judges on this step's groups, summed over workers"),
    "time/store_s": Meaning(
        "s", "last", "time in which the run stored groups and judgements, sent groups to judges, and did nothing else"
    ),
    "time/evaluate_s": Meaning("s", "last", "time of workers on held-out prompts, summed over workers"),
    "time/wait_s": Meaning("s", "last", "time until the step's groups were there"),
    "time/annotate_s": Meaning("s", "last", "time of the columns that only the learner can fill"),
    "time/update_s": Meaning("s", "last", "time of credit assignment and optimizer steps"),
    "time/sync_s": Meaning("s", "last", "time of publishing, committing the step and pulling the weights"),
    "time/step_s": Meaning("s", "last", "the whole step"),
    "faults/restarts": Meaning(
        "restarts", "last", "how often this process built the team again because an actor died (loop.max_restarts)"
    ),
    "faults/uploads": Meaning(
        "uploads", "last", "uploads to storage that failed since the team was built; each is made up for by the next"
    ),
    "faults/judge_retries": Meaning(
        "calls", "sum", "calls of a judge that failed and were made again, for the groups of the step (reward.retries)"
    ),
    "faults/judge_unparsed": Meaning(
        "answers", "sum", "answers of a language model as judge that held no judgement: never counted as a number"
    ),
    "faults/judge_dropped": Meaning(
        "groups", "sum", "groups dropped since the step before because no call could judge them; the ledger has why"
    ),
    "faults/trainer_restarts": Meaning(
        "restarts",
        "last",
        "how often this process built the trainer alone again because a rank of policy or critic died; the steps since "
        "its checkpoint were trained again from the buffer (loop.max_restarts)",
    ),
    "faults/trainer_moves": Meaning(
        "moves",
        "last",
        "how often this process moved the trainer from nodes that had announced their end to others; it saved before, "
        "so that no step was trained again. Not counted in loop.max_restarts",
    ),
    "faults/buffer_restarts": Meaning(
        "restarts", "last", "how often this process put another buffer actor in the place of one that died"
    ),
    "faults/workers_died": Meaning(
        "workers", "sum", "rollout engines and judges that died and were replaced while the run went on"
    ),
    "faults/workers_hung": Meaning(
        "workers", "sum", "the same for those that did not advance for loop.heartbeat_timeout_s and were ended"
    ),
    "faults/workers_left": Meaning("workers", "sum", "the same for those whose node was drained or went away"),
    "faults/late_answers": Meaning(
        "groups", "sum", "answers to a lease that had ended; refused, because the prompt was leased again"
    ),
    "faults/prompts_set_aside": Meaning(
        "prompts", "sum", "prompts that three workers died or hung with: dropped, with the reason in the ledger"
    ),
    "faults/unscorable": Meaning("samples", "sum", "samples whose reward was None: left out, never counted as 0"),
    "faults/empty_minibatch": Meaning(
        "minibatches", "sum", "minibatches without a token to train on: no optimizer step"
    ),
    "faults/nonfinite_step": Meaning(
        "optimizer steps", "sum", "optimizer steps that were skipped for a non-finite gradient"
    ),
}
