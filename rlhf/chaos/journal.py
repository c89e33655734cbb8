"""RUN_DIR/chaos.jsonl: every fault before it happens, so that a run that starts again goes on with the rest.

Times are seconds of the system's monotonic clock, which all processes of a machine share and no clock jump moves.
Several processes write; the kernel's lock on the file keeps claims apart."""

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.durable import read_jsonl

PLAN_FILE = "chaos.yaml"
JOURNAL_FILE = "chaos.jsonl"
TRACE_FILE = "chaos-trace.jsonl"
BALLAST_FILE = "chaos.ballast"


class Journal:
    """What was done to a run, and when it had recovered."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / JOURNAL_FILE
        self._trace = run_dir / TRACE_FILE

    def rows(self) -> list[dict[str, Any]]:
        return read_jsonl(self.path)

    def faults(self) -> list[dict[str, Any]]:
        """The faults so far, in their order."""
        return [row for row in self.rows() if row["event"] == "fault"]

    def claim(self, fault: int, occurrence: int, row: Mapping[str, Any]) -> bool:
        """Writes down that a fault is about to happen; False when it did before, or another process was faster."""
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if any((r["fault"], r["occurrence"]) == (fault, occurrence) for r in self.faults()):
                return False
            _append(file.fileno(), {"event": "fault", "fault": fault, "occurrence": occurrence, **row})
            os.fsync(file.fileno())
            return True

    def write(self, event: str, row: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            _append(file.fileno(), {"event": event, **row})
            os.fsync(file.fileno())

    def trace(self, row: Mapping[str, Any]) -> None:
        """RUN_DIR/chaos-trace.jsonl: not synced, because it only has to outlive processes."""
        with self._trace.open("ab") as file:
            _append(file.fileno(), row)


def _append(descriptor: int, row: Mapping[str, Any]) -> None:
    """One write in append mode, which the kernel does not mix with another process's."""
    os.write(descriptor, (json.dumps({**row, "monotonic": round(time.monotonic(), 3)}) + "\n").encode())
