"""The rollout actor: hosts a generator (vLLM or transformers), which knows nothing of Ray."""

import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from actors.worker import Place, place_of_this_actor
from rlhf.config import RunConfig
from rlhf.errors import EngineLost, RunFailed
from rlhf.generation.build import build_generator, build_sleeper
from rlhf.generation.engine import StepwiseGroups
from rlhf.interfaces import Request
from rlhf.weights import Receipt, Weights

MARK_EVERY_S = 1.0
SLICE_S = 1.0  # how long new weights may have to wait, where they are taken between two tokens


class Rollout:
    """One rollout engine: pulls weights, answers requests, yields each group as soon as it is finished.

    With generation.weights_mid_sequence it works in slices: `work` and `go_on` return with samples in flight, so that
    a `load` that was asked for meanwhile comes between two of them. So it does where it takes turns on its GPU, for
    `sleep`, which ends them."""

    def __init__(self, config: RunConfig, name: str, tensor_parallel: int, takes_turns: bool) -> None:
        build = build_sleeper if takes_turns else build_generator
        self._generator = build(config, name, tensor_parallel)
        assert config.generation is not None  # the settings refuse a run that samples without it
        self._slice_s = SLICE_S if takes_turns or config.generation.weights_mid_sequence else math.inf
        self._steps: StepwiseGroups | None = None
        self._before = 0.0

    def where(self) -> Place:
        return place_of_this_actor()

    def setup(self) -> None:
        with dies_with_its_engine():
            self._generator.setup()

    def load(self, weights: Weights) -> Receipt:
        with dies_with_its_engine():
            return self._generator.load(weights)

    def sleep(self) -> None:
        """Gives up what it was at, and its GPU, until the next `load`."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None
        self._generator.sleep()

    def work(self, request: Request) -> Iterator[Any]:
        """For each group: the group, then (prompt id, seconds since the last one). None and None, at the start and
        every second or so in which the engine advanced: a mark. May end before the last group: see `go_on`."""
        if self._steps is not None:
            self._steps.close()
        self._before = time.monotonic()
        self._steps = self._generator.steps(
            request.prompts, request.sampling, request.samples_per_prompt, request.purpose
        )
        yield from self._slice(self._steps)

    def go_on(self) -> Iterator[Any]:
        """More of what the last `work` did not come to."""
        if self._steps is None:
            raise RunFailed("asked to go on, and nothing was begun")
        yield from self._slice(self._steps)

    def _slice(self, steps: StepwiseGroups) -> Iterator[Any]:
        yield None
        yield None
        began = marked = time.monotonic()
        with dies_with_its_engine():
            for group in steps:
                now = time.monotonic()
                if group is not None:
                    yield group
                    yield group.prompt.id, now - self._before
                    self._before = marked = now
                elif now - began >= self._slice_s:
                    return
                elif now - marked >= MARK_EVERY_S:
                    yield None
                    yield None
                    marked = now

    def close(self) -> None:
        self._generator.close()


@contextmanager
def dies_with_its_engine() -> Iterator[None]:
    """Ends this process when the engine has lost one of its own: to the driver it is an engine that died, as one of a
    single process would have, and is replaced as such."""
    try:
        yield
    except EngineLost:
        logging.getLogger(__name__).exception("the engine cannot go on: its actor ends")
        os.kill(os.getpid(), signal.SIGKILL)


RolloutActor = ray.remote(Rollout)
