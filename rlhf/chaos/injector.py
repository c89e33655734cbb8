"""The process beside a run that strikes it: `python -m rlhf.chaos.injector RUN_DIR DRIVER_PID`.

Does the faults that are due after steps, after seconds or at random, and what a stopped process cannot do for itself:
continue it, and take the ballast off the disk. Ends with the driver, however that ends: the driver holds the other end
of its standard input. Finds processes by the role in their environment, on this machine only."""

import contextlib
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from rlhf.chaos import deeds
from rlhf.chaos.journal import PLAN_FILE, Journal
from rlhf.chaos.plan import ChaosPlan, Corrupt, FillDisk, Kill, Stop, chosen_role, draw, gap_s, pick
from rlhf.chaos.points import ROLE_VARIABLE, RUN_VARIABLE
from rlhf.config_file import load_chaos
from rlhf.durable import read_jsonl
from rlhf.observers import METRICS_FILE

POLL_S = 0.1
IDLE = "ray::IDLE"  # how Ray's processes call themselves before and after they hold an actor
PATIENCE_S = 120.0  # how long a fault waits for a process of its role to be there


@dataclass(slots=True)
class _Due:
    """A fault that is to happen now, and since when it waits for somebody to strike."""

    number: int
    occurrence: int
    since: float


@dataclass(slots=True)
class Progress:
    """How far the run is. Steps that are trained again after a restart are none."""

    path: Path
    furthest: int
    seen: tuple[int, int] = field(default=(0, 0))

    def look(self) -> int:
        """Steps trained so far, from metrics.jsonl; replayed ones are not counted twice."""
        if self.path.exists():
            now = self.path.stat()
            if (now.st_mtime_ns, now.st_size) != self.seen:
                self.seen = (now.st_mtime_ns, now.st_size)
                self.furthest = max([self.furthest, *(int(row["step"]) + 1 for row in read_jsonl(self.path))])
        return self.furthest


