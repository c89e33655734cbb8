"""`rlhf verify`: every checksum and every invariant of a run, read-only."""

import argparse
import json
from pathlib import Path

from rlhf import checkpoint
from rlhf.buffer.audit import verify as verify_experience
from rlhf.buffer.schema import FILE_NAME, DamagedExperience
from rlhf.buffer.snapshot import moment_of
from rlhf.cli.exit_codes import BROKEN, DONE
from rlhf.cli.run_directory import CLUSTER_FILE, read_config
from rlhf.config_file import load_cluster
from rlhf.errors import BadInput
from rlhf.observers import EVALUATIONS_FILE, METRICS_FILE, read_jsonl, read_steps
from rlhf.storage import Storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory")
    parser.add_argument("--json", action="store_true", help="one JSON object: ok, ledger, problems")


def run(arguments: argparse.Namespace) -> int:
    run_dir: Path = arguments.run_dir
    read_config(run_dir)  # says so when this is no run directory
    found = verify_experience(run_dir / FILE_NAME)
    problems = [*found.problems, *_checkpoints(run_dir), *_ledger_behind(run_dir)]
    problems += [*_logs(run_dir), *_metrics_behind(run_dir), *_storage(run_dir)]
    if arguments.json:
        print(json.dumps({"ok": not problems, "ledger": dict(found.ledger), "problems": problems}))
    else:
        print("\n".join(problems) or "ok")
        print("  ".join(f"{name} {count}" for name, count in found.ledger.items()))
    return BROKEN if problems else DONE


def _checkpoints(run_dir: Path) -> list[str]:
    """Faults of checkpoints. They appear and go under their final names whole, so one without a manifest is damaged."""
    return [fault for folder in checkpoint.folders(run_dir) for fault in checkpoint.problems(folder)]


def _ledger_behind(run_dir: Path) -> list[str]:
    """A ledger that lacks steps of a checkpoint is not the one that the checkpoint belongs to."""
    whole = checkpoint.committed(run_dir)
    try:
        committed = moment_of(run_dir / FILE_NAME).updates
    except DamagedExperience:
        return []  # said by the checks of the buffer
    ahead = [updates for updates in whole if updates > committed]
    return [
        f"{run_dir / checkpoint.FOLDER}/step-{updates:06d}: written after {updates} steps, but {FILE_NAME} knows "
        f"{committed}: they are not of one run"
        for updates in ahead
    ]


def _metrics_behind(run_dir: Path) -> list[str]:
    """Steps before a checkpoint whose lines are missing: a line is on the disk before the checkpoint is written. Later
    steps may lack theirs: a run that was killed trains them again."""
    newest, _ = checkpoint.newest(run_dir)
    if newest is None:
        return []
    recorded = {row["step"] for row in read_steps(run_dir / METRICS_FILE)[0]}
    missing = [step for step in range(newest.updates) if step not in recorded]
    if not missing:
        return []
    return [
        f"{run_dir / METRICS_FILE}: has no line of {len(missing)} of the {newest.updates} steps before "
        f"{newest.folder.name}, the first: {missing[:5]}; {FILE_NAME} has their metrics"
    ]


def _storage(run_dir: Path) -> list[str]:
    """What is incomplete at the cluster file's address, by names and sizes."""
    path = run_dir / CLUSTER_FILE
    address = load_cluster(path, []).storage.address if path.is_file() else None
    if address is None:
        return []
    try:
        return Storage(address).problems()
    except (OSError, BadInput) as error:
        return [f"{address}: could not be checked: {error}"]


def _logs(run_dir: Path) -> list[str]:
    problems = []
    for name in (METRICS_FILE, EVALUATIONS_FILE):
        try:
            steps = [row["step"] for row in read_jsonl(run_dir / name)]
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{run_dir / name}: {error!r}")
            continue
        if steps != sorted(set(steps)):
            problems.append(f"{run_dir / name}: steps do not count up, or one stands twice: {steps[:20]}")
    return problems
