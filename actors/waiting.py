"""The one place where the driver waits for actors: with a deadline, and an error that says for whom and for what.

What it waits for now can be read from another thread (`current`), for `rlhf inspect`."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from actors.heartbeat import Pulses
from rlhf.errors import ActorDied, DeadlinePassed, HandleLost

TICK_S = 1.0
NAMED = 8


class KnownActorDied(ActorDied):
    """An actor is gone, and Ray says which one (hex id)."""

    def __init__(self, message: str, actor_id: str) -> None:
        super().__init__(message)
        self.actor_id = actor_id


@dataclass(frozen=True, slots=True)
class Wait:
    """What the driver waits for: whose answers are late, and since when (seconds since 1970)."""

    what: str
    late: tuple[str, ...]
    since: float

    def describe(self) -> str:
        """What, and up to NAMED of those who are late."""
        names = ", ".join(self.late[:NAMED]) + (" …" if len(self.late) > NAMED else "")
        return f"{self.what} ({names})"


class _Now:
    """The wait that goes on, if any. The driver waits in one thread; a watchdog reads in another."""

    wait: Wait | None = None


def current() -> tuple[str, float] | None:
    """What the driver waits for at this moment, and since when (seconds since 1970)."""
    wait = _Now.wait
    return None if wait is None else (wait.describe(), wait.since)


def gather(
    named: Mapping[str, ray.ObjectRef], what: str, timeout_s: float, peers_s: float, pulses: Pulses | None
) -> list[Any]:
    """The values of all references, in their order; `named` by who is to answer.

    Raises what an actor raised, with the actor's traceback as a note; DeadlinePassed, naming who is late; ActorDied as
    soon as an actor is gone, or one of `pulses` shows no sign of life. Where one answer is a failure, the others have
    peers_s to end too: the death of one rank shows as a broken connection at another one, and is what is raised then.
    """
    began, deadline = time.time(), time.monotonic() + timeout_s
    pending = {ref: name for name, ref in named.items()}
    values: dict[ray.ObjectRef, Any] = {}
    first_failure: Exception | None = None
    try:
        while pending and (left := deadline - time.monotonic()) > 0:
            _Now.wait = Wait(what, tuple(pending.values()), began)
            done, _ = ray.wait(list(pending), num_returns=1, timeout=min(TICK_S, left))
            _check_life(what, pulses)
            for ref in done:
                name = pending.pop(ref)
                try:
                    values[ref] = ray.get(ref, timeout=max(TICK_S, left))
                except GetTimeoutError:
                    pending[ref] = name
                except RayError as error:
                    failure = failure_of(error, f"{what} ({name})")
                    if isinstance(failure, ActorDied):
                        raise failure from None
                    if first_failure is None:
                        first_failure, deadline = failure, min(deadline, time.monotonic() + peers_s)
    finally:
        _Now.wait = None
    if first_failure is not None:
        raise first_failure
    if pending:
        late = Wait(what, tuple(pending.values()), began)
        raise DeadlinePassed(f"{late.describe()}: {len(pending)} of {len(named)} answers missing after {timeout_s:g} s")
    return [values[ref] for ref in named.values()]


def _check_life(what: str, pulses: Pulses | None) -> None:
    silent = pulses.silent() if pulses is not None else []
    if silent:
        raise KnownActorDied(f"{what}: {silent[0].describe()}", silent[0].actor_id)


def get(refs: Sequence[ray.ObjectRef], what: str, timeout_s: float) -> list[Any]:
    """`gather` for references whose senders `what` names."""
    return gather({f"answer {number}": ref for number, ref in enumerate(refs, start=1)}, what, timeout_s, 0.0, None)


def failure_of(error: RayError, what: str) -> Exception:
    """The exception that was raised inside an actor, with the actor's traceback as a note; ActorDied when the actor, or
    the one that held an argument of the call, is gone."""
    cause: BaseException = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    if isinstance(cause, Exception) and not isinstance(cause, RayError):
        cause.add_note(f"raised in an actor:\n{error}")
        return cause
    message = f"{what}: an actor died: {str(error).strip().splitlines()[0]}"
    if isinstance(cause, ObjectLostError):
        return HandleLost(message)
    if isinstance(cause, RayActorError) and cause.actor_id:
        return KnownActorDied(message, cause.actor_id)
    return ActorDied(message)
