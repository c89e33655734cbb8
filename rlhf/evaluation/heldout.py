"""What held-out data says about a policy: answers to prompts and their rewards, or the loss's measures of rows."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.errors import BadInput, RunFailed
from rlhf.experience import REWARD, Group


@dataclass(frozen=True, slots=True)
class Answer:
    """One held-out prompt with its answer; reward is None where the judge could not score."""

    prompt: str
    completion: str
    reward: float | None
    finish_reason: str


@dataclass(frozen=True, slots=True)
class HeldoutReport:
    """One evaluation.

    step, updates before it. reward_mean and reward_std (over answers, population form) of the n answers that were
    scored; unscored, the others. length_mean in tokens, unfinished_fraction of all answers. samples, those to show.
    """

    step: int
    reward_mean: float
    reward_std: float
    n: int
    unscored: int
    length_mean: float
    unfinished_fraction: float
    samples: tuple[Answer, ...]

    def describe(self) -> str:
        text = f"reward {self.reward_mean:.4g} ± {self.reward_std:.2g} over {self.n} answers"
        return text + (f", {self.unscored} not scored" if self.unscored else "")

    def scalars(self) -> dict[str, float]:
        """What is drawn as a curve."""
        return {"reward_mean": self.reward_mean}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class HeldoutMeasures:
    """One evaluation of a run on preferences or demonstrations, which samples nothing.

    step, updates before it. n held-out rows; values, what the loss measured of them (its metrics), by name.
    """

    step: int
    n: int
    values: Mapping[str, float]

    @property
    def samples(self) -> tuple[Answer, ...]:
        """No answers: nothing was sampled."""
        return ()

    def describe(self) -> str:
        return f"{', '.join(f'{name} {value:.4g}' for name, value in self.scalars().items())} over {self.n} rows"

    def scalars(self) -> dict[str, float]:
        """What is drawn as a curve: losses and the rewards of pairs. Facts of the rows themselves never change."""
        return {name: value for name, value in self.values.items() if name.startswith(("loss/", "rewards/"))}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Evaluation = HeldoutReport | HeldoutMeasures


def report(step: int, groups: Sequence[Group], shown: int) -> HeldoutReport:
    """Summarises judged groups; the first sample of the first `shown` groups (by prompt order given) is kept as text.

    A None reward is left out of mean and deviation, never counted as zero. Raises RunFailed when nothing was scored.
    """
    samples = [sample for group in groups for sample in group.samples]
    rewards = [reward for sample in samples if (reward := sample.scores[REWARD]) is not None]
    if not rewards:
        raise RunFailed(f"evaluation after {step} steps: none of {len(samples)} held-out answers could be scored")
    mean = math.fsum(rewards) / len(rewards)
    return HeldoutReport(
        step=step,
        reward_mean=mean,
        reward_std=math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards)),
        n=len(rewards),
        unscored=len(samples) - len(rewards),
        length_mean=sum(len(sample.token_ids) for sample in samples) / len(samples),
        unfinished_fraction=sum(sample.finish_reason == "length" for sample in samples) / len(samples),
        samples=tuple(
            Answer(
                prompt=prompt_as_text(group.prompt.content),
                completion=group.samples[0].text,
                reward=group.samples[0].scores[REWARD],
                finish_reason=group.samples[0].finish_reason,
            )
            for group in groups[:shown]
        ),
    )


def from_json(row: Mapping[str, Any]) -> Evaluation:
    """The evaluation that `to_json` wrote."""
    if "values" in row:
        return HeldoutMeasures(**row)
    samples = tuple(Answer(**sample) for sample in row["samples"])
    return HeldoutReport(**{**row, "samples": samples})


def best(rows: Sequence[Mapping[str, Any]], measure: str, among: Collection[int]) -> int | None:
    """The updates of the best of the evaluations at `among`, the earliest of equals; None where there is none.

    rows, what `to_json` wrote. measure, `reward` for answers, else one of the loss's measures, of which those that
    begin with `loss/` are better when smaller. Raises BadInput, naming those that were taken, for another one.
    """
    scores = {}
    for row in rows:
        values = row["values"] if "values" in row else {"reward": row["reward_mean"]}
        if measure not in values:
            raise BadInput(f"loop.keep_best={measure}: not measured of held-out data; expected one of {sorted(values)}")
        if row["step"] in among and math.isfinite(values[measure]):
            scores[row["step"]] = -values[measure] if measure.startswith("loss/") else values[measure]
    return min(scores, key=lambda step: (-scores[step], step)) if scores else None


def rise_in_deviations(before: HeldoutReport, after: HeldoutReport) -> float:
    """How far the mean reward rose, in standard deviations of the answers before: (mean' - mean) / std.

    Infinite when all answers before had one reward and the mean has moved, 0 when it has not.
    """
    rise = after.reward_mean - before.reward_mean
    if before.reward_std == 0:
        return 0.0 if rise == 0 else math.copysign(math.inf, rise)
    return rise / before.reward_std


def prompt_as_text(content: str | Sequence[Mapping[str, Any]]) -> str:
    """What a person reads of a prompt: the string, or the messages one after the other under their roles."""
    if isinstance(content, str):
        return content
    if len(content) == 1:
        return str(content[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in content)
