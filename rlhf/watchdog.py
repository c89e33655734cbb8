"""What a run is at, for those outside: RUN_DIR/status.json, and a note when a step or a commit makes no progress.

The driver says which phase it enters; a thread of the watchdog writes the file and looks at the clock, so that both go
on while the driver waits. It changes nothing in the run."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import psutil

from rlhf.observers import duration

STATUS_FILE = "status.json"
POLL_S = 0.5
REWRITE_S = 10.0

Waits = Callable[[], "tuple[str, float] | None"]


@dataclass(frozen=True, slots=True)
class Status:
    """One look at a run: who runs it, what it is at, whose answer it waits for. Times are seconds since 1970.

    progress_at, when something last came of it; stalled, that this is longer ago than loop.wait_timeout_s."""

    host: str
    pid: int
    process_began: float
    doing: str
    since: float
    waits_for: str | None
    waits_since: float | None
    progress_at: float
    stalled: bool

    def alive(self) -> bool | None:
        """Whether the process that wrote it still runs; None from another machine."""
        if self.host != socket.gethostname():
            return None
        try:
            return psutil.Process(self.pid).create_time() == self.process_began
        except psutil.NoSuchProcess:
            return False


class Watchdog:
    """Keeps status.json while its block runs. `waits` says what the driver waits for, and since when; `note` is told,
    once a phase, that nothing has come of it for timeout_s."""

    def __init__(self, run_dir: Path, timeout_s: float, note: Callable[[str], None]) -> None:
        self._path, self._timeout_s, self._note = run_dir / STATUS_FILE, timeout_s, note
        self._who = (socket.gethostname(), os.getpid(), psutil.Process().create_time())
        self._phase = ("starting", time.time())
        self._moved = time.monotonic()
        self._waits: Waits = lambda: None
        self._advanced: Callable[[], float] = lambda: 0.0
        self._told: tuple[str, float] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The run is over: nothing is left to show."""
        self._ended.set()
        self._thread.join(timeout=self._timeout_s)
        self._path.unlink(missing_ok=True)

    def enter(self, phase: str) -> None:
        """The run has come to another phase, which is progress."""
        self._phase = (phase, time.time())
        self._moved = time.monotonic()

    def asks(self, waits: Waits) -> None:
        self._waits = waits

    def follows(self, advanced: Callable[[], float]) -> None:
        """`advanced` says when something last came of a phase, a group or a judgement: seconds of time.monotonic."""
        self._advanced = advanced

    def look(self) -> Status:
        (doing, since), waits = self._phase, self._waits()
        what, waits_since = waits or (None, None)
        moved = max(self._moved, self._advanced())
        ago = time.monotonic() - moved
        return Status(*self._who, doing, since, what, waits_since, round(time.time() - ago, 1), ago > self._timeout_s)

    def _watch(self) -> None:
        written, written_at = None, 0.0
        while not self._ended.wait(POLL_S):
            status = self.look()
            if status.stalled and self._told != self._phase:
                self._told = self._phase
                self._note(f"no progress for {duration(time.monotonic() - self._moved)}: {in_words(status)}")
            if status != written or time.monotonic() - written_at > REWRITE_S:
                try:
                    write(self._path, status)
                except OSError:
                    continue  # a disk that is full, or gone for now: the driver, which needs it, says so; look again
                written, written_at = status, time.monotonic()


def in_words(status: Status) -> str:
    """What it is at and since when, and whom it waits for."""
    now = time.time()
    text = f"{status.doing} for {duration(now - status.since)}"
    if status.waits_for is not None and status.waits_since is not None:
        text += f", waiting for {status.waits_for} for {duration(now - status.waits_since)}"
    return text


def write(path: Path, status: Status) -> None:
    """Readers see the old one or the new one. Not synced: after a crash of the machine nobody asks what it was at."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(asdict(status)))
    os.replace(fresh, path)


def read(run_dir: Path) -> Status | None:
    """None where no run has written one, or the last one ended in order."""
    try:
        return Status(**json.loads((run_dir / STATUS_FILE).read_text()))
    except FileNotFoundError:
        return None
