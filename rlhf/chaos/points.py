"""Named moments of a run, for faults on purpose: `point("checkpoint: renamed")` does nothing unless `--chaos` is given.

A moment is a line in the code where a process may die, hang or be slowed down, and everything must still come right:
mostly where something has just become durable, or is just about to. The names are what a chaos file says. Imports the
standard library only; without `--chaos` a point is one comparison."""

import os
from pathlib import Path
from typing import Protocol

# Set by the driver for the processes of its team: the run directory, and the role of a process (actors/placement.py).
RUN_VARIABLE = "RLHF_CHAOS"
ROLE_VARIABLE = "RLHF_ROLE"

MOMENTS = {
    "start: directory settled": "driver: config.yaml and cluster.yaml stand, nothing has run",
    "file: written beside": "any process: a small file (config, metrics, report) is written whole, not yet renamed",
    "ledger: not committed": "buffer: everything of a move is written, its transaction is open",
    "ledger: committed": "buffer: a move is durable",
    "lease: not committed": "buffer: prompts are leased, not yet durable",
    "group: not committed": "buffer: a group is stored, not yet durable",
    "group: stored": "buffer: a group is durable",
    "columns: not committed": "buffer: a judge's columns are stored, not yet durable",
    "take: not committed": "buffer: a step has its groups, not yet durable",
    "take: durable": "buffer: a step has its groups for good",
    "commit: begun": "buffer: a trained step is handed in, nothing is written",
    "commit: not committed": "buffer: a trained step is written, not yet durable",
    "commit: durable": "buffer: a step is history",
    "rollout: group begun": "rollout: an engine starts on the samples of a prompt",
    "rollout: group finished": "rollout: the samples of a prompt are finished, nobody has them yet",
    "rollout: weights verified": "rollout: an engine holds a new version",
    "reward: scored": "reward: a group has its rewards, nobody has them yet",
    "reference: scored": "reference: a group has its reference log-probs, nobody has them yet",
    "annotate: done": "trainer: the learner's columns are filled in",
    "update: begun": "trainer: a step's batch is there, no parameter has changed",
    "update: done": "trainer: the parameters have changed",
    "publish: packed": "trainer: the weights of a version are packed, nobody has them yet",
    "save: policy written": "trainer: a checkpoint has its policy, not yet its optimizer",
    "critic: values read": "critic: the values of a step's groups are known, nobody has them yet",
    "critic: update begun": "critic: a step's batch is there, no parameter has changed",
    "critic: update done": "critic: the parameters have changed",
    "critic: state written": "critic: a checkpoint has the critic's parameters and optimizer",
    "metrics: line appended": "driver: the line of a step is in metrics.jsonl",
    "evaluation: measured": "driver: held-out prompts are answered and judged, not yet written down",
    "evaluation: appended": "driver: the line of an evaluation is in evaluations.jsonl",
    "checkpoint: folder made": "driver: the folder beside is there, empty",
    "checkpoint: parts written": "driver: all parts are written, not yet synced",
    "checkpoint: parts synced": "driver: all parts are on the disk, without a manifest",
    "checkpoint: manifest written": "driver: the manifest is there, under the wrong name",
    "checkpoint: renamed": "driver: the checkpoint has its name, the rename is not yet synced",
    "checkpoint: committed": "driver: the checkpoint is whole and on the disk",
    "checkpoint: old one renamed": "driver: an old checkpoint is none any more, its files are still there",
    "checkpoint: old ones removed": "driver: only those that are to be kept are left",
    "report: to be written": "driver: the run is over, its report is not written",
    "report: written": "driver: the report is written",
}

MESSAGES = {
    "message: worker's answer": "driver: a rollout engine or judge has answered; dropped, the answer never arrives",
}


class Listener(Protocol):
    """Whoever strikes when a process reaches a moment."""

    def reached(self, moment: str, subject: int | None) -> None: ...

    def loses(self, message: str, subject: int | None) -> bool: ...


class _Newcomer:
    """An actor, which Ray has started: at its first moment it reads what the driver wants of it."""

    def reached(self, moment: str, subject: int | None) -> None:
        self._arrive().reached(moment, subject)

    def loses(self, message: str, subject: int | None) -> bool:
        return self._arrive().loses(message, subject)

    def _arrive(self) -> Listener:
        from rlhf.chaos.listener import PointFaults

        listener = PointFaults(Path(os.environ[RUN_VARIABLE]), os.environ[ROLE_VARIABLE])
        listen(listener)
        return listener


_listener: Listener | None = _Newcomer() if {ROLE_VARIABLE, RUN_VARIABLE} <= os.environ.keys() else None


def point(moment: str, subject: int | None = None) -> None:
    """Says that this process has reached a moment; subject, a prompt id where there is one. Mostly nobody listens."""
    if _listener is not None:
        _listener.reached(moment, subject)


def is_dropped(message: str, subject: int | None = None) -> bool:
    """Whether a message gets lost here; False unless a chaos file drops it."""
    return _listener is not None and _listener.loses(message, subject)


def listen(listener: Listener | None) -> None:
    """From now on, in this process; None: nobody."""
    global _listener
    _listener = listener
