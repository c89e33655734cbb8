"""The buffer actor: the one process that writes the ledger, and the driver's view of it."""

from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.actor import ActorHandle

from actors import placement, waiting
from actors.heartbeat import Pulses
from rlhf.buffer.store import ExperienceBuffer
from rlhf.interfaces import Counts, Handle, Lease

BufferActor = ray.remote(ExperienceBuffer)

Call = Callable[[ActorHandle], "ray.ObjectRef[Any]"]


class RemoteBuffer:
    """`Buffer` on Ray: groups and columns come and go as references, only small answers are waited for.

    When the actor dies, another one opens the same file and the call is made again, which changes nothing where it had
    been done: every call is idempotent. Should that one die too, ActorDied rises. hire and dismiss start and end an
    actor; died is told of the death. One that shows no sign of life for lifeless_s counts as dead, and is ended."""

    def __init__(
        self,
        hire: Callable[[], ActorHandle],
        dismiss: Callable[[ActorHandle], None],
        died: Callable[[waiting.KnownActorDied], None],
        timeout_s: float,
        lifeless_s: float,
    ) -> None:
        self._hire, self._dismiss, self._died = hire, dismiss, died
        self._timeout_s = timeout_s
        self._pulses = Pulses(lifeless_s)
        self._actor = self._hired()

    def placed(self) -> int:
        """1 once the actor has found a place."""
        return int(placement.has_place(self._actor))

    def lease(self, count: int, owner: str, request: int) -> list[Lease]:
        what = f"leasing {count} prompts for {owner}"
        return self._ask(lambda actor: actor.lease.remote(count, owner, request), what)

    def add_group(self, prompt_id: int, ticket: int, group: Handle) -> bool:
        what = f"storing the group of prompt {prompt_id}"
        return self._ask(lambda actor: actor.add_group.remote(prompt_id, ticket, group), what)

    def add_columns(self, prompt_id: int, columns: Handle) -> bool:
        what = f"storing columns of prompt {prompt_id}"
        return self._ask(lambda actor: actor.add_columns.remote(prompt_id, columns), what)

    def release(self, prompt_id: int, ticket: int, reason: str, *, counted: bool) -> bool:
        what = f"releasing prompt {prompt_id}"
        return self._ask(lambda actor: actor.release.remote(prompt_id, ticket, reason, counted=counted), what)

    def drop(self, prompt_id: int, reason: str) -> None:
        self._ask(lambda actor: actor.drop.remote(prompt_id, reason), f"dropping prompt {prompt_id}")

    def unjudged(self) -> Mapping[int, frozenset[str]]:
        return self._ask(lambda actor: actor.unjudged.remote(), "listing groups that wait for judges")

    def group(self, prompt_id: int) -> Handle:
        return self._hold(lambda actor: actor.group.remote(prompt_id), f"reading the group of prompt {prompt_id}")

    def ready(self, oldest_version: int) -> int:
        return self._ask(lambda actor: actor.ready.remote(oldest_version), "counting complete groups")

    def take(self, step: int, count: int) -> Handle:
        return self._hold(lambda actor: actor.take.remote(step, count), f"taking the groups of step {step}")

    def assigned(self, step: int) -> bool:
        return self._ask(lambda actor: actor.assigned.remote(step), f"looking for step {step}")

    def commit(self, step: int, groups: Handle, version: int, fingerprint: str, metrics: Mapping[str, float]) -> None:
        arguments = (step, groups, version, fingerprint, metrics)
        self._ask(lambda actor: actor.commit.remote(*arguments), f"committing step {step}")

    def counts(self) -> Counts:
        return self._ask(lambda actor: actor.counts.remote(), "counting")

    def in_flight(self) -> int:
        return self._ask(lambda actor: actor.in_flight.remote(), "counting prompts in flight")

    def open(self) -> None:
        self._ask(lambda actor: actor.open.remote(), "opening the ledger")

    def pin(self, name: str, value: str) -> None:
        self._ask(lambda actor: actor.pin.remote(name, value), f"pinning the {name}")

    def rewind(self, step: int) -> None:
        self._ask(lambda actor: actor.rewind.remote(step), f"rewinding to step {step}")

    def close(self) -> None:
        self._ask(lambda actor: actor.close.remote(), "closing the ledger")

    def _ask(self, call: Call, what: str) -> Any:
        """The answer to a call; made again, once, by another actor when this one is gone."""
        try:
            return self._answer(call, what)
        except waiting.KnownActorDied as died:
            if died.actor_id != self._actor._actor_id.hex():
                raise
            self._died(died)
            self._dismiss(self._actor)
            self._pulses.forget(self._actor)
            self._actor = self._hired()
            self._answer(lambda actor: actor.reopen.remote(), "opening the ledger again")
            return self._answer(call, what)

    def _hold(self, call: Call, what: str) -> Handle:
        """The reference of a value that exists, and so outlives the actor, without fetching it."""
        made: list[Handle] = []

        def call_and_follow(actor: ActorHandle) -> "ray.ObjectRef[Any]":
            made[:] = [call(actor)]
            return actor.in_flight.remote()  # calls are done in order: once this is answered, the value is there

        self._ask(call_and_follow, what)
        return made[0]

    def _answer(self, call: Call, what: str) -> Any:
        named = {"the buffer actor": call(self._actor)}
        return waiting.gather(named, f"buffer: {what}", self._timeout_s, 0.0, self._pulses)[0]

    def _hired(self) -> ActorHandle:
        actor = self._hire()
        self._pulses.follow(actor, "the buffer actor")
        return actor
