"""`rlhf run`: reads the files, finds bad input, settles the run directory, and starts the run."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from rlhf.buffer.schema import FILE_NAME
from rlhf.chaos.points import point
from rlhf.chaos.start import check_chaos, faults_on_purpose
from rlhf.cli.before_after import before_and_after
from rlhf.cli.debugger import post_mortem
from rlhf.cli.disk import names_a_full_disk
from rlhf.cli.exit_codes import DONE, INTERRUPTED
from rlhf.cli.ownership import check_actors_is_ours
from rlhf.cli.preflight import check_cheaply, check_generate_only, check_prompts, check_train_only
from rlhf.cli.progress import RichProgress
from rlhf.cli.run_directory import LOCK_FILE, check_directory, held, is_empty, read_config, settled
from rlhf.cli.skipped import refuse_unmoved
from rlhf.cluster import Cluster, this_machine
from rlhf.config import RunConfig
from rlhf.config_file import load_cluster, load_run
from rlhf.errors import BadInput
from rlhf.observers import Observer, Outcome, PlainLines, console_is_terminal, default_observer, tell
from rlhf.storage import BUFFER, Storage, restore
from rlhf.ui.report import write_data, write_report

if TYPE_CHECKING:
    from rlhf.data.recorded import RecordedSet
    from rlhf.team import Prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="run file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the file's")
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="cluster file (YAML); without one: this machine")
    parser.add_argument("--in-process", action="store_true", help="the whole team in this process, without Ray")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="run directory (default: runs/<name of CONFIG>)")
    parser.add_argument(
        "--fresh", action="store_true", help="move an old run out of the way instead of going on with it"
    )
    parser.add_argument(
        "--pdb", action="store_true", help="with --in-process: a debugger where an error was raised (post-mortem)"
    )
    parser.add_argument(
        "--generate-only", type=int, metavar="STEPS", help="sample and judge so many steps ahead, and train nothing"
    )
    parser.add_argument(
        "--train-only",
        type=Path,
        metavar="RUN_DIR",
        help="train on what that run sampled and judged; no engine, no judge",
    )
    parser.add_argument(
        "--chaos", type=Path, metavar="FILE", help="faults on purpose (YAML): kills, stops, a full disk, ...; for tests"
    )


def run(arguments: argparse.Namespace) -> int:
    if not arguments.pdb:
        return _run(arguments)
    if not arguments.in_process:
        raise BadInput("--pdb: a debugger sees this process only, and actors are others; expected --in-process with it")
    with post_mortem():
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    config = load_run(arguments.config, arguments.overrides)
    cluster = _cluster(arguments.cluster)
    run_dir: Path = arguments.run_dir or Path("runs") / arguments.config.stem
    if not arguments.in_process:
        check_actors_is_ours()
    check_directory(run_dir, config, "training", fresh=arguments.fresh)
    record = _checked_sides(arguments, config, cluster)
    chaos = None
    if arguments.chaos is not None:
        chaos = check_chaos(arguments.chaos, run_dir, fresh=arguments.fresh, in_process=arguments.in_process)
    prompts = check_prompts(config) if record is None else record
    with names_a_full_disk(run_dir):
        told = _from_storage(config, cluster, run_dir, fresh=arguments.fresh)
        ours = settled(run_dir, config, cluster, "training", fresh=arguments.fresh)
        # Twice: at the end of a block of faults on purpose the disk is made free again.
        with ours as moved, faults_on_purpose(chaos, run_dir), names_a_full_disk(run_dir):
            point("start: directory settled")
            return _in_its_directory(config, cluster, run_dir, prompts, arguments, [*moved, *told])


def _checked_sides(arguments: argparse.Namespace, config: RunConfig, cluster: Cluster) -> "RecordedSet | None":
    """Refuses bad input of both sides of a run, or of the one that is not frozen; the record to train on, where one is
    named."""
    generate_only, train_only = arguments.generate_only, arguments.train_only
    if generate_only is not None and train_only is not None:
        raise BadInput("--generate-only and --train-only: nothing would be left to do; expected one of them")
    if train_only is None:
        check_cheaply(config, cluster)
        if generate_only is not None:
            check_generate_only(config, generate_only)
        return None
    from rlhf.data.recorded import RecordedSet

    sampled_by = read_config(train_only)
    if not (train_only / FILE_NAME).is_file():
        raise BadInput(f"--train-only {train_only}: has no {FILE_NAME}; expected a run that has sampled something")
    record = RecordedSet(train_only)
    check_train_only(config, cluster, record, sampled_by)
    return record


def _in_its_directory(
    config: RunConfig,
    cluster: Cluster,
    run_dir: Path,
    prompts: "Prompts",
    arguments: argparse.Namespace,
    told: list[str],
) -> int:
    """The run, in a directory that is ours alone; returns the exit code."""
    # A bar that is drawn again and again and the prompt of a debugger do not go together.
    draws = console_is_terminal() and not arguments.in_process
    console: Observer = RichProgress(Console()) if draws else PlainLines(sys.stdout)
    observer = default_observer(run_dir, console)
    write_data(run_dir, prompts.describe(), prompts.dropped)
    for line in [*told, prompts.describe()]:
        observer.note(line)
    outcome = _train(config, cluster, run_dir, prompts, arguments, observer)
    if outcome == "interrupted":
        return INTERRUPTED
    tell(before_and_after(run_dir), sys.stdout)
    return DONE


def _cluster(file: Path | None) -> Cluster:
    return this_machine(os.cpu_count() or 1) if file is None else load_cluster(file, [])


def _from_storage(config: RunConfig, cluster: Cluster, run_dir: Path, *, fresh: bool) -> list[str]:
    """Fills an empty run directory from the cluster file's address; what there is to tell about it."""
    if cluster.storage.address is None:
        return []
    storage = Storage(cluster.storage.address)
    if fresh and storage.complete(BUFFER):
        raise BadInput(
            f"--fresh: {storage.address} (storage.address of the cluster file) holds a run, which would be "
            "overwritten. Next: another address for the new run, or remove what is there"
        )
    told: list[str] = []
    if not fresh and is_empty(run_dir):
        if run_dir.is_dir():
            with held(run_dir):  # not under a process that is about to start there
                (run_dir / LOCK_FILE).unlink()
        restore(storage, run_dir, lambda folder: check_directory(folder, config, "training", fresh=False), told.append)
    return told


def _train(
    config: RunConfig,
    cluster: Cluster,
    run_dir: Path,
    prompts: "Prompts",
    arguments: argparse.Namespace,
    observer: Observer,
) -> Outcome:
    """The run, and then its report, whatever became of it; errors rise."""
    from rlhf.cli import launch

    outcome: Outcome = "failed"
    try:
        job, in_process, steps = (config, cluster, run_dir, prompts), arguments.in_process, arguments.generate_only
        if steps is None:
            ended = launch.run(*job, in_process=in_process, observer=observer)
            if ended == "done":
                refuse_unmoved(run_dir)
            outcome = ended
        else:
            outcome = launch.generate(*job, steps, in_process=in_process, observer=observer)
    except KeyboardInterrupt:  # while the team was set up, or a second Ctrl-C
        outcome = "interrupted"
    finally:
        point("report: to be written")
        report = write_report(run_dir)
        point("report: written")
        continuing = "; the same command goes on with it" if outcome == "interrupted" else ""
        observer.finished(outcome, f"report in {report}{continuing}")
    return outcome
