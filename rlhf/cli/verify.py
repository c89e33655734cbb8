"""`rlhf verify`: every checksum and every invariant of a run, read-only."""

import argparse
import json
from pathlib import Path

from rlhf import checkpoint
from rlhf.buffer.audit import verify as verify_experience
from rlhf.buffer.schema import FILE_NAME
from rlhf.cli.exit_codes import BROKEN, DONE
from rlhf.cli.run_directory import read_config
from rlhf.observers import EVALUATIONS_FILE, METRICS_FILE, read_jsonl


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory")
    parser.add_argument("--json", action="store_true", help="one JSON object: ok, ledger, problems")


def run(arguments: argparse.Namespace) -> int:
    run_dir: Path = arguments.run_dir
    read_config(run_dir)  # says so when this is no run directory
    found = verify_experience(run_dir / FILE_NAME)
    problems = [*found.problems, *_checkpoints(run_dir), *_logs(run_dir)]
    if arguments.json:
        print(json.dumps({"ok": not problems, "ledger": dict(found.ledger), "problems": problems}))
    else:
        print("\n".join(problems) or "ok")
        print("  ".join(f"{name} {count}" for name, count in found.ledger.items()))
    return BROKEN if problems else DONE


def _checkpoints(run_dir: Path) -> list[str]:
    """Faults of committed checkpoints. A folder without a manifest is not a checkpoint, so it is no fault."""
    folders = sorted((run_dir / checkpoint.FOLDER).glob("step-*"))
    whole = [folder for folder in folders if (folder / checkpoint.MANIFEST).is_file()]
    return [fault for folder in whole for fault in checkpoint.problems(folder)]


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
