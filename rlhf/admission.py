"""How much may be sampled ahead of the learner: the demand of a run, the rule of admission, the idle time it costs.

Used by the source of a run and by the simulated pool alike. Imports neither torch nor ray.
"""

from dataclasses import dataclass
from typing import Protocol

from rlhf.experience import Prompt, Sampling


class PromptSupply(Protocol):
    """The prompts of a run: the same prompt for the same id, in every process and after every restart."""

    def prompt(self, prompt_id: int) -> Prompt: ...


@dataclass(frozen=True, slots=True)
class Demand:
    """How much is sampled, and how far ahead of the learner; groups_per_step x samples_per_prompt samples a step."""

    groups_per_step: int
    num_steps: int
    max_staleness: int
    samples_per_prompt: int
    sampling: Sampling
    wait_timeout_s: float


def admissible(demand: Demand, version: int, accepted: int, in_flight: int) -> int:
    """How many more prompts may be started at policy version v, with B groups a step.

        min(max_staleness + v + 1, num_steps) * B - (accepted + in flight)                      arXiv 2505.24298, Eq 3

    accepted counts the groups of steps that were taken; a dropped group is in neither number, so filtering cannot
    starve admission. Bounds the work in flight, not the age of a sample: `Buffer.ready` sweeps by age."""
    steps_ahead = min(demand.max_staleness + version + 1, demand.num_steps)
    return max(0, steps_ahead * demand.groups_per_step - accepted - in_flight)


class IdleClock:
    """How long engines sampled nothing: for want of prompts, of room under `max_staleness`, or of new weights."""

    def __init__(self) -> None:
        self._last_read: float | None = None
        self._ahead_s = 0.0

    def read(self, now: float, engines: int, busy_s: float) -> float:
        """Engine seconds since the last reading that were not spent on what was handed in since then; first: 0.

        Work is booked when it is handed in, so long work is too much for its last interval: the excess is taken off
        the next ones, and the sum over readings is right.
        """
        elapsed_s = 0.0 if self._last_read is None else now - self._last_read
        spare_s = engines * elapsed_s - busy_s - self._ahead_s
        self._last_read, self._ahead_s = now, max(0.0, -spare_s)
        return max(0.0, spare_s)
