"""The one place where the driver waits for actors: with a deadline, and an error that says for whom and for what."""

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from rlhf.errors import ActorDied, DeadlinePassed


def get(refs: Sequence[ray.ObjectRef], what: str, timeout_s: float) -> list[Any]:
    """The values of all references, in their order.

    Raises what the actor raised, with the actor's traceback as a note; DeadlinePassed, naming how many are late;
    ActorDied when an actor is gone."""
    try:
        return list(ray.get(list(refs), timeout=timeout_s))
    except GetTimeoutError as late:
        done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        raise DeadlinePassed(
            f"{what}: {len(refs) - len(done)} of {len(refs)} answers missing after {timeout_s:g} s"
        ) from late
    except RayError as error:
        raise failure_of(error, what) from None


def failure_of(error: RayError, what: str) -> Exception:
    """The exception that was raised inside an actor, with the actor's traceback as a note; ActorDied when the actor, or
    the one that held an argument of the call, is gone."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, Exception) and not isinstance(cause, RayError):
        cause.add_note(f"raised in an actor:\n{error}")
        return cause
    return ActorDied(f"{what}: an actor died: {str(error).strip().splitlines()[0]}")