class Injector:
    """The timed faults of a chaos file, done to one run."""

    def __init__(self, run_dir: Path, driver: int) -> None:
        self._run_dir, self._driver = run_dir, driver
        self._plan: ChaosPlan = load_chaos(run_dir / PLAN_FILE)
        self._journal = Journal(run_dir)
        rows = self._journal.rows()
        self._began = time.monotonic()
        self._ran_before_s = max((row["run_s"] for row in rows if "run_s" in row), default=0.0)
        struck = [row for row in rows if row["event"] == "fault"]
        self._progress = Progress(run_dir / METRICS_FILE, max((row.get("steps", 0) for row in struck), default=0))
        over = {(row["fault"], row["occurrence"]) for row in rows if row["event"] == "recovered"}
        self._moved = self._progress.look()
        self._open = [
            {**row, "steps": self._moved}
            for row in struck
            if "steps" in row and "skipped" not in row and (row["fault"], row["occurrence"]) not in over
        ]
        self._settled_since: float | None = None
        self._waiting: dict[int, _Due] = {}
        self._last: dict[int, float] = {}
        self._to_continue: dict[int, float] = {}
        self._ballast_until: float | None = None
        self._read = len(rows)

    def work(self, lifeline: int) -> None:
        """Until the driver is gone."""
        while not select.select([lifeline], [], [], POLL_S)[0]:
            self._undo(everything=False)
            self._note_recoveries()
            for due in self._due():
                self._strike(due)
        self._undo(everything=True)

    def _run_s(self) -> float:
        return self._ran_before_s + time.monotonic() - self._began

    def _note_recoveries(self) -> None:
        """A fault is over when the run has trained a step that began after it and that it had not trained before: the
        one that was under way may end without whoever was struck."""
        steps, now = self._progress.look(), time.monotonic()
        if steps > self._moved:
            self._moved = steps
            self._settled_since = self._settled_since or now
        for row in [row for row in self._open if steps > row["steps"] + 1]:
            self._open.remove(row)
            what = {"fault": row["fault"], "occurrence": row["occurrence"], "role": row["role"]}
            self._journal.write("recovered", {**what, "after_s": round(now - row["monotonic"], 3)})

    def _due(self) -> list[_Due]:
        done = [(row["fault"], row["occurrence"]) for row in self._journal.faults()]
        for number, fault in enumerate(self._plan.faults):
            occurrence = sum(fault_done == number for fault_done, _ in done)
            left = fault.when.point is None and occurrence < fault.when.times and number not in self._waiting
            if left and self._is_time(number, occurrence):
                self._waiting[number] = _Due(number, occurrence, time.monotonic())
        return list(self._waiting.values())

    def _is_time(self, number: int, occurrence: int) -> bool:
        when, now = self._plan.faults[number].when, time.monotonic()
        if when.after_steps:
            return self._progress.look() >= sorted(when.after_steps)[occurrence]
        if when.after_s:
            return self._run_s() >= sorted(when.after_s)[occurrence]
        since = self._last.get(number, self._began)
        if when.settled:
            if self._settled_since is None:
                return False
            since = max(since, self._settled_since)
        return now - since >= gap_s(self._plan, number, occurrence)

    def _strike(self, due: _Due) -> None:
        fault = self._plan.faults[due.number]
        role = chosen_role(self._plan, due.number, due.occurrence)
        generator = draw(self._plan, "process", due.number, due.occurrence)
        victims = [] if role is None else self._processes(role)
        waited = time.monotonic() - due.since
        if role is not None and not victims and waited < PATIENCE_S:
            return
        del self._waiting[due.number]
        pid = pick(victims, generator) if victims else None
        row: dict[str, Any] = {"kind": fault.kind, "role": role, "pid": pid, "steps": self._progress.look()}
        row["run_s"] = round(self._run_s(), 3)
        if role is not None and pid is None:
            row["skipped"] = f"no process of this role in {PATIENCE_S:g} s"
        if not self._journal.claim(due.number, due.occurrence, row):
            return
        self._last[due.number] = time.monotonic()
        self._settled_since, self._moved = None, row["steps"]
        if pid is not None or role is None:
            self._open.append({**row, "fault": due.number, "occurrence": due.occurrence, "monotonic": time.monotonic()})
            self._do(fault, pid, due)

    def _do(self, fault: Any, pid: int | None, due: _Due) -> None:
        match fault:
            case Kill() if pid is not None:
                _signal(pid, signal.SIGKILL)
            case Stop() if pid is not None:
                _signal(pid, signal.SIGSTOP)
                self._to_continue[pid] = time.monotonic() + fault.for_s
            case FillDisk():
                self._ballast_until = time.monotonic() + fault.for_s
                self._say(due, deeds.fill_disk(self._run_dir, fault.mib))
            case Corrupt():
                generator = draw(self._plan, "byte", due.number, due.occurrence)
                self._say(due, deeds.corrupt(self._run_dir, fault.what, generator))

    def _say(self, due: _Due, what: str) -> None:
        with contextlib.suppress(OSError):  # the disk is full, as asked
            self._journal.write("done", {"fault": due.number, "occurrence": due.occurrence, "what": what})

    def _undo(self, *, everything: bool) -> None:
        """Continues the stopped and frees the disk, in time or at the end; also where a process struck itself."""
        now, rows = time.monotonic(), self._journal.rows()
        for row in rows[self._read :]:
            if row["event"] == "fault" and "point" in row:
                fault = self._plan.faults[row["fault"]]
                if isinstance(fault, Stop):
                    self._to_continue[row["pid"]] = now + fault.for_s
                if isinstance(fault, FillDisk):
                    self._ballast_until = now + fault.for_s
        self._read = len(rows)
        for pid, until in list(self._to_continue.items()):
            if everything or now >= until:
                _signal(pid, signal.SIGCONT)
                del self._to_continue[pid]
        if self._ballast_until is not None and (everything or now >= self._ballast_until):
            deeds.free_disk(self._run_dir)
            self._ballast_until = None

    def _processes(self, role: str) -> list[int]:
        """The processes of a role on this machine, without those that they started themselves and those of Ray's that
        hold no actor: killing one of them would show nothing."""
        if role == "driver":
            return [self._driver]
        ours = {}
        for process, environment in environments():
            if environment.get(RUN_VARIABLE) == str(self._run_dir) and environment.get(ROLE_VARIABLE) == role:
                with contextlib.suppress(psutil.Error):  # it has just ended
                    if process.cmdline()[:1] != [IDLE]:
                        ours[process.pid] = process.ppid()
        return [pid for pid, parent in ours.items() if parent not in ours]


def environments() -> Sequence[tuple[psutil.Process, dict[str, str]]]:
    """The processes of this machine that may be looked at, and the environment that each was started with."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found.append((process, process.environ()))
    return found


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def main(arguments: Sequence[str]) -> None:
    run_dir, driver = Path(arguments[0]), int(arguments[1])
    plan = load_chaos(run_dir / PLAN_FILE)
    largest = max([fault.mib for fault in plan.faults if isinstance(fault, FillDisk)], default=64)
    # Whatever goes wrong here, no file of this process grows beyond what the chaos file allows.
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest << 20, largest << 20))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    injector = Injector(run_dir, driver)
    print("ready", flush=True)
    injector.work(sys.stdin.fileno())


if __name__ == "__main__":
    main(sys.argv[1:])
