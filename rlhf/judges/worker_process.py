"""The parent's side of a reward function's process: starts it, calls it within a time limit, ends it with all it
started."""

import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from rlhf.judges.worker import receive, send

# What subprocess and the worker's own messages write goes where this process's stderr goes, prints of the function too.
STDERR = 2
# A process whose end of the channel is closed is about to end, and its exit code says more than our signal would.
ENDING_S = 2.0


class WorkerGone(Exception):
    """The process ended by itself; `status` is what ended it ("signal 9 (SIGKILL)", "exit code 1")."""

    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status


class WorkerProcess:
    """One process that has imported one reward function, in a process group of its own.

    One call at a time. After TimeoutError or WorkerGone it is dead and only `kill` may follow; `kill` leaves nothing
    behind. When this process dies in whatever way, the kernel kills the group.
    """

    def __init__(self, function: str) -> None:
        """Starts the process; `wait_ready` says whether it could import the function."""
        self._channel, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rlhf.judges.worker", str(theirs.fileno()), str(lifeline), function],
                stdin=subprocess.DEVNULL,
                stdout=STDERR,
                stderr=STDERR,
                pass_fds=(theirs.fileno(), lifeline),
                start_new_session=True,
                # What can be imported here can be imported there, also where a path was added while running.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        os.close(lifeline)
        self._open = True
        self.needs: frozenset[str] = frozenset()
        self.by_place: frozenset[str] = frozenset()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, timeout_s: float) -> str | None:
        """None when the function is imported, else what is wrong with it. `needs` then holds the columns without which
        it cannot be called, `by_place` the names that no column may have. Raises TimeoutError, WorkerGone."""
        answer = self._receive(time.monotonic() + timeout_s)
        self.needs = frozenset(answer.get("needs", ()))
        self.by_place = frozenset(answer.get("by_place", ()))
        missing: str | None = answer.get("missing")
        return missing

    def call(self, request: tuple[Any, ...], timeout_s: float) -> dict[str, Any]:
        """The worker's answer: {"scores": [...]}, {"wrong": text} or {"raised": traceback}. Raises as `wait_ready`
        does."""
        deadline = time.monotonic() + timeout_s
        self._channel.settimeout(timeout_s)
        try:
            send(self._channel, pickle.dumps(request))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise WorkerGone(self._ended()) from error
        return self._receive(deadline)

    def kill(self) -> None:
        """Kills the process group and reaps the process. Again: a no-op."""
        if not self._open:
            return
        self._open = False
        self._channel.close()
        # The process is not reaped before this line, so its group's number cannot belong to anybody else.
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._lifeline)

    def _receive(self, deadline: float) -> dict[str, Any]:
        self._channel.settimeout(max(deadline - time.monotonic(), 1e-3))
        try:
            answer: dict[str, Any] = json.loads(receive(self._channel))
        except (EOFError, ConnectionResetError) as error:
            raise WorkerGone(self._ended()) from error
        return answer

    def _ended(self) -> str:
        """How the process ended, without reaping it; one that only closed its channel is killed."""
        descriptor = os.pidfd_open(self._process.pid)
        ended = select.select([descriptor], [], [], ENDING_S)[0]
        os.close(descriptor)
        os.killpg(self._process.pid, signal.SIGKILL)
        if not ended:
            return "an answer owed: it closed the channel to its parent, and was killed"
        found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        if found is None:
            return "no known cause"
        if found.si_code == os.CLD_EXITED:
            return f"exit code {found.si_status}"
        return f"signal {found.si_status} ({signal.Signals(found.si_status).name})"
