"""The rollout actor: hosts a generator (vLLM or transformers), which knows nothing of Ray."""

import time
from collections.abc import Iterator
from typing import Any

import ray

from actors.worker import Place, place_of_this_actor
from rlhf.config import RunConfig
from rlhf.generation.build import build_generator
from rlhf.interfaces import Request
from rlhf.weights import Receipt, Weights

MARK_EVERY_S = 1.0


class Rollout:
    """One rollout engine: pulls weights, answers requests, yields each group as soon as it is finished."""

    def __init__(self, config: RunConfig, name: str) -> None:
        self._generator = build_generator(config, name)

    def where(self) -> Place:
        return place_of_this_actor()

    def setup(self) -> None:
        self._generator.setup()

    def load(self, weights: Weights) -> Receipt:
        return self._generator.load(weights)

    def work(self, request: Request) -> Iterator[Any]:
        """For each group: the group, then (prompt id, seconds since the last one). None and None, at the start and
        every second or so in which the engine advanced: a mark."""
        yield None
        yield None
        before = marked = time.monotonic()
        for group in self._generator.steps(
            request.prompts, request.sampling, request.samples_per_prompt, request.purpose
        ):
            now = time.monotonic()
            if group is not None:
                yield group
                yield group.prompt.id, now - before
                before = marked = now
            elif now - marked >= MARK_EVERY_S:
                yield None
                yield None
                marked = now

    def close(self) -> None:
        self._generator.close()


RolloutActor = ray.remote(Rollout)
