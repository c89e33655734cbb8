"""`rlhf run`: reads the files, finds bad input, settles the run directory, and starts the run."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from rlhf.cli.before_after import before_and_after
from rlhf.cli.exit_codes import DONE, INTERRUPTED
from rlhf.cli.ownership import check_actors_is_ours
from rlhf.cli.preflight import check_cheaply, check_prompts
from rlhf.cli.progress import RichProgress
from rlhf.cli.run_directory import check_directory, held, settle
from rlhf.cluster import Cluster
from rlhf.config import RunConfig
from rlhf.config_file import load_cluster, load_run
from rlhf.data.prompts import PromptSet
from rlhf.observers import Observer, Outcome, PlainLines, console_is_terminal, default_observer
from rlhf.ui.report import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="run file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the file's")
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="cluster file (YAML); without one: this machine")
    parser.add_argument("--in-process", action="store_true", help="the whole team in this process, without Ray")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="run directory (default: runs/<name of CONFIG>)")
    parser.add_argument(
        "--fresh", action="store_true", help="move an old run out of the way instead of going on with it"
    )


def run(arguments: argparse.Namespace) -> int:
    config = load_run(arguments.config, arguments.overrides)
    cluster = Cluster() if arguments.cluster is None else load_cluster(arguments.cluster, [])
    run_dir: Path = arguments.run_dir or Path("runs") / arguments.config.stem
    if not arguments.in_process:
        check_actors_is_ours()
    check_directory(run_dir, config, fresh=arguments.fresh)
    check_cheaply(config, cluster)
    prompts = check_prompts(config)
    settle(run_dir, config, cluster, fresh=arguments.fresh)
    console: Observer = RichProgress(Console()) if console_is_terminal() else PlainLines(sys.stdout)
    observer = default_observer(run_dir, console)
    observer.note(prompts.describe())
    with held(run_dir):
        outcome = _train(config, cluster, run_dir, prompts, arguments.in_process, observer)
    if outcome == "interrupted":
        return INTERRUPTED
    print(before_and_after(run_dir))
    return DONE


def _train(
    config: RunConfig, cluster: Cluster, run_dir: Path, prompts: PromptSet, in_process: bool, observer: Observer
) -> Outcome:
    """The run, and then its report, whatever became of it; errors rise."""
    from rlhf.cli import launch

    outcome: Outcome = "failed"
    try:
        outcome = launch.run(config, cluster, run_dir, prompts, in_process=in_process, observer=observer)
    except KeyboardInterrupt:  # while the team was set up, or a second Ctrl-C
        outcome = "interrupted"
    finally:
        report = write_report(run_dir)
        continuing = "; the same command goes on with it" if outcome == "interrupted" else ""
        observer.finished(outcome, f"report in {report}{continuing}")
    return outcome
