"""Settings of the algorithms that learn from their own samples and their rewards: a part of `rlhf.config`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf.config_section import NonNegativeFloat, PositiveFloat, PositiveInt, Section

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]
Clip = Annotated[float, Field(gt=0, le=1)]
Unit = Annotated[float, Field(ge=0, le=1)]


class KlConfig(Section):
    """The price of leaving the reference model."""

    coef: NonNegativeFloat = Field(default=0.05, description="beta, the price of one nat; 0 needs no reference model")
    place: Literal["reward", "loss"] = Field(
        default="reward",
        description="`reward`: minus beta times k1, before the baseline (REINFORCE++: each token pays for itself and "
        "what follows); `loss`: an added loss",
    )
    loss_estimator: Literal["k2", "k2_token", "k3"] = Field(
        default="k2",
        description="with place `loss`: k2 of the sequence has the gradient of its reverse KL; k2_token is the sum of "
        "the tokens' k2; k3 (GRPO's) has the gradient of the forward KL",
    )
    target: PositiveFloat | None = Field(
        default=None,
        description="KL of a completion, in nats, that coef is moved to hold (arXiv 1909.08593); null: coef stays",
    )
    horizon: PositiveFloat = Field(
        default=10_000.0, description="with `target`: samples over which coef may move by a fifth of itself"
    )

    @model_validator(mode="after")
    def _can_move(self) -> Self:
        if self.target is not None and self.coef == 0:
            raise ValueError("target moves coef by a share of itself, and 0 stays 0: coef must be above 0")
        if self.place == "reward" and self.loss_estimator != type(self).model_fields["loss_estimator"].default:
            raise ValueError(
                f"loss_estimator={self.loss_estimator} would do nothing: place is reward, where the KL is k1; expected "
                "place=loss, or no such key"
            )
        if self.target is None and "horizon" in self.model_fields_set and self.horizon != 10_000.0:
            raise ValueError("horizon would do nothing without target")
        return self


class MissingEosConfig(Section):
    """What a completion is paid that ran into generation.max_new_tokens without an end-of-sequence token."""

    fixed_score: float | None = Field(
        default=None, description="its score, whatever the judge said (arXiv 2403.17031: -1); null: off"
    )
    penalty: PositiveFloat | None = Field(default=None, description="taken off its score; null: off")

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.fixed_score is not None and self.penalty is not None:
            raise ValueError("fixed_score and penalty are two rules for the same completions: set one of them")
        return self


class PaidConfig(Section):
    """What all algorithms share that sample: what becomes of a judge's score first."""

    reward_clip: PositiveFloat | None = Field(
        default=None,
        description="scores are held within this of 0, before anything is compared or priced with them; null: off",
    )
    missing_eos: MissingEosConfig = Field(
        default_factory=MissingEosConfig, description="what a completion without an end is paid"
    )


class OnlineConfig(PaidConfig):
    """What these algorithms share: how a sample's score becomes its reward."""

    name: str = Field(description="which algorithm")
    samples_per_prompt: PositiveInt = Field(default=1, description="completions sampled for each prompt")
    kl: KlConfig = Field(default_factory=KlConfig, description="the price of leaving the reference")


class GroupedConfig(OnlineConfig):
    """What those share that compare the samples of one prompt."""

    samples_per_prompt: PositiveInt = Field(
        default=4, description="completions sampled for each prompt; at least 2 where they are compared"
    )
    drop_equal_groups: bool = Field(
        default=False,
        description="leave groups out whose scorable samples the judge gave the same score, and count them",
    )

    @model_validator(mode="after")
    def _needs_others(self) -> Self:
        if self.samples_per_prompt < 2:
            raise ValueError(
                f"samples_per_prompt must be at least 2: {self.name} compares each sample with the others of its prompt"
            )
        return self


class ClipConfig(Section):
    """How far one step may move the policy (PPO's clipped ratio), and how token losses become one number."""

    low: Clip = Field(default=0.2, description="tokens with negative credit stop below the ratio 1 - low")
    high: PositiveFloat = Field(default=0.2, description="tokens with positive credit stop above the ratio 1 + high")
    dual: Annotated[float, Field(gt=1)] | None = Field(
        default=None, description="tokens with negative credit stop above this ratio, too; null: off"
    )
    centre: Literal["old", "behavior"] = Field(
        default="old",
        description="what the ratio is to: the weights at the start of the step (decoupled from the sampler, which "
        "off_policy corrects for: arXiv 2110.00641), or the sampler (PPO as it was, for fresh samples)",
    )


