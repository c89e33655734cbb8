"""How long a step takes with any number of engines, at any `max_staleness`: the real loop, source and admission in
virtual time.

    mean step time >= max(update, (longest + update) / (k + 1))          k = max_staleness

where longest is the mean over steps of the time of the longest group of the step on an engine of its own: a group that
is trained in step v was begun after version v - k was published, so the k + 1 steps up to v take at least as long as it
does. With k = 0 no number of engines is faster than the longest sequence; this is what staleness buys.

Knows nothing of models: an engine is a few costs (`EngineCost`), the work a distribution of lengths (`Workload`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlhf import metrics
from rlhf.admission import Demand
from rlhf.config import LoopConfig
from rlhf.experience import Prompt, Sampling
from rlhf.interfaces import Handle, Published
from rlhf.loop import Team, train
from rlhf.metrics import Metrics
from rlhf.seeding import seed_for
from rlhf.simulation.engines import EngineCost, Lengths, SimulatedEngines, SimulatedJudge, Timeline, finish_times
from rlhf.simulation.memory import MemoryBuffer, Versioned
from rlhf.sources import JudgeDesk, PolicySource
from rlhf.weights import Probe, Weights

JUDGED = frozenset({"reward"})
SILENCE_S = 10.0  # of real time: a simulation in which nothing can happen any more ends with the source's error


@dataclass(frozen=True, slots=True)
class Workload:
    """What one step asks for, and how long answers are: log-normal, cut at max_new_tokens.

    log_sigma is the standard deviation of the logarithm of the length: 0 for equal lengths, 1 for a long tail.
    """

    groups_per_step: int
    samples_per_prompt: int
    prompt_tokens: int
    median_tokens: float
    log_sigma: float
    max_new_tokens: int
    seed: int

    def lengths(self, prompt_id: int) -> tuple[int, ...]:
        """The tokens of each sample of a prompt: addressed by its id, so the same in every pool."""
        random = np.random.Generator(np.random.PCG64(seed_for(self.seed, "length", prompt_id)))
        drawn = np.exp(math.log(self.median_tokens) + self.log_sigma * random.standard_normal(self.samples_per_prompt))
        return tuple(int(n) for n in np.clip(np.ceil(drawn), 1, self.max_new_tokens))


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of the rest of a step: an update, what is between update and the engines' loading, a judged group, the
    log-probabilities that are computed before an update, and storing one group or one judgement, in which the run does
    nothing else."""

    update_s: float
    publish_s: float
    judge_group_s: float
    annotate_s: float
    store_s: float


class SimulatedStep(NamedTuple):
    """One step: its length, the wait for groups in it, the oldest and the mean age of its groups, and the time that its
    longest group takes on an engine of its own."""

    step_s: float
    wait_s: float
    staleness_max: int
    staleness_mean: float
    longest_s: float


class Simulation(NamedTuple):
    """A simulated run. busy_fraction, the share of the engines' time in which they sampled; discarded, groups that were
    swept out for their age."""

    steps: tuple[SimulatedStep, ...]
    busy_fraction: float
    discarded: int

    def settled(self, first: int, last: int) -> "Simulation":
        """Without the first steps, in which the pool fills up, and the last, for which nothing new is sampled."""
        return self._replace(steps=self.steps[first : len(self.steps) - last])

    @property
    def mean_step_s(self) -> float:
        return math.fsum(step.step_s for step in self.steps) / len(self.steps)

    @property
    def mean_longest_s(self) -> float:
        return math.fsum(step.longest_s for step in self.steps) / len(self.steps)


def longest_bound(mean_longest_s: float, update_s: float, max_staleness: int) -> float:
    """No mean step time is below this, whatever the number of engines, in seconds; see the head of this module."""
    return max(update_s, (mean_longest_s + update_s) / (max_staleness + 1))


def simulate(
    engines: int,
    max_staleness: int,
    num_steps: int,
    workload: Workload,
    cost: EngineCost,
    rest: StepCost,
    *,
    learner_waits: bool,
) -> Simulation:
    """A run of `num_steps` steps by the real loop and source. Deterministic in its arguments.

    learner_waits, whether a step ends when every engine holds the new weights, as in the real pool.
    """
    lengths = lru_cache(maxsize=None)(workload.lengths)
    return simulate_lengths(
        engines, max_staleness, num_steps, workload, lengths, cost, rest, learner_waits=learner_waits
    )


def simulate_lengths(
    engines: int,
    max_staleness: int,
    num_steps: int,
    workload: Workload,
    lengths: Lengths,
    cost: EngineCost,
    rest: StepCost,
    *,
    learner_waits: bool,
) -> Simulation:
    """The same where the lengths are known (of a run that was measured) instead of drawn."""
    timeline = Timeline()
    buffer = _TimedBuffer(timeline, rest.store_s)
    pool = SimulatedEngines(timeline, engines, cost, lengths, _SimulatedGroup, learner_waits=learner_waits)
    judge = SimulatedJudge(timeline, rest.judge_group_s, _judged)
    demand = Demand(
        groups_per_step=workload.groups_per_step,
        num_steps=num_steps,
        max_staleness=max_staleness,
        samples_per_prompt=workload.samples_per_prompt,
        sampling=Sampling(1.0, 1.0, 0, workload.max_new_tokens),
        wait_timeout_s=SILENCE_S,
    )
    desks = [JudgeDesk("reward", JUDGED, False, judge)]
    source = PolicySource(demand, _Supply(workload.prompt_tokens), buffer, pool, desks, _never)
    learner = _TimedLearner(timeline, rest)
    alone = _Alone(cost, workload.prompt_tokens)
    record = _Record(timeline, learner, alone)
    loop = LoopConfig(num_steps=num_steps, groups_per_step=workload.groups_per_step, max_staleness=max_staleness)
    train(Team(source, learner, buffer), loop, record, _never)
    return Simulation(tuple(record.steps), pool.busy_s / (engines * timeline.now_s), buffer.discarded)


