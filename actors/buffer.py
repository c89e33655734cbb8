"""The buffer actor: the one process that writes the ledger, and the driver's view of it."""

from collections.abc import Mapping
from typing import Any

import ray
from ray.actor import ActorHandle

from actors import waiting
from rlhf.buffer.store import ExperienceBuffer
from rlhf.interfaces import Counts, Handle

BufferActor = ray.remote(ExperienceBuffer)


class RemoteBuffer:
    """`Buffer` on Ray: groups and columns come and go as references, only small answers are waited for."""

    def __init__(self, actor: ActorHandle, timeout_s: float) -> None:
        self._actor = actor
        self._timeout_s = timeout_s

    def _ask(self, ref: ray.ObjectRef, what: str) -> Any:
        return waiting.get([ref], f"buffer: {what}", self._timeout_s)[0]

    def lease(self, count: int, owner: str) -> list[int]:
        return self._ask(self._actor.lease.remote(count, owner), f"leasing {count} prompts")

    def add_group(self, prompt_id: int, group: Handle) -> bool:
        return self._ask(self._actor.add_group.remote(prompt_id, group), f"storing the group of prompt {prompt_id}")

    def add_columns(self, prompt_id: int, columns: Handle) -> bool:
        return self._ask(self._actor.add_columns.remote(prompt_id, columns), f"storing columns of prompt {prompt_id}")

    def release(self, prompt_id: int, reason: str) -> bool:
        return self._ask(self._actor.release.remote(prompt_id, reason), f"releasing prompt {prompt_id}")

    def drop(self, prompt_id: int, reason: str) -> None:
        self._ask(self._actor.drop.remote(prompt_id, reason), f"dropping prompt {prompt_id}")

    def unjudged(self) -> Mapping[int, frozenset[str]]:
        return self._ask(self._actor.unjudged.remote(), "listing groups that wait for judges")

    def group(self, prompt_id: int) -> Handle:
        return self._actor.group.remote(prompt_id)

    def ready(self, oldest_version: int) -> int:
        return self._ask(self._actor.ready.remote(oldest_version), "counting complete groups")

    def take(self, step: int, count: int) -> Handle:
        groups: Handle = self._actor.take.remote(step, count)
        self._ask(self._actor.assigned.remote(step), f"taking the groups of step {step}")
        return groups

    def assigned(self, step: int) -> bool:
        return self._ask(self._actor.assigned.remote(step), f"looking for step {step}")

    def commit(self, step: int, groups: Handle, version: int, fingerprint: str, metrics: Mapping[str, float]) -> None:
        self._ask(self._actor.commit.remote(step, groups, version, fingerprint, metrics), f"committing step {step}")

    def counts(self) -> Counts:
        return self._ask(self._actor.counts.remote(), "counting")

    def in_flight(self) -> int:
        return self._ask(self._actor.in_flight.remote(), "counting prompts in flight")

    def open(self) -> None:
        self._ask(self._actor.open.remote(), "opening the ledger")

    def pin(self, name: str, value: str) -> None:
        self._ask(self._actor.pin.remote(name, value), f"pinning the {name}")

    def rewind(self, step: int) -> None:
        self._ask(self._actor.rewind.remote(step), f"rewinding to step {step}")

    def close(self) -> None:
        self._ask(self._actor.close.remote(), "closing the ledger")