class OffPolicyConfig(Section):
    """What is done about samples that older weights drew, or an engine that disagrees with the learner.

    The ratio is that of the weights at the start of the step to the sampler, exp(l^old - l^b).
    """

    weight: Literal["token", "sequence", "none"] = Field(
        default="token",
        description="importance weight of a stale sample: each token's own ratio, that of its whole completion, or "
        "none (a control for experiments); exactly 1 where no old log-probs are computed (loop.max_staleness 0, one "
        "optimizer step, fresh_too false)",
    )
    cap: PositiveFloat = Field(default=2.0, description="a weight above this becomes this (truncation)")
    reject: Literal["none", "token", "sequence", "sequence_mean"] = Field(
        default="none",
        description="what is left out of the gradient when its ratio is outside [low, high]: nothing; a token, by its "
        "own; a completion, by its tokens' product or by their geometric mean",
    )
    low: NonNegativeFloat = Field(default=0.5, description="with `reject`: least ratio that is kept; 0: no such bound")
    high: PositiveFloat = Field(default=5.0, description="with `reject`: largest ratio that is kept")
    fresh_too: bool = Field(
        default=False,
        description="correct samples of the current weights, too, for what the rollout engine computes otherwise than "
        "the learner; costs a pass without gradient where no other setting needs it",
    )

    @model_validator(mode="after")
    def _nothing_idle(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low={self.low} must be below high={self.high}")
        idle = {"low", "high"} if self.reject == "none" else set()
        idle |= {"cap"} if self.weight == "none" else set()
        ignored = sorted(key for key, value in self if key in idle and value != type(self).model_fields[key].default)
        if ignored:
            raise ValueError(
                f"{' and '.join(ignored)} would do nothing with weight={self.weight} and reject={self.reject}"
            )
        if self.fresh_too and self.weight == "none" and self.reject == "none":
            raise ValueError("fresh_too would do nothing: neither weight nor reject corrects anything")
        return self


class OffPolicyCorrected(Section):
    """What the policy-gradient algorithms share: their samples may be stale."""

    off_policy: OffPolicyConfig = Field(
        default_factory=OffPolicyConfig, description="what is done about samples that other weights drew"
    )


class RlooConfig(OffPolicyCorrected, GroupedConfig):
    """REINFORCE with a leave-one-out baseline (arXiv 2402.14740)."""

    name: Literal["rloo"] = Field(description="which algorithm")


class ReinforceConfig(OffPolicyCorrected, OnlineConfig):
    """REINFORCE, the whole completion as one action (arXiv 2402.14740, section 2)."""

    name: Literal["reinforce"] = Field(description="which algorithm")
    baseline: Literal["none", "moving_average", "batch_mean"] = Field(
        default="moving_average",
        description="what is subtracted from the reward: nothing, the mean of all earlier batches, or of this batch",
    )


class ClippedObjective(OffPolicyCorrected):
    """What those share that clip the ratio (PPO's objective)."""

    clip: ClipConfig = Field(default_factory=ClipConfig, description="how far one step may move the policy")

    @model_validator(mode="after")
    def _corrected_once(self) -> Self:
        if self.clip.centre == "behavior" and self.off_policy.weight != "none":
            raise ValueError(
                "clip.centre=behavior puts the ratio to the sampler into the objective, and off_policy.weight="
                f"{self.off_policy.weight} would weigh by it once more: set off_policy.weight to none"
            )
        return self


class GrpoKlConfig(KlConfig):
    """GRPO's price: k3 as a loss."""

    coef: NonNegativeFloat = Field(default=0.04, description="beta, the price of one nat; 0 needs no reference model")
    place: Literal["reward", "loss"] = Field(default="loss", description=KlConfig.model_fields["place"].description)
    loss_estimator: Literal["k2", "k2_token", "k3"] = Field(
        default="k3", description=KlConfig.model_fields["loss_estimator"].description
    )


class GrpoConfig(ClippedObjective, GroupedConfig):
    """Group-relative policy optimisation (arXiv 2402.03300); with scale none and aggregation constant, Dr. GRPO."""

    name: Literal["grpo"] = Field(description="which algorithm")
    samples_per_prompt: PositiveInt = Field(default=8, description="completions sampled for each prompt; at least 2")
    kl: GrpoKlConfig = Field(default_factory=GrpoKlConfig, description="the price of leaving the reference")
    scale: Literal["biased_std", "unbiased_std", "none"] = Field(
        default="biased_std",
        description="what a reward's distance from its group's mean is divided by: the group's standard deviation "
        "over n or over n - 1, or nothing (Dr. GRPO)",
    )
    std_eps: NonNegativeFloat = Field(default=1e-4, description="added to that standard deviation")
    aggregation: Aggregation = Field(
        default="sequence_mean",
        description="a step's loss: the mean over tokens; over completions of their tokens' mean, or sum; or of their "
        "sum divided by generation.max_new_tokens (`constant`, Dr. GRPO)",
    )


class PlusPlusKlConfig(KlConfig):
    """REINFORCE++'s price: k1 of each token in the reward."""

    coef: NonNegativeFloat = Field(default=0.01, description="beta, the price of one nat; 0 needs no reference model")


class ReinforcePlusPlusConfig(ClippedObjective, OnlineConfig):
    """REINFORCE++: token returns whitened over the whole batch (arXiv 2501.03262)."""

    name: Literal["reinforce_plus_plus"] = Field(description="which algorithm")
    kl: PlusPlusKlConfig = Field(default_factory=PlusPlusKlConfig, description="the price of leaving the reference")
    aggregation: Aggregation = Field(
        default="sequence_mean", description=GrpoConfig.model_fields["aggregation"].description
    )


class PlusPlusBaselineKlConfig(KlConfig):
    """REINFORCE++-baseline's price: the tokens' k2 as a loss."""

    coef: NonNegativeFloat = Field(default=0.01, description="beta, the price of one nat; 0 needs no reference model")
    place: Literal["reward", "loss"] = Field(default="loss", description=KlConfig.model_fields["place"].description)
    loss_estimator: Literal["k2", "k2_token", "k3"] = Field(
        default="k2_token", description=KlConfig.model_fields["loss_estimator"].description
    )


class ReinforcePlusPlusBaselineConfig(ClippedObjective, GroupedConfig):
    """REINFORCE++-baseline: distance from the group's mean, whitened over the whole batch (arXiv 2501.03262)."""

    name: Literal["reinforce_plus_plus_baseline"] = Field(description="which algorithm")
    kl: PlusPlusBaselineKlConfig = Field(
        default_factory=PlusPlusBaselineKlConfig, description="the price of leaving the reference"
    )
    aggregation: Aggregation = Field(
        default="sequence_mean", description=GrpoConfig.model_fields["aggregation"].description
    )


class CriticConfig(Section):
    """The value model: a trunk of its own with a scalar head, trained whole beside the policy."""

    init: str = Field(
        default="policy",
        description="what it starts from: `policy`, the policy's model with a new head, or a reward model with the "
        "policy's tokenizer, trunk and head: a local folder or a hub name",
    )

    lr: PositiveFloat = Field(
        default=1e-5, description="peak learning rate of its own AdamW; the rest is that of the learner section"
    )
    value_clip: PositiveFloat | None = Field(
        default=0.2, description="values are learnt within this of those at the start of the step; null: off"
    )


class PpoConfig(ClippedObjective, OnlineConfig):
    """Proximal policy optimisation with a critic (arXiv 1707.06347; for language models arXiv 2203.02155)."""

    name: Literal["ppo"] = Field(description="which algorithm")
    gamma: Unit = Field(default=1.0, description="what a reward one token later is worth")
    lam: Unit = Field(
        default=0.95, description="lambda of generalised advantage estimation: 1 trusts returns, 0 the critic"
    )
    whiten_rewards: bool = Field(
        default=False, description="scale token rewards to standard deviation 1 over the step, keeping their mean"
    )
    whiten_advantages: bool = Field(
        default=True, description="advantages with mean 0 and standard deviation 1 over all tokens of the step"
    )
    critic: CriticConfig = Field(default_factory=CriticConfig, description="the value model")

    @property
    def aggregation(self) -> Aggregation:
        """PPO's mean is over tokens, of the policy and of the critic."""
        return "token_mean"


class RaftConfig(GroupedConfig):
    """Reward-ranked fine-tuning: the best of a prompt's samples, then its log-likelihood (arXiv 2304.06767)."""

    name: Literal["raft"] = Field(description="which algorithm")
    selection: Literal["best", "random"] = Field(
        default="best",
        description="which sample of a group is learnt: the one of highest reward, or one chosen without its reward "
        "(a control for experiments, which must not learn)",
    )
    aggregation: Aggregation = Field(
        default="token_mean", description=GrpoConfig.model_fields["aggregation"].description
    )

    @model_validator(mode="after")
    def _kl_ranks(self) -> Self:
        if self.kl.coef and self.kl.place == "loss":
            raise ValueError(
                "kl.place=loss would price the winners only, which is not the KL of the policy: use kl.place=reward, "
                "where it takes part in the ranking"
            )
        return self
