"""Faults at named moments, inside the process that reaches them."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

from rlhf.chaos import deeds
from rlhf.chaos.journal import PLAN_FILE, Journal
from rlhf.chaos.plan import ChaosPlan, Corrupt, Delay, Drop, FillDisk, Kill, Stop, draw
from rlhf.config_file import load_chaos


class PointFaults:
    """Counts how often this process reaches each moment, and strikes when the chaos file says so."""

    def __init__(self, run_dir: Path, role: str) -> None:
        self._run_dir, self._role = run_dir, role
        self._plan: ChaosPlan = load_chaos(run_dir / PLAN_FILE)
        self._journal = Journal(run_dir)
        self._times: Counter[str] = Counter()

    def reached(self, moment: str, subject: int | None) -> None:
        for number in self._due(moment, subject):
            self._strike(number)

    def loses(self, message: str, subject: int | None) -> bool:
        return any(isinstance(self._plan.faults[number], Drop) for number in self._due(message, subject))

    def _due(self, moment: str, subject: int | None) -> list[int]:
        """The faults of this moment that are ours to do, written down before they are done."""
        self._times[moment] += 1
        here = {"point": moment, "role": self._role, "pid": os.getpid()}
        if moment in self._plan.trace:
            self._journal.trace({**here, "subject": subject})
        asked = [
            number
            for number, fault in enumerate(self._plan.faults)
            if fault.when.point == moment and fault.when.nth == self._times[moment]
        ]
        return [
            number
            for number in asked
            if self._journal.claim(number, 0, {"kind": self._plan.faults[number].kind, **here, "subject": subject})
        ]

    def _strike(self, number: int) -> None:
        fault = self._plan.faults[number]
        match fault:
            case Kill():
                os.kill(os.getpid(), signal.SIGKILL)
            case Stop():  # the injector reads the journal, and continues us
                os.kill(os.getpid(), signal.SIGSTOP)
            case Delay():
                time.sleep(fault.for_s)
            case FillDisk():
                self._say(number, deeds.fill_disk(self._run_dir, fault.mib))
            case Corrupt():
                self._say(number, deeds.corrupt(self._run_dir, fault.what, draw(self._plan, "byte", number, 0)))

    def _say(self, number: int, what: str) -> None:
        try:
            self._journal.write("done", {"fault": number, "occurrence": 0, "what": what})
        except OSError:  # the disk is full, as asked
            return
