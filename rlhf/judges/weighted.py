"""Several rewards as one: R = sum_j w_j z_j, with z_j the j-th reward, shifted and scaled where that is asked for.

    z = (r - mean) / std        mean and std of the same reward over reference completions

arXiv 2009.01325 and 2203.02155 (section 3.5) shift reward models so that reference answers have mean 0; a common scale
is what makes weights, a KL price or RSO's temperature mean the same for any reward model (arXiv 2309.06657, whose beta
counts rewards).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf.errors import NothingScored
from rlhf.experience import REWARD, Columns, Group
from rlhf.interfaces import Judge
from rlhf.judges.patience import FAULTS, refuse_unscored


@dataclass(frozen=True, slots=True)
class Scale:
    """What is 0 and what is 1 in a normalised reward; n, the reference completions that it was measured on."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True, slots=True)
class Part:
    """One of the rewards. if_none, what it is for an answer that it cannot score; None: that answer has no reward."""

    name: str
    weight: float
    if_none: float | None
    judge: Judge


class WeightedJudge:
    """Fills `reward` with the weighted sum, and `reward/NAME` with what each part said, before normalisation.

    scales, by the name of the part; a part that is not named is taken as it is. An answer that a part cannot score has
    no reward, whatever the others say, unless the part says what it counts then. A part that fails fails the group.
    """

    def __init__(self, parts: Sequence[Part], scales: Mapping[str, Scale]) -> None:
        self.parts, self._scales = tuple(parts), scales

    def setup(self) -> None:
        for part in self.parts:
            part.judge.setup()

    def judge(self, group: Group) -> Columns:
        """The sum, the parts, and what the parts' judges say beside their rewards."""
        count = len(group.samples)
        scores: dict[str, list[float | None]] = {}
        sums: list[float | None] = [0.0] * count
        for part in self.parts:
            said = _asked(part, group).scores
            for name, column in said.items():
                _add(scores, _own_name(part.name, name), column)
            worth = [self._worth(part, raw) for raw in said[REWARD]]
            sums = [None if a is None or b is None else a + part.weight * b for a, b in zip(sums, worth, strict=True)]
        columns = Columns(group.prompt.id, {REWARD: sums, **scores}, {})
        refuse_unscored(group, columns, "each answer lacks one of its rewards")
        return columns

    def close(self) -> None:
        for part in self.parts:
            part.judge.close()

    def _worth(self, part: Part, raw: float | None) -> float | None:
        if raw is None:
            return part.if_none
        scale = self._scales.get(part.name)
        return raw if scale is None else (raw - scale.mean) / scale.std


def _asked(part: Part, group: Group) -> Columns:
    """What the part's judge says; where a None counts something, none for all samples is an answer too."""
    try:
        return part.judge.judge(group)
    except NothingScored:
        if part.if_none is None:
            raise
        return Columns(group.prompt.id, {REWARD: [None] * len(group.samples)}, {})


def _own_name(part: str, column: str) -> str:
    """`reward` of a part is reward/PART, its `reward/X` is reward/PART_X; counts of faults are added up over parts."""
    if column == REWARD:
        return f"{REWARD}/{part}"
    return column if column.startswith(FAULTS) else column.replace(f"{REWARD}/", f"{REWARD}/{part}_", 1)


def _add(scores: dict[str, list[float | None]], name: str, column: Sequence[float | None]) -> None:
    before = scores.get(name)
    if before is None:
        scores[name] = list(column)
    else:
        scores[name] = [(a or 0.0) + (b or 0.0) for a, b in zip(before, column, strict=True)]
