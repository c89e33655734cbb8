"""Signs of life: a thread in each actor says once a second that its process runs; the driver hears which have stopped.

A process that is stopped, or whose machine is cut off, says nothing. One that loads large weights or computes for
minutes goes on saying it, because the thread needs a moment of the interpreter and nothing else. So silence is told
from slowness, whatever an actor is at. An actor that runs and never finishes is not seen here: deadlines are for that.

The signs go through the key-value store of Ray's head node, not through calls to the actor, which would wait behind
the arguments of earlier calls, such as weights that are still on their way."""

import contextlib
import itertools
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle
from ray.exceptions import RpcError
from ray.experimental import internal_kv

NAMESPACE = b"ray-rlhf signs of life"
EVERY_S = 1.0
LOOKED_AWAY_S = 5.0  # a longer pause between two looks was the listener's own, and is held against nobody
LOOK_TIMEOUT_S = 30.0


def begin(actor: object) -> None:
    """Run inside an actor: gives the first sign, so that whatever is asked of it afterwards is watched over, and starts
    its thread."""
    key = ray.get_runtime_context().get_actor_id()
    assert key is not None  # no driver calls this
    _sign(key.encode(), 0)
    threading.Thread(target=_say_so, args=(key.encode(),), name="signs of life", daemon=True).start()


def _say_so(key: bytes) -> None:
    for count in itertools.count(start=1):
        time.sleep(EVERY_S)
        _sign(key, count)


def _sign(key: bytes, count: int) -> None:
    with contextlib.suppress(RpcError):  # the head node cannot be reached: the next sign may get through
        internal_kv._internal_kv_put(key, str(count).encode(), overwrite=True, namespace=NAMESPACE)


@dataclass(slots=True)
class _Heard:
    """The last sign of an actor, and how long it has been the last one while somebody listened."""

    name: str
    sign: bytes | None
    silent_s: float


@dataclass(frozen=True, slots=True)
class Silent:
    """An actor that has shown no sign of life for too long."""

    name: str
    actor_id: str
    seconds: float

    def describe(self) -> str:
        return f"{self.name} has shown no sign of life for {self.seconds:.0f} s: its process is stopped or cut off"


class Pulses:
    """The signs of life of some actors. Not thread safe.

    Silence counts from an actor's first sign, hence after its constructor, and only while somebody looks."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._heard: dict[str, _Heard] = {}
        self._looked = time.monotonic()

    def follow(self, actor: ActorHandle, name: str) -> None:
        """To be called before anything else is asked of the actor."""
        actor.__ray_call__.remote(begin)
        self._heard[actor._actor_id.hex()] = _Heard(name, None, 0.0)

    def forget(self, actor: ActorHandle) -> None:
        self._heard.pop(actor._actor_id.hex(), None)
        with contextlib.suppress(RpcError):  # a key that stays takes a hundred bytes
            internal_kv._internal_kv_del(actor._actor_id.hex(), namespace=NAMESPACE)

    def silent(self) -> list[Silent]:
        """Those of whom nothing was heard for longer than limit_s. Looks at most once in EVERY_S."""
        now = time.monotonic()
        passed = now - self._looked
        if passed < EVERY_S or not self._heard:
            return []
        try:
            signs = _signs(list(self._heard))
        except RpcError:  # who cannot look has heard nothing against anybody
            return []
        self._looked = now
        for actor_id, heard in self._heard.items():
            sign = signs.get(actor_id.encode())
            if sign != heard.sign or sign is None or passed > LOOKED_AWAY_S:
                heard.sign, heard.silent_s = sign, 0.0
            else:
                heard.silent_s += passed
        return [
            Silent(heard.name, actor_id, heard.silent_s)
            for actor_id, heard in self._heard.items()
            if heard.silent_s > self._limit_s
        ]


def _signs(actor_ids: list[str]) -> Mapping[bytes, bytes]:
    """The newest sign of each actor that gave one."""
    store = internal_kv.internal_kv_get_gcs_client()
    signs: Mapping[bytes, bytes] = store.internal_kv_multi_get(
        [actor_id.encode() for actor_id in actor_ids], NAMESPACE, timeout=LOOK_TIMEOUT_S
    )
    return signs