class _SimulatedGroup:
    """What is left of a group: whose it is, how long its samples are, which version drew it."""

    __slots__ = ("lengths", "policy_version", "prompt_id")

    def __init__(self, prompt: Prompt, lengths: Sequence[int], version: int) -> None:
        self.prompt_id, self.lengths, self.policy_version = prompt.id, lengths, version


class _Verdict(NamedTuple):
    names: frozenset[str]


def _judged(group: _SimulatedGroup) -> _Verdict:
    return _Verdict(JUDGED)


def _never() -> bool:
    return False


class _Supply:
    """Prompts of one length without content."""

    def __init__(self, tokens: int) -> None:
        self._ids = np.zeros(tokens, dtype=np.int32)

    def prompt(self, prompt_id: int) -> Prompt:
        return Prompt(prompt_id, prompt_id, 0, "", "", self._ids, {})


class _Alone(NamedTuple):
    """Engine and prompt of a group that has an engine of its own."""

    cost: EngineCost
    prompt_tokens: int

    def seconds(self, lengths: Sequence[int]) -> float:
        return finish_times(self.cost, [lengths], [self.prompt_tokens])[0]


class _TimedBuffer(MemoryBuffer):
    """Takes its time to store something."""

    def __init__(self, timeline: Timeline, store_s: float) -> None:
        super().__init__(JUDGED)
        self._timeline, self._store_s = timeline, store_s

    def add_group(self, prompt_id: int, ticket: int, group: Versioned) -> bool:
        self._timeline.pass_for(self._store_s)
        return super().add_group(prompt_id, ticket, group)

    def add_columns(self, prompt_id: int, columns: Handle) -> bool:
        self._timeline.pass_for(self._store_s)
        return super().add_columns(prompt_id, columns)


class _TimedLearner:
    """Trains nothing, takes its time."""

    def __init__(self, timeline: Timeline, rest: StepCost) -> None:
        self._timeline, self._rest = timeline, rest
        self._version = 0
        self.taken_at_s = 0.0
        self.groups: list[_SimulatedGroup] = []

    @property
    def version(self) -> int:
        return self._version

    def annotate(self, groups: list[_SimulatedGroup]) -> list[_SimulatedGroup]:
        self.taken_at_s, self.groups = self._timeline.now_s, groups
        self._timeline.pass_for(self._rest.annotate_s)
        return groups

    def prepare(self, groups: list[_SimulatedGroup]) -> list[_SimulatedGroup]:
        return groups

    def update(self, batch: list[_SimulatedGroup]) -> Metrics:
        self._timeline.pass_for(self._rest.update_s)
        self._version += 1
        return {"tokens/trained": metrics.total(sum(sum(group.lengths) for group in batch))}

    def evaluate(self, groups: list[_SimulatedGroup]) -> Metrics:
        return {}

    def save(self, folder: Path) -> None:
        """There is nothing to save."""

    def load(self, folder: Path | None) -> None:
        """There is nothing to go on from."""

    def notice(self) -> bool:
        return False

    def move(self, folder: Path) -> bool:
        return False

    def publish(self) -> Published:
        if self._version:
            self._timeline.pass_for(self._rest.publish_s)
        fingerprint = str(self._version)
        probe = Probe(np.zeros(2, dtype=np.int32), np.zeros(1, dtype=np.float32))
        return Published(self._version, fingerprint, 0, Weights(self._version, fingerprint, {}, probe, life=0))


class _Record:
    """Writes down each step."""

    def __init__(self, timeline: Timeline, learner: _TimedLearner, alone: _Alone) -> None:
        self._timeline, self._learner, self._alone = timeline, learner, alone
        self._began_s = 0.0
        self.steps: list[SimulatedStep] = []

    def step_at(self, step: int, phase: str) -> None:
        """The timeline knows where a step is."""

    def step_done(self, step: int, measured: Metrics) -> None:
        ages = [step - group.policy_version for group in self._learner.groups]
        longest_s = max(self._alone.seconds(group.lengths) for group in self._learner.groups)
        now_s = self._timeline.now_s
        wait_s = self._learner.taken_at_s - self._began_s
        self.steps.append(SimulatedStep(now_s - self._began_s, wait_s, max(ages), sum(ages) / len(ages), longest_s))
        self._began_s = now_s

    def evaluate_if_due(self, updates: int) -> None:
        """Nothing is evaluated."""

    def checkpoint_if_due(self, updates: int) -> None:
        """Nothing is saved."""
