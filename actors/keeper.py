"""Keeps the Ray that a run starts for itself, apart from the run's process: `python -m actors.keeper …`, one a run.

It stands in a session of its own, so that a signal to the run's process group (Ctrl-C, a supervisor's SIGTERM) reaches
the run and not the actors with which it has yet to save. It waits for the run's end, in whatever way the run ends, and
then kills every process that descends from it, stopped and orphaned ones included, and none else. Ray itself would
leave some of its agents for a minute, and stopped workers for ever.

Processes: the run -> keeper (this file, nothing heavy) -> head (holds Ray) -> raylet, gcs, agents -> workers."""

import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

import psutil

from rlhf.errors import RunFailed
from rlhf.processes import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, prctl

POLL_S = 0.5
END_TIMEOUT_S = 20.0


class Keeper:
    """The run's side: starts the keeper and, with it, Ray. `end` ends both; so does the end of this process."""

    def __init__(self, settings: Mapping[str, Any], timeout_s: float) -> None:
        """settings are arguments of `ray.init`. Raises RunFailed when Ray does not stand after timeout_s."""
        lifeline, self._lifeline = os.pipe()
        answer, theirs = os.pipe()
        command = [sys.executable, "-P", "-m", "actors.keeper", str(os.getpid()), str(lifeline), str(theirs)]
        self._process = subprocess.Popen(
            [*command, json.dumps(dict(settings))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(lifeline, theirs),
            start_new_session=True,
            # Workers that Ray would start ahead lack the environment of the roles, so none of them would be used.
            env={
                "RAY_prestart_worker_first_driver": "0",
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            },
        )
        os.close(lifeline)
        os.close(theirs)
        with os.fdopen(answer, "rb") as stream:
            try:
                self.address = self._address(stream.fileno(), timeout_s)
            except BaseException:  # an interrupt too must leave no Ray behind
                self.end()
                raise

    def end(self) -> None:
        """Returns once all processes are gone. Raises RunFailed when they are not after END_TIMEOUT_S."""
        os.close(self._lifeline)
        try:
            self._process.wait(timeout=END_TIMEOUT_S + POLL_S)
        except subprocess.TimeoutExpired as late:
            raise RunFailed(f"Ray's processes below {self._process.pid} do not end") from late

    def _address(self, stream: int, timeout_s: float) -> str:
        deadline, text = time.monotonic() + timeout_s, b""
        while select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
            part = os.read(stream, 1 << 16)
            if not part:
                answer = json.loads(text or b'{"failed": "its process ended"}')
                if "failed" in answer:
                    raise RunFailed(f"Ray could not be started on this machine: {answer['failed']}")
                return str(answer["address"])
            text += part
        raise RunFailed(f"Ray does not stand after {timeout_s:g} s on this machine")


def keep(run: int, lifeline: int, head: int) -> None:
    """Returns when the run or Ray's head has ended. The lifeline is a pipe whose other end the run holds."""
    while os.getppid() == run and head not in reap():
        if select.select([lifeline], [], [], POLL_S)[0]:  # its end: the run sends nothing
            return


def reap() -> set[int]:
    """The children that have ended since the last call, orphans that came to this process included."""
    ended: set[int] = set()
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.add(pid)


def end_descendants(timeout_s: float) -> None:
    """Kills and reaps all that descends from this process, which must be their subreaper, until nothing is left."""
    deadline = time.monotonic() + timeout_s
    while (alive := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for process in alive:
            try:
                process.kill()  # psutil compares the start time, so a number that was given anew is not hit
            except psutil.NoSuchProcess:
                continue
        reap()
        time.sleep(0.02)


def be_head(answer: int, settings: Mapping[str, Any]) -> None:
    """Starts Ray and stays; dies with the keeper."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        import ray

        ray.init(**settings)
        said = {"address": ray.get_runtime_context().gcs_address}
    except Exception:  # noqa: BLE001  told to the run, whatever it is
        said = {"failed": traceback.format_exc()}
    os.write(answer, json.dumps(said).encode())
    os.close(answer)
    while "address" in said:
        signal.pause()


def main(run: int, lifeline: int, answer: int, settings: Mapping[str, Any]) -> None:
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    head = os.fork()
    if head == 0:
        os.close(lifeline)
        be_head(answer, settings)
        os._exit(1)
    os.close(answer)
    keep(run, lifeline, head)
    end_descendants(END_TIMEOUT_S)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
