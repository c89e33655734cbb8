"""The rollout actor: hosts a generator (vLLM or transformers), which knows nothing of Ray."""

import time
from collections.abc import Iterator
from typing import Any

import ray

from rlhf.config import RunConfig
from rlhf.generation.build import build_generator
from rlhf.interfaces import Request
from rlhf.weights import Receipt, Weights


class Rollout:
    """One rollout engine: pulls weights, answers requests, yields each group as soon as it is finished."""

    def __init__(self, config: RunConfig, name: str) -> None:
        self._generator = build_generator(config, name)

    def setup(self) -> None:
        self._generator.setup()

    def load(self, weights: Weights) -> Receipt:
        return self._generator.load(weights)

    def work(self, request: Request) -> Iterator[Any]:
        """For each group: (prompt id, seconds since the last one), then the group."""
        before = time.monotonic()
        groups = self._generator.generate(
            request.prompts, request.sampling, request.samples_per_prompt, request.purpose
        )
        for group in groups:
            now = time.monotonic()
            yield group.prompt.id, now - before
            yield group
            before = time.monotonic()

    def close(self) -> None:
        self._generator.close()


RolloutActor = ray.remote(Rollout)
