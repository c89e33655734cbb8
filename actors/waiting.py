"""The one place where the driver waits for actors: with a deadline, and an error that says for whom and for what."""

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from rlhf.errors import DeadlinePassed, RunFailed


def get(refs: Sequence[ray.ObjectRef], what: str, timeout_s: float) -> list[Any]:
    """The values of all references, in their order.

    Raises what the actor raised, with the actor's traceback as a note; DeadlinePassed, naming how many are late;
    RunFailed when an actor died."""
    try:
        return list(ray.get(list(refs), timeout=timeout_s))
    except GetTimeoutError as late:
        done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        raise DeadlinePassed(
            f"{what}: {len(refs) - len(done)} of {len(refs)} answers missing after {timeout_s:g} s"
        ) from late
    except RayTaskError as error:
        raise cause_of(error) from None
    except RayActorError as error:
        raise RunFailed(f"{what}: the actor died: {error}") from error


def cause_of(error: Exception) -> Exception:
    """The exception that was raised inside an actor, with the actor's traceback as a note; other errors as they are."""
    if not isinstance(error, RayTaskError) or not isinstance(error.cause, Exception):
        return error
    error.cause.add_note(f"raised in an actor:\n{error.traceback_str}")
    return error.cause
