"""Settings of the reward: what is good, and what happens when it cannot be said. A part of `rlhf.config`."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from rlhf.config_section import (
    DataPath,
    Dtype,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Seconds,
    Section,
)

# What a reward comes from, and the keys that only some of these read.
SOURCES = ("function", "model", "server", "llm", "ranker")
READ_BY: Mapping[str, tuple[str, ...]] = {
    "timeout_s": ("function", "server", "llm"),
    "isolate": ("function",),
    "dtype": ("model", "ranker"),
    "read_at": ("model",),
    "token_env": ("server", "llm"),
}
ASKED_OVER_A_NETWORK = ("server", "llm")


def _checked_address(address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{parts.scheme or address!r} is no address of a server; expected http://… or https://…")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the address holds a user or password, which would be written into the run directory; "
                         "expected token_env, the name of an environment variable")  # fmt: skip
    return address


Address = Annotated[str, AfterValidator(_checked_address)]
EnvironmentName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
PartName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]


class LlmConfig(Section):
    """A language model that is asked for a judgement, behind any OpenAI-compatible address."""

    address: Address = Field(description="what stands before /chat/completions, such as http://127.0.0.1:8000/v1")
    model: str = Field(description="the model's name there")
    style: Literal["pointwise", "pairwise"] = Field(
        default="pointwise",
        description="a number for each answer; or which of two is better, asked in both orders: 1 for a win, 0 for a "
        "loss, 0.5 for a tie or where the orders disagree",
    )
    template: str | None = Field(
        default=None,
        description="what is asked: text with {prompt} and {completion}, or {prompt}, {first} and {second}; null: the "
        "texts of docs/judges.md",
    )
    system: str | None = Field(default=None, description="system message put before it")
    pattern: str | None = Field(
        default=None,
        description="regular expression whose group 1 is the judgement, the last match counts: a number; or A, B, or C "
        "for a tie. null: [[7]], [[A]]",
    )
    score_range: tuple[float, float] = Field(
        default=(1.0, 10.0), description="pointwise: a number outside is no judgement"
    )
    against_column: str | None = Field(
        default=None,
        description="pairwise: column of the data with an answer to compare with; null: the others of the group",
    )
    max_tokens: PositiveInt = Field(default=512, description="longest text of the judge")
    parallel: PositiveInt = Field(default=4, description="questions that are asked at the same time")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        wanted = ("{prompt}", "{completion}") if self.style == "pointwise" else ("{prompt}", "{first}", "{second}")
        lacking = [name for name in wanted if self.template is not None and name not in self.template]
        if lacking:
            raise ValueError(f"template: {' and '.join(lacking)} missing; style {self.style} needs {', '.join(wanted)}")
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"pattern: not a regular expression: {error}") from error
            if groups != 1:
                raise ValueError(f"pattern: {groups} groups; expected one, around the judgement")
        if self.style == "pointwise" and self.against_column is not None:
            raise ValueError("against_column would do nothing: style pointwise looks at one answer at a time")
        if self.style == "pairwise" and self.score_range != (1.0, 10.0):
            raise ValueError("score_range would do nothing: style pairwise has no numbers")
        if self.score_range[0] >= self.score_range[1]:
            raise ValueError(f"score_range: {self.score_range[0]:g} is not below {self.score_range[1]:g}")
        return self


class RankerConfig(Section):
    """A pairwise ranker: the reward of an answer is how it stands against others to the same prompt."""

    model: str = Field(description="what a run of algorithm pairwise_ranker wrote: a local folder or a hub name")
    against: Literal["others", "one"] = Field(
        default="others",
        description="compared with all others of its group (their mean), or with one of them drawn at random, as RSO "
        "does",
    )
    against_column: str | None = Field(
        default=None, description="column of the data with an answer to compare with, in place of the group's"
    )

    @model_validator(mode="after")
    def _one_opponent(self) -> Self:
        if self.against_column is not None and self.against != "others":
            raise ValueError("against would do nothing beside against_column; leave it out")
        return self


class RewardSource(Section):
    """One thing that scores answers."""

    function: str | None = Field(
        default=None,
        description="`package.module:name` or `path/to/file.py:name`: "
        "f(prompts, completions, **columns) -> list[float | None]",
    )
    model: str | None = Field(
        default=None, description="a reward model (sequence classifier with one label): a local folder or a hub name"
    )
    server: Address | None = Field(
        default=None,
        description="address that answers a POST of JSON {prompts, completions, columns} with {rewards: [...]}",
    )
    ranker: RankerConfig | None = Field(default=None, description="a model that compares two answers")
    llm: LlmConfig | None = Field(default=None, description="a language model that is asked for a judgement")
    token_env: EnvironmentName | None = Field(
        default=None,
        description="with `server` or `llm`: name of the environment variable that holds its token (sent as bearer "
        "authorization, written nowhere)",
    )
    timeout_s: Seconds = Field(
        default=60.0,
        description="with `function`, `server` or `llm`: time limit of one call: of a group, with `llm` of a question",
    )
    isolate: bool = Field(
        default=True,
        description="with `function`: run it in a worker process; false: in this one, for a debugger, without limit",
    )
    dtype: Dtype = Field(default="float32", description="with `model` or `ranker`: precision of that model")
    read_at: Literal["eos", "end"] = Field(
        default="eos",
        description="with `model`: the token that is scored: the EOS behind the answer (reward models trained here), "
        "or the last of what the model's chat template writes",
    )
    normalise: Literal["none", "mean", "mean_std"] = Field(
        default="none",
        description="shift rewards so that `reward.reference` has mean 0, and with `mean_std` scale them to its "
        "standard deviation",
    )

    @property
    def compares(self) -> bool:
        """Whether a reward says how an answer stands among the others of its group, so that one alone has none."""
        if self.ranker is not None:
            return self.ranker.against_column is None
        return self.llm is not None and self.llm.style == "pairwise" and self.llm.against_column is None

    @property
    def kind(self) -> str | None:
        """Which of SOURCES it is; None for a reward of several parts."""
        return next((name for name in SOURCES if vars(self)[name] is not None), None)

    def named(self) -> list[str]:
        """The SOURCES that are set."""
        return [name for name in SOURCES if vars(self)[name] is not None]

    def refuse_idle_keys(self) -> None:
        """Raises ValueError for a key that what is named does not read."""
        fields = type(self).model_fields
        for key, readers in READ_BY.items():
            if vars(self)[key] != fields[key].default and self.kind not in readers:
                others = " or ".join(readers)
                raise ValueError(f"{key} would do nothing: with {self.kind} set there is no reward {others}")


class RewardPart(RewardSource):
    """One of several rewards that are added up."""

    weight: float = Field(default=1.0, description="what it counts in the sum; below 0: the less the better")
    if_none: float | None = Field(
        default=None,
        description="what it is, after normalisation, for an answer that it cannot score; null: that answer has no "
        "reward at all",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        _refuse_several(self.named())
        self.refuse_idle_keys()
        return self


class ReferenceConfig(Section):
    """Demonstrations whose rewards are the zero and the unit of normalised rewards."""

    path: DataPath = Field(
        description="JSONL, Parquet or Arrow file, a folder of them, a saved data set, or a hub name"
    )
    split: str = Field(default="train", description="split of a hub or saved data set")
    prompt_column: str = Field(default="prompt", description="column that holds the prompt")
    completion_column: str = Field(default="completion", description="column that holds the answer")
    limit: PositiveInt = Field(default=256, description="use only the first rows")


class RewardConfig(RewardSource):
    """What is good: a function, a model, a ranker, a server, a language model, or several of these with weights."""

    parts: dict[PartName, RewardPart] | None = Field(
        default=None, description="several rewards by name, in place of one; the reward is their weighted sum"
    )
    reference: ReferenceConfig | None = Field(
        default=None, description="what normalised rewards are measured on, once, before the first step"
    )
    retries: NonNegativeInt = Field(
        default=2,
        description="how often a call that raised, hung or gave a wrong answer is made again before its group is "
        "dropped with the reason",
    )
    backoff_s: NonNegativeFloat = Field(
        default=1.0,
        description="with a `server` or `llm`: pause before the first repetition, doubled each time, at most 30",
    )
    max_failed_in_a_row: PositiveInt = Field(
        default=8,
        description="so many groups one after the other that could not be judged end the run; 3, if that is fewer, as "
        "long as none was judged",
    )
    max_dropped_fraction: Fraction = Field(
        default=0.25,
        description="a larger share of the last 100 groups that could not be judged ends the run (read from 20 on)",
    )

    def sources(self) -> dict[str, RewardSource]:
        """Everything that scores, by its whole key in the run file."""
        if self.parts is None:
            return {"reward": self}
        return {f"reward.parts.{name}": part for name, part in self.parts.items()}

    @property
    def normalises(self) -> bool:
        return any(source.normalise != "none" for source in self.sources().values())

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if self.parts is None:
            _refuse_several(self.named())
            self.refuse_idle_keys()
        else:
            self._refuse_both()
        over_network = any(source.kind in ASKED_OVER_A_NETWORK for source in self.sources().values())
        if "backoff_s" in self.model_fields_set and self.backoff_s != 1.0 and not over_network:
            raise ValueError(
                "backoff_s would do nothing: there is no server or llm; calls of others are repeated at once"
            )
        if self.normalises != (self.reference is not None):
            missing = "normalise is set, but" if self.normalises else "reference would do nothing:"
            said = "there is no reference to fit it on" if self.normalises else "nothing has normalise set"
            raise ValueError(f"{missing} {said}")
        for key, source in self.sources().items():
            if source.compares and source.normalise != "none":
                raise ValueError(f"{key}.normalise: it compares the answers of a group, a reference answer is alone")
        return self

    def _refuse_both(self) -> None:
        if not self.parts:
            raise ValueError("parts is empty; expected at least one named reward")
        own = [name for name, field in RewardSource.model_fields.items() if vars(self)[name] != field.default]
        if own:
            raise ValueError(
                f"{' and '.join(own)} beside parts: with parts each of them has its own; leave it out here"
            )


def _refuse_several(named: list[Any]) -> None:
    if len(named) != 1:
        found = "none is set" if not named else f"{'both' if len(named) == 2 else 'all'} are set: {', '.join(named)}"
        raise ValueError(f"exactly one of {', '.join(SOURCES[:-1])} and {SOURCES[-1]} says what is good; {found}")
