"""The progress of a run on a terminal: a bar with step, reward, KL, tokens a second and the time left."""

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlhf.config import RunConfig
from rlhf.evaluation.heldout import Evaluation
from rlhf.observers import Outcome, summary

STYLES: dict[Outcome, str] = {"done": "green", "interrupted": "yellow", "failed": "red"}


class RichProgress:
    """An observer that draws a bar; notes and evaluations scroll above it."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._console = console

    def started(self, config: RunConfig, first_step: int, num_steps: int) -> None:
        how = f"going on at step {first_step}" if first_step else "starting"
        self._console.print(f"[bold]{config.algorithm.name}[/] on [bold]{escape(config.model.name)}[/], {how}")
        self._progress.start()
        for task in self._progress.task_ids:  # of a team that died
            self._progress.remove_task(task)
        self._task = self._progress.add_task("waiting for the first step", total=num_steps, completed=first_step)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._progress.update(self._task, completed=step + 1, description=summary(metrics), refresh=True)

    def note(self, message: str) -> None:
        self._console.print(f"[dim]{escape(message)}")

    def evaluated(self, step: int, report: Evaluation) -> None:
        self._console.print(f"held-out after {step} steps: {escape(report.describe())}")

    def finished(self, outcome: Outcome, message: str) -> None:
        self._progress.stop()
        self._console.print(f"[{STYLES[outcome]}]{outcome}[/]: {escape(message)}")
