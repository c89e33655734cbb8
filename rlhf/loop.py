"""The loop: every run of every algorithm, on one machine or many, goes through `train`.

It knows no Ray and opens no tensor: groups, batches and weights are handles that it passes from one part to the next.
Synchronous training is asynchronous training with `max_staleness` 0. An algorithm enters through `learner.prepare`
(its credit assignment, in `rlhf/algorithms/<name>.py`) and `learner.update` (its loss, there or in a file that several
share: `bandit`, `clipped`, `preference`)."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from rlhf import metrics
from rlhf.config import LoopConfig
from rlhf.interfaces import Buffer, Learner, Source
from rlhf.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Team:
    """The parts that a run is made of, in one process or as actors."""

    source: Source
    learner: Learner
    buffer: Buffer


class Chronicle(Protocol):
    """Who is told what happened: metrics, evaluations and checkpoints are written by it, when they are due."""

    def step_at(self, step: int, phase: str) -> None:
        """A step has come to a phase: wait, annotate, update, sync."""

    def step_done(self, step: int, measured: Metrics) -> None: ...

    def evaluate_if_due(self, updates: int) -> None: ...

    def checkpoint_if_due(self, updates: int) -> None: ...


def train(team: Team, loop: LoopConfig, chronicle: Chronicle, stop: Callable[[], bool]) -> int:
    """Trains until `loop.num_steps` updates are done or `stop()` says so between two steps; returns the updates so far.

    A step that was taken before (by a process that died) gets the same groups again, out of the buffer.
    """
    source, learner, buffer = team.source, team.learner, team.buffer
    source.sync(learner.publish())
    chronicle.evaluate_if_due(learner.version)
    while learner.version < loop.num_steps and not stop():
        step = learner.version
        clock = Stopwatch(partial(chronicle.step_at, step))
        with clock.measure("wait"):
            groups = source.take(step)
        with clock.measure("annotate"):
            groups = learner.annotate(groups)
        with clock.measure("update"):
            measured = learner.update(learner.prepare(groups))
        with clock.measure("sync"):
            published = learner.publish()
            buffer.commit(step, groups, published.version, published.fingerprint, metrics.values(measured))
            received = source.sync(published)
        chronicle.step_done(
            step, metrics.merge([measured, received, clock.read(), throughput(measured, received, clock)])
        )
        chronicle.checkpoint_if_due(learner.version)
        chronicle.evaluate_if_due(learner.version)
    return learner.version


class Stopwatch:
    """Where the time of one step went, in seconds. `told` hears of each phase as it begins."""

    def __init__(self, told: Callable[[str], None]) -> None:
        self._told = told
        self._started = time.monotonic()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        self._told(phase)
        before = time.monotonic()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.monotonic() - before

    def seconds(self, phase: str) -> float:
        return self._seconds.get(phase, 0.0)

    def read(self) -> Metrics:
        """time/*_s of each phase and of the whole step."""
        readings = {f"time/{phase}_s": metrics.last(seconds) for phase, seconds in self._seconds.items()}
        readings["time/step_s"] = metrics.last(time.monotonic() - self._started)
        return readings


def throughput(measured: Metrics, received: Metrics, clock: Stopwatch) -> Metrics:
    """Tokens trained a second of update, and sampled tokens of the step's groups a second that engines spent sampling.

    With `max_staleness` above 0 the engines' seconds since the last step went into groups of later steps too: then the
    second rate is off in a single step, and right over many.
    """
    rates = {}
    trained, lengths = measured.get("tokens/trained"), measured.get("completion/length_mean")
    sampling_s = received["time/generate_s"].total if "time/generate_s" in received else 0.0
    if trained is not None and clock.seconds("update"):
        rates["tokens/trained_per_s"] = metrics.last(trained.total / clock.seconds("update"))
    if lengths is not None and sampling_s:
        rates["tokens/generated_per_s"] = metrics.last(lengths.total / sampling_s)
    return rates
