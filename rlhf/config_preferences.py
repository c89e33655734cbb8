"""Settings of the algorithms that learn from pairs of completions: a part of `rlhf.config`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rlhf.config_online import PaidConfig
from rlhf.config_section import NonNegativeFloat, PositiveFloat, PositiveInt, Section


class PreferenceLossConfig(Section):
    """What a pair of completions costs."""

    name: Literal[
        "sigmoid",
        "sigmoid_length_norm",
        "hinge",
        "slic_hinge",
        "ipo",
        "conservative",
        "robust",
        "simpo",
        "orpo",
        "sppo_hard",
    ] = Field(default="sigmoid", description="which preference loss; slic_hinge, simpo and orpo have no reference")
    beta: PositiveFloat = Field(
        description="scale of the log-ratios (RSO's gamma); of the log-probs in slic_hinge and simpo; IPO's tau; "
        "orpo's lambda"
    )
    label_noise: PositiveFloat | None = Field(
        default=None, description="conservative and robust: share of pairs whose label is wrong, below 0.5"
    )
    target_margin: NonNegativeFloat | None = Field(default=None, description="simpo: its gamma")
    nll: NonNegativeFloat = Field(
        default=0.0, description="weight of the chosen completion's negative log-likelihood as an added loss"
    )
    nll_per: Literal["token", "sequence"] = Field(
        default="token", description="read with nll above 0: the mean over its tokens (RPO) or their sum (SLiC)"
    )

    @model_validator(mode="after")
    def _each_key_has_its_loss(self) -> Self:
        for key, value, losses in (
            ("label_noise", self.label_noise, ("conservative", "robust")),
            ("target_margin", self.target_margin, ("simpo",)),
        ):
            if (value is not None) != (self.name in losses):
                here = "is required by" if value is None else "is a key of"
                raise ValueError(f"{key} {here} {' and '.join(losses)}; name is {self.name}")
        if self.label_noise is not None and self.label_noise >= 0.5:
            raise ValueError(f"label_noise={self.label_noise}: above 0.5 the labels say the opposite; expected < 0.5")
        if self.name == "orpo" and self.nll > 0:
            raise ValueError("nll: orpo has the negative log-likelihood of the chosen completion in it; use 0")
        return self

    @property
    def has_reference(self) -> bool:
        return self.name not in ("slic_hinge", "simpo", "orpo")


class DpoConfig(Section):
    """Preference losses on given pairs: DPO (arXiv 2305.18290) and its variants."""

    name: Literal["dpo"] = Field(description="which algorithm")
    loss: PreferenceLossConfig = Field(description="what a pair of completions costs")
    preferred_by: Literal["rank", "reward"] = Field(
        default="rank", description="what orders a prompt's completions: the data's ranks, or a judge's rewards"
    )
    compare: Literal["best_worst", "all"] = Field(
        default="best_worst", description="pairs of a prompt: its best against its worst completion, or every pair"
    )

    @property
    def samples_per_prompt(self) -> int:
        """Completions of a prompt: those of the data."""
        return 2


class OnlineDpoConfig(PaidConfig):
    """The policy samples, its best completion is compared with its worst, a preference loss (arXiv 2402.04792)."""

    name: Literal["online_dpo"] = Field(description="which algorithm")
    samples_per_prompt: PositiveInt = Field(default=4, description="completions sampled for each prompt; at least 2")
    loss: PreferenceLossConfig = Field(description="what a pair of completions costs")

    @model_validator(mode="after")
    def _needs_two(self) -> Self:
        if self.samples_per_prompt < 2:
            raise ValueError("samples_per_prompt must be at least 2: a pair needs two completions")
        return self


class RejectionConfig(Section):
    """Which of the candidates are kept: statistical rejection sampling."""

    mode: Literal["paper", "exact"] = Field(
        default="paper",
        description="`paper`: Algorithm 1, each candidate at most once; `exact`: draws from "
        "softmax(r / beta) over the candidates, with repeats",
    )
    beta: NonNegativeFloat = Field(
        description="temperature of the target policy, in reward units; 0: the best candidates"
    )
    accept: PositiveInt = Field(default=8, description="candidates kept of each prompt; 2 to samples_per_prompt")
    reward_units: Literal["standardised", "raw"] = Field(
        default="standardised",
        description="what beta counts: standard deviations of the step's rewards, or the reward's own units",
    )


class RsoConfig(PaidConfig):
    """Statistical rejection sampling optimization (arXiv 2309.06657); a step is a round."""

    name: Literal["rso"] = Field(description="which algorithm")
    samples_per_prompt: PositiveInt = Field(default=64, description="candidates sampled for each prompt; at least 2")
    rejection: RejectionConfig = Field(description="which of the candidates are kept")
    pairing: Literal["first_round", "tournament"] = Field(
        default="first_round", description="n/2 disjoint random pairs of the n kept, or n-1 of a knock-out tournament"
    )
    loss: PreferenceLossConfig = Field(description="what a pair of completions costs")
    reference: Literal["frozen", "sampler"] = Field(
        default="frozen",
        description="the loss's reference: the model that the run started from, or the one that sampled the candidates",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        kept = self.rejection.accept
        if not 2 <= kept <= self.samples_per_prompt:
            raise ValueError(
                f"rejection.accept={kept} of samples_per_prompt={self.samples_per_prompt} candidates: expected at "
                f"least 2, which a pair needs, and no more than there are candidates"
            )
        if self.reference == "sampler" and not self.loss.has_reference:
            raise ValueError(f"reference=sampler, but the loss {self.loss.name} has no reference; leave the key out")
        return self
