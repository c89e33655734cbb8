"""One worker of a pool: an actor from being asked for to its end, and what it holds on the way.

    asked -> starting -> setting up -> (no weights yet -> loading ->) ready -> leaving or lost

Where it takes turns on its GPU (actors/turn_taking.py) it may wait with its set-up, and is asleep between two turns.

The actor has `where`, `setup` and `work`, and where its pool is given weights `load`; where that may come in the middle
of a task, `work` ends after a while and `go_on` yields the rest. `work` yields pairs: a value,
then (prompt id, seconds); or None and None, a mark: it has begun, or it has advanced. The driver fetches the second of
a pair only and passes the reference of the first on, so that a group never travels through the driver. The value goes
first because Ray puts the error of a death wherever the next item would be: a pair that is whole holds no error."""

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from rlhf.cluster import Role
from rlhf.errors import RunFailed
from rlhf.interfaces import Published, Task
from rlhf.workers import held

Phase = Literal[
    "asked",
    "starting",
    "waiting its turn",
    "setting up",
    "without weights",
    "loading",
    "ready",
    "falling asleep",
    "asleep",
    "waking",
]
COMING_UP: tuple[Phase, ...] = ("asked", "starting", "setting up", "loading", "falling asleep", "waking")
NAMED = 8  # prompts in a message
HEADER_TIMEOUT_S = 60.0  # two numbers that Ray has said are there


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """A role's pool in plain values. `needed` of `size` workers must be up for the run to start, the others are asked
    for then; `resources` says what each takes; `mid_task`, whether weights are taken in the middle of a task;
    `silence_s` is how long one that holds work may not advance, `lifeless_s` how long one may show no sign of life,
    whatever it is at; `idle_release_s`, how long one that is not needed may be without work; `takes_turns`, whether
    they share their GPUs with the trainer."""

    role: str
    size: int
    needed: int
    takes_weights: bool
    mid_task: bool
    resources: Role
    silence_s: float
    lifeless_s: float
    wait_timeout_s: float
    placement_timeout_s: float
    max_restarts: int
    idle_release_s: float
    takes_turns: bool

    @property
    def in_slices(self) -> bool:
        """Whether a task is done in slices, so that something else can come between two of them."""
        return self.mid_task or (self.takes_weights and self.takes_turns)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an actor runs."""

    node_id: str
    host: str
    pid: int
    actor_id: str


def worker_name(role: str, slot: int, lives: int) -> str:
    """How messages call the worker of a slot after so many lives of it."""
    return f"{role}-{slot}" + (f".{lives}" if lives else "")


def slot_of(name: str) -> int:
    """The slot of a worker by its name."""
    return int(name.rpartition("-")[2].partition(".")[0])


def place_of_this_actor() -> Place:
    """Asked inside an actor."""
    context = ray.get_runtime_context()
    return Place(context.get_node_id(), socket.gethostname(), os.getpid(), str(context.get_actor_id()))


@dataclass(slots=True)
class Errand:
    """A task on a worker: its stream of pairs, whether the worker has begun it, and the prompts that have not come."""

    task: Task
    bound: bool  # handed to this worker by name, so that no other may have it
    stream: ray.ObjectRefGenerator
    missing: set[int]
    since: float
    version: int | None
    go_on: "Callable[[], ray.ObjectRefGenerator] | None" = None  # the stream of the rest, where one ends early
    begun: bool = False
    value: "ray.ObjectRef[Any] | None" = None

    @property
    def named(self) -> str:
        """The prompts that are still to come, the first of them, for messages."""
        return ", ".join(map(str, sorted(self.missing)[:NAMED])) + (" …" if len(self.missing) > NAMED else "")

    def pairs(self) -> Iterator[tuple["ray.ObjectRef[Any]", tuple[int, float] | None]]:
        """The pairs that have come; raises the RayError that ended the task, RunFailed when it ended too early."""
        while self.missing:
            ready, _ = ray.wait([self.stream], timeout=0, fetch_local=False)
            if not ready:
                return
            ref = next(self.stream, None)
            if ref is None:
                if self.value is not None:
                    ray.get(self.value, timeout=HEADER_TIMEOUT_S)  # not a value but what ended the task: raises
                if self.go_on is not None:
                    self.stream = self.go_on()
                    return
                raise RunFailed(f"ended its work without an answer to prompts {self.named}")
            if self.value is None:
                self.value = ref
                continue
            header = ray.get(ref, timeout=HEADER_TIMEOUT_S)
            value, self.value = self.value, None
            self.begun = True
            yield value, header


@dataclass(slots=True)
class Worker:
    """An actor and what the pool knows of it. `sign` is when it last showed that it advances (monotonic, seconds)."""

    slot: int
    name: str
    actor: ActorHandle
    awaited: "ray.ObjectRef[Any]"  # what the phase waits for
    since: float  # of the phase
    sign: float
    phase: Phase = "asked"
    place: Place | None = None
    loading: Published | None = None
    version: int | None = None
    leaving: bool = False
    joined: bool = False
    errands: deque[Errand] = field(default_factory=deque)

    @property
    def is_free(self) -> bool:
        return self.phase == "ready" and not self.leaving and not self.errands

    @property
    def comes_up(self) -> bool:
        """Whether it waits for the answer that brings it to the next phase."""
        return self.phase in COMING_UP

    @property
    def whereabouts(self) -> str:
        return "an unknown place" if self.place is None else f"{self.place.host}, process {self.place.pid}"

    def holding(self, now: float) -> list[str]:
        """Who holds what, a line a task."""
        silent_s = now - self.sign
        return [
            f"{held(self.name, errand.missing, errand.version, now - errand.since)}, last sign {silent_s:.0f} s ago"
            for errand in self.errands
        ]

    def enter(self, phase: Phase, awaited: "ray.ObjectRef[Any]") -> None:
        self.phase, self.awaited = phase, awaited
        self.since = self.sign = time.monotonic()

    def why_hung(self, now: float, lifeless_s: float, silence_s: float, wait_timeout_s: float) -> str | None:
        """Why it is to be ended: it shows no sign of life (lifeless_s is not 0), it holds work and does not advance, or
        it is not up after too long. One that loads large weights shows life, and may take as long as any other wait."""
        if lifeless_s:
            doing = "at work" if self.errands else self.phase
            return f"was {doing} and showed no sign of life for {lifeless_s:.0f} s, stopped or cut off"
        if self.errands and now - self.sign > silence_s:
            return f"did not advance for {now - self.sign:.0f} s"
        limited = self.phase in COMING_UP and self.phase != "asked" and not self.errands
        if limited and now - max(self.since, self.sign) > wait_timeout_s:
            return f"was {self.phase} for {now - self.since:.0f} s"
        return None

    def start(self, task: Task, *, bound: bool, in_slices: bool) -> None:
        now = time.monotonic()
        if not self.errands:
            self.sign = now
        stream: ray.ObjectRefGenerator = self.actor.work.options(num_returns="streaming").remote(task.payload)
        go_on = self.actor.go_on.options(num_returns="streaming").remote if in_slices else None
        self.errands.append(Errand(task, bound, stream, set(task.prompt_ids), now, self.version, go_on))

    def died_by(self, error: RayError) -> bool:
        """Whether an error is the death of this very actor, and not of the holder of an argument or a raised one."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        if not isinstance(cause, RayActorError) or cause.actor_init_failed:
            return False
        return self.place is None or cause.actor_id in (None, self.place.actor_id)


def is_unreachable(error: RayError) -> bool:
    """Whether Ray only knows that an actor does not answer: its node may be gone, and no prompt is to blame."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return isinstance(cause, ActorUnavailableError)


def cause_of_death(error: RayError) -> str:
    """What Ray says of a death, in a line: its last one has the cause."""
    return str(error).strip().splitlines()[-1][:300]
