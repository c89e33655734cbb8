"""The buffer's rules without a file, for simulations: who is leased, complete, taken, trained. Nothing is durable.

A test holds it against `rlhf.buffer.store.ExperienceBuffer`, move by move.
"""

import heapq
import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol

from rlhf.errors import RunFailed
from rlhf.interfaces import Counts, Handle, Lease


class Versioned(Protocol):
    """A group, as far as the buffer looks into it."""

    @property
    def policy_version(self) -> int | None: ...


class MemoryBuffer:
    """One lease a prompt, one answer a lease; no limit on attempts, prompt ids without end, and no way back."""

    def __init__(self, required_columns: frozenset[str]) -> None:
        self._required = required_columns
        self._issued = 0
        self._pending: set[int] = set()
        self._leased: set[int] = set()
        self._tickets = itertools.count(1)
        self._ticket: dict[int, int] = {}  # of the last lease of a prompt
        self._missing: dict[int, frozenset[str]] = {}  # of stored groups that are not complete
        self._groups: dict[int, Versioned] = {}
        self._complete: dict[int, int | None] = {}  # not taken by a step: prompt id -> version
        self._steps: dict[int, list[int]] = {}
        self._committed: set[int] = set()
        self._dropped: dict[int, str] = {}
        self._by_age: list[tuple[int, int]] = []  # version and prompt id of what was complete, oldest first
        self.discarded = 0  # groups that were swept out for their age

    def lease(self, count: int, owner: str, request: int) -> list[Lease]:
        again = sorted(self._pending)[:count]
        fresh = list(range(self._issued, self._issued + count - len(again)))
        self._issued += len(fresh)
        self._pending.difference_update(again)
        leases = [Lease(prompt_id, next(self._tickets), 0) for prompt_id in again + fresh]
        self._leased.update(lease.prompt_id for lease in leases)
        self._ticket.update((lease.prompt_id, lease.ticket) for lease in leases)
        return leases

    def add_group(self, prompt_id: int, ticket: int, group: Versioned) -> bool:
        if self._ticket.get(prompt_id) != ticket or prompt_id in self._dropped:
            return False
        if prompt_id not in self._leased or prompt_id in self._groups:
            return self._groups.get(prompt_id) is group
        self._groups[prompt_id] = group
        self._missing[prompt_id] = self._required
        self._complete_if_whole(prompt_id)
        return True

    def add_columns(self, prompt_id: int, columns: Handle) -> bool:
        if prompt_id not in self._missing:
            return False
        self._missing[prompt_id] -= columns.names
        self._complete_if_whole(prompt_id)
        return True

    def release(self, prompt_id: int, ticket: int, reason: str, *, counted: bool) -> bool:
        leased = prompt_id in self._leased and self._ticket[prompt_id] == ticket
        if leased and prompt_id not in self._groups:
            self._leased.remove(prompt_id)
            self._pending.add(prompt_id)
        return prompt_id not in self._dropped

    def drop(self, prompt_id: int, reason: str) -> None:
        if any(prompt_id in ids for ids in self._steps.values()):
            raise RunFailed(f"prompt {prompt_id} cannot be dropped ({reason}): it belongs to a step")
        self._pending.discard(prompt_id)
        self._leased.discard(prompt_id)
        self._missing.pop(prompt_id, None)
        self._complete.pop(prompt_id, None)
        self._dropped.setdefault(prompt_id, reason)

    def unjudged(self) -> Mapping[int, frozenset[str]]:
        return dict(sorted(self._missing.items()))

    def group(self, prompt_id: int) -> Handle:
        return self._groups[prompt_id]

    def ready(self, oldest_version: int) -> int:
        while self._by_age and self._by_age[0][0] < oldest_version:
            version, prompt_id = heapq.heappop(self._by_age)
            if self._complete.get(prompt_id) == version:  # not taken or dropped since
                del self._complete[prompt_id], self._groups[prompt_id]
                self._pending.add(prompt_id)
                self.discarded += 1
        return len(self._complete)

    def take(self, step: int, count: int) -> list[Versioned]:
        if step not in self._steps:
            ids = sorted(self._complete)[:count]
            if len(ids) < count:
                raise RunFailed(f"step {step} needs {count} complete groups, {len(ids)} are there")
            self._steps[step] = ids
            for prompt_id in ids:
                del self._complete[prompt_id]
        return [self._groups[prompt_id] for prompt_id in self._steps[step]]

    def assigned(self, step: int) -> bool:
        return step in self._steps

    def commit(
        self, step: int, groups: Sequence[Handle], version: int, fingerprint: str, metrics: Mapping[str, float]
    ) -> None:
        self._committed.add(step)
        for prompt_id in self._steps[step]:
            self._groups.pop(prompt_id, None)

    def rewind(self, step: int) -> None:
        if self._committed and step <= max(self._committed):
            raise RunFailed(f"a simulated run has no checkpoint before step {step} to go back to")

    def counts(self) -> Counts:
        trained = sum(len(ids) for step, ids in self._steps.items() if step in self._committed)
        taken = sum(len(ids) for step, ids in self._steps.items() if step not in self._committed)
        return Counts(
            issued=self._issued,
            pending=len(self._pending),
            leased=len(self._leased),
            generated=len(self._missing),
            complete=len(self._complete) + taken,
            trained=trained,
            dropped=len(self._dropped),
            lost=0,
            duplicated=0,
        )

    def in_flight(self) -> int:
        return len(self._leased) + len(self._complete)

    def _complete_if_whole(self, prompt_id: int) -> None:
        if not self._missing[prompt_id]:
            del self._missing[prompt_id]
            self._leased.remove(prompt_id)
            version = self._groups[prompt_id].policy_version
            self._complete[prompt_id] = version
            if version is not None:
                heapq.heappush(self._by_age, (version, prompt_id))
