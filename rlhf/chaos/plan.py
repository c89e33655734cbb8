"""The chaos file: which faults, when, to whom. Unknown keys are refused, and so is a moment that does not exist."""

import math
import random
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, model_validator

from rlhf.chaos.points import MESSAGES, MOMENTS
from rlhf.config_section import NonNegativeInt, PositiveFloat, PositiveInt, Section
from rlhf.seeding import seed_for

Role = Literal["driver", "trainer", "critic", "rollout", "reward", "reference", "buffer"]


class When(Section):
    """When a fault happens: at a named moment, after steps, after seconds, or at random; one of the four."""

    point: str | None = Field(
        default=None, description="a moment by its name (docs/reliability.md); it strikes the process that reaches it"
    )
    nth: PositiveInt = Field(default=1, description="with `point`: the how-manieth time that one process reaches it")
    after_steps: list[PositiveInt] = Field(default_factory=list, description="when so many steps are trained")
    after_s: list[PositiveFloat] = Field(
        default_factory=list,
        description="when the run has gone on for so many seconds, without the time between two starts",
    )
    every_s: PositiveFloat | None = Field(
        default=None, description="at random: mean of the exponentially distributed seconds from one to the next"
    )
    count: PositiveInt = Field(default=1, description="with `every_s`: how many")
    settled: bool = Field(
        default=True,
        description="with `every_s`: the seconds are counted only once a new step was trained since the last fault",
    )

    @model_validator(mode="after")
    def _one_of_four(self) -> Self:
        ways = {
            "point": self.point is not None,
            "after_steps": bool(self.after_steps),
            "after_s": bool(self.after_s),
            "every_s": self.every_s is not None,
        }
        said = [name for name, there in ways.items() if there]
        if len(said) != 1:
            raise ValueError(f"exactly one of {', '.join(ways)} says when; found {', '.join(said) or 'none'}")
        if self.point is not None and self.point not in MOMENTS and self.point not in MESSAGES:
            raise ValueError(f"point '{self.point}' does not exist; those that do are listed in docs/reliability.md")
        idle = {"nth": self.point is None, "count": self.every_s is None, "settled": self.every_s is None}
        ignored = [key for key, value in self if idle.get(key) and value != type(self).model_fields[key].default]
        if ignored:
            raise ValueError(f"{' and '.join(ignored)} would do nothing with {said[0]}")
        return self

    @property
    def times(self) -> int:
        """How often the fault happens."""
        return len(self.after_steps) or len(self.after_s) or self.count


class _OnProcesses(Section):
    """What a fault that strikes a process has in common."""

    when: When = Field(description="when")
    roles: list[Role] = Field(
        default_factory=list, description="whom: one process of one of these roles, drawn; not with `when.point`"
    )

    @model_validator(mode="after")
    def _somebody(self) -> Self:
        if (self.when.point is None) == (not self.roles):
            raise ValueError("roles: expected with every `when` but `point`, which strikes the process that reaches it")
        _is_moment(self.when)
        return self


class Kill(_OnProcesses):
    """SIGKILL."""

    kind: Literal["kill"] = Field(description="SIGKILL to a process")


class Stop(_OnProcesses):
    """SIGSTOP, and SIGCONT later: the process is there, holds what it holds, and answers nobody."""

    kind: Literal["stop"] = Field(description="SIGSTOP to a process, and SIGCONT later")
    for_s: PositiveFloat = Field(description="seconds until SIGCONT")


class Delay(Section):
    """The process that reaches a moment sleeps."""

    kind: Literal["delay"] = Field(description="the process that reaches a moment sleeps")
    when: When = Field(description="when; only `point`")
    for_s: PositiveFloat = Field(description="seconds")

    @model_validator(mode="after")
    def _at_a_point(self) -> Self:
        if self.when.point is None:
            raise ValueError("when: a delay happens at a point")
        _is_moment(self.when)
        return self


class Drop(Section):
    """A message that never arrives."""

    kind: Literal["drop"] = Field(description="a message gets lost")
    when: When = Field(description="when; only `point`, and of these only messages")

    @model_validator(mode="after")
    def _a_message(self) -> Self:
        if self.when.point not in MESSAGES:
            raise ValueError(f"when.point: what can be dropped is {', '.join(map(repr, MESSAGES))}")
        return self


class FillDisk(Section):
    """Takes the space that is left on the file system of the run directory, for a while.

    Refused where more than `mib` are free: a run that is to meet a full disk belongs on a small file system."""

    kind: Literal["fill_disk"] = Field(description="RUN_DIR/chaos.ballast takes the space that is left")
    when: When = Field(description="when")
    mib: Annotated[int, Field(ge=1, le=1024)] = Field(default=64, description="the ballast is never larger, MiB")
    for_s: PositiveFloat = Field(description="seconds until the ballast is removed")

    @model_validator(mode="after")
    def _no_message(self) -> Self:
        _is_moment(self.when)
        return self


class Corrupt(Section):
    """Turns one byte of a file at rest."""

    kind: Literal["corrupt"] = Field(description="one byte of a file, drawn, is changed")
    when: When = Field(description="when")
    what: Literal["checkpoint", "buffer"] = Field(description="the newest checkpoint, or experience.db")

    @model_validator(mode="after")
    def _no_message(self) -> Self:
        _is_moment(self.when)
        return self


Fault = Annotated[Kill | Stop | Delay | Drop | FillDisk | Corrupt, Discriminator("kind")]
KINDS = (Kill, Stop, Delay, Drop, FillDisk, Corrupt)


class ChaosPlan(Section):
    """A whole chaos file."""

    seed: NonNegativeInt = Field(default=0, description="what is drawn (times, roles, bytes) is derived from it")
    faults: list[Fault] = Field(description="the faults; a fault is known by its place in this list, counted from 0")
    trace: list[str] = Field(
        default_factory=list,
        description="moments that are written to chaos-trace.jsonl each time",
    )

    @model_validator(mode="after")
    def _known_moments(self) -> Self:
        unknown = [name for name in self.trace if name not in MOMENTS]
        if unknown:
            raise ValueError(f"trace: there is no moment {', '.join(map(repr, unknown))}")
        return self

    @property
    def watched(self) -> bool:
        """Whether somebody beside the run must strike, or undo: every fault but those that a process does to itself."""
        return any(fault.when.point is None or isinstance(fault, Stop | FillDisk) for fault in self.faults)


def gap_s(plan: ChaosPlan, fault: int, occurrence: int) -> float:
    """Seconds before an occurrence of a random fault: -mean * ln(1 - u), u drawn from the seed."""
    mean = plan.faults[fault].when.every_s
    assert mean is not None
    return -mean * math.log1p(-draw(plan, "gap", fault, occurrence).random())


def chosen_role(plan: ChaosPlan, fault: int, occurrence: int) -> Role | None:
    """Whom an occurrence strikes; None for a fault that strikes no process."""
    struck = plan.faults[fault]
    if not isinstance(struck, Kill | Stop):
        return None
    return draw(plan, "role", fault, occurrence).choice(struck.roles)


def draw(plan: ChaosPlan, purpose: str, fault: int, occurrence: int) -> random.Random:
    """A generator for one use, the same after every restart."""
    return random.Random(seed_for(plan.seed, f"chaos {purpose}", fault, occurrence))


def pick(names: Sequence[int], generator: random.Random) -> int:
    """One of several equal ones, whatever order they came in."""
    return generator.choice(sorted(names))


def _is_moment(when: When) -> None:
    if when.point in MESSAGES:
        raise ValueError(f"when.point: '{when.point}' is a message, which can only be dropped")
