"""Who is told how a run goes: lines, metrics.jsonl, TensorBoard. An observer never changes the run.

The driver calls `started` once, then `step`, `note` and `evaluated` in the order of events, and `finished` once,
whatever happened. The progress bar of a terminal is in rlhf/cli/progress.py. Imports neither torch nor ray:
TensorBoard's writer, which needs torch, is imported by the class that uses it.
"""

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TextIO

from rlhf.chaos.points import point
from rlhf.config import RunConfig
from rlhf.durable import append_durably as append_durably
from rlhf.durable import read_jsonl as read_jsonl
from rlhf.durable import read_steps as read_steps
from rlhf.durable import replace_durably as replace_durably
from rlhf.evaluation.heldout import Evaluation

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Outcome = Literal["done", "interrupted", "failed"]

METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class Observer(Protocol):
    """Is told what happens in a run."""

    def started(self, config: RunConfig, first_step: int, num_steps: int) -> None:
        """The team stands. first_step is 0 for a new run; the run ends after step num_steps - 1."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is committed. Metrics by the names of docs/metrics.md, already reduced."""

    def note(self, message: str) -> None:
        """Something a person may want to know: what is waited for, what was restarted, what was dropped."""

    def evaluated(self, step: int, report: Evaluation) -> None:
        """Held-out data was looked at after `step` updates (0: before the first)."""

    def finished(self, outcome: Outcome, message: str) -> None:
        """The run is over; called once, also when it failed, was interrupted, or never started."""


class Several:
    """Tells several observers, in their order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def started(self, config: RunConfig, first_step: int, num_steps: int) -> None:
        for observer in self._observers:
            observer.started(config, first_step, num_steps)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        for observer in self._observers:
            observer.step(step, metrics)

    def note(self, message: str) -> None:
        for observer in self._observers:
            observer.note(message)

    def evaluated(self, step: int, report: Evaluation) -> None:
        for observer in self._observers:
            observer.evaluated(step, report)

    def finished(self, outcome: Outcome, message: str) -> None:
        for observer in self._observers:
            observer.finished(outcome, message)


class PlainLines:
    """One line a step, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._num_steps = 0
        self._first_step = 0
        self._began = 0.0

    def started(self, config: RunConfig, first_step: int, num_steps: int) -> None:
        self._first_step, self._num_steps, self._began = first_step, num_steps, time.monotonic()
        how = f"goes on at step {first_step}" if first_step else "starts"
        self._line(f"{config.algorithm.name} on {config.model.name} {how}, {num_steps} steps")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        done = step + 1 - self._first_step
        left = (time.monotonic() - self._began) / done * (self._num_steps - step - 1)
        self._line(f"step {step + 1}/{self._num_steps}  {summary(metrics)}  {duration(left)} left")

    def note(self, message: str) -> None:
        self._line(message)

    def evaluated(self, step: int, report: Evaluation) -> None:
        self._line(f"held-out after {step} steps: {report.describe()}")

    def finished(self, outcome: Outcome, message: str) -> None:
        self._line(f"{outcome}: {message}")

    def _line(self, text: str) -> None:
        tell(text, self._stream)


def tell(text: str, stream: TextIO) -> None:
    """Prints a line. A reader that is gone (`| head`, a terminal that was closed) is no reason to end a run: from then
    on what is written there goes nowhere, what the interpreter flushes at its end included."""
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class JsonlMetrics:
    """RUN_DIR/metrics.jsonl: one object a step, durable when `step` returns.

    A run that goes on at step s drops the lines of steps s and later first: they are replayed, and a step stands there
    once. A torn last line, the mark of a process that died while writing, is dropped with them; so is a damaged one,
    which is told: the ledger, not this file, knows what was trained.
    """

    def __init__(self, run_dir: Path, note: Callable[[str], None]) -> None:
        self._path, self._note = run_dir / METRICS_FILE, note

    def started(self, config: RunConfig, first_step: int, num_steps: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows, damaged = read_steps(self._path)
        if damaged:
            self._note(f"{self._path}: {lines_in_words(damaged)}, left out; the ledger has all steps")
        keep = [row for row in rows if row["step"] < first_step]
        replace_durably(self._path, "".join(json.dumps(row) + "\n" for row in keep))

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        append_durably(self._path, {"step": step, **metrics})
        point("metrics: line appended")

    def note(self, message: str) -> None:
        pass

    def evaluated(self, step: int, report: Evaluation) -> None:
        pass

    def finished(self, outcome: Outcome, message: str) -> None:
        pass


class TensorBoard:
    """RUN_DIR/tensorboard: every metric as a scalar, held-out answers as text."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / TENSORBOARD_FOLDER
        self._writer: SummaryWriter | None = None

    def started(self, config: RunConfig, first_step: int, num_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is not None:  # of a team that died
            self._writer.close()
        self._writer = SummaryWriter(str(self._folder), purge_step=first_step or None)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        writer = self._open()
        for name in sorted(metrics.keys() - {"step"}):
            writer.add_scalar(name, metrics[name], step)
        writer.flush()

    def note(self, message: str) -> None:
        pass

    def evaluated(self, step: int, report: Evaluation) -> None:
        writer = self._open()
        for name, value in report.scalars().items():
            writer.add_scalar(f"heldout/{name}", value, step)
        for number, sample in enumerate(report.samples):
            indented = "\n".join("    " + line for line in f"{sample.prompt}\n---\n{sample.completion}".splitlines())
            writer.add_text(f"heldout/answer_{number}", indented, step)
        writer.flush()

    def finished(self, outcome: Outcome, message: str) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> "SummaryWriter":
        if self._writer is None:
            raise RuntimeError("TensorBoard was told of a step before `started`")
        return self._writer


def default_observer(run_dir: Path, console: Observer) -> Observer:
    """What every run has: the console of the caller's choice, metrics.jsonl and TensorBoard."""
    return Several([JsonlMetrics(run_dir, console.note), TensorBoard(run_dir), console])


def summary(metrics: Mapping[str, float]) -> str:
    """The few numbers worth a glance, those of them that were measured."""
    parts = [
        ("reward", "reward/mean", "{:.4g}"),
        ("NLL", "loss/nll", "{:.4g}"),
        ("loss", "loss/preference", "{:.4g}"),
        ("accuracy", "rewards/accuracies", "{:.2f}"),
        ("KL", "kl/k1", "{:.4g}"),
        ("length", "completion/length_mean", "{:.0f}"),
        ("mismatch", "mismatch/logprob_abs_mean", "{:.1e}"),
        ("tokens/s", "tokens/generated_per_s", "{:.0f}"),
    ]
    return "  ".join(f"{label} {form.format(metrics[name])}" for label, name, form in parts if name in metrics)


def lines_in_words(damaged: Sequence[int]) -> str:
    """What is said of the lines that `read_steps` passed over."""
    shown = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
    return f"damaged at line {shown}" if len(damaged) == 1 else f"damaged at {len(damaged)} lines, {shown}"


def duration(seconds: float) -> str:
    """Seconds as 42s, 3m05s or 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def console_is_terminal() -> bool:
    return sys.stdout.isatty()
