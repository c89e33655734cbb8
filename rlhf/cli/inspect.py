"""`rlhf inspect`: where a run stands, read-only, also while it is running."""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf import checkpoint, watchdog
from rlhf.buffer.audit import ExperienceView, Overview
from rlhf.buffer.schema import FILE_NAME
from rlhf.cli.exit_codes import DONE
from rlhf.cli.run_directory import read_config
from rlhf.evaluation.heldout import HeldoutMeasures
from rlhf.observers import EVALUATIONS_FILE, METRICS_FILE, duration, lines_in_words, read_steps, summary
from rlhf.ui.report import DATA_FILE
from rlhf.workers import held

RECENT_STEPS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    state = standing(arguments.run_dir)
    print(json.dumps(state) if arguments.json else _in_words(state))
    return DONE


def standing(run_dir: Path) -> dict[str, Any]:
    """Everything that `inspect` tells, as plain values. Raises BadInput when the folder holds no run."""
    config = read_config(run_dir)
    overview = _overview(run_dir)
    unreadable: list[str] = []
    metrics = _rows(run_dir / METRICS_FILE, unreadable)
    evaluations = _rows(run_dir / EVALUATIONS_FILE, unreadable)
    newest, rejected = checkpoint.newest(run_dir)
    recent = [row["time/step_s"] for row in metrics[-RECENT_STEPS:] if "time/step_s" in row]
    return {
        "run_dir": str(run_dir),
        "algorithm": config.algorithm.name,
        "model": config.model.name,
        "num_steps": config.loop.num_steps,
        "steps_trained": overview["steps_trained"] if overview else 0,
        "experience": overview,
        "checkpoint": str(newest.folder) if newest else None,
        "checkpoints_refused": [f"{entry.folder}: {entry.reason}" for entry in rejected],
        "seconds_a_step": sum(recent) / len(recent) if recent else None,
        "idle_s": _idle(run_dir),
        "status": _status(run_dir, unreadable),
        "last_metrics": metrics[-1] if metrics else None,
        "data": _data(run_dir, unreadable),
        "evaluations": [
            {key: row[key] for key in ("step", "reward_mean", "reward_std", "n", "values") if key in row}
            for row in evaluations
        ],
        "unreadable": unreadable,
    }


def _rows(path: Path, unreadable: list[str]) -> list[dict[str, Any]]:
    """What is whole of a log; what is not is added to `unreadable`."""
    rows, damaged = read_steps(path)
    if damaged:
        unreadable.append(f"{path}: {lines_in_words(damaged)}")
    return rows


def _status(run_dir: Path, unreadable: list[str]) -> dict[str, Any] | None:
    """What the run is at, and whether its process is alive (None: on another machine); None when it has ended."""
    try:
        status = watchdog.read(run_dir)
    except (ValueError, TypeError) as error:  # no JSON, or not what a run says of itself
        unreadable.append(f"{run_dir / watchdog.STATUS_FILE}: damaged: {error}")
        return None
    return None if status is None else {**asdict(status), "alive": status.alive()}


def _status_in_words(state: dict[str, Any]) -> str:
    told = dict(state)
    alive = told.pop("alive")
    now = watchdog.in_words(watchdog.Status(**told))
    where = f"process {told['pid']} on {told['host']}"
    if alive is False:
        return f"not running: {where} ended without a word; it was at: {now}"
    return f"now: {now} ({where})" + (", without progress" if told["stalled"] else "")


def _overview(run_dir: Path) -> dict[str, Any] | None:
    """None before the run has made its buffer."""
    path = run_dir / FILE_NAME
    if not path.exists():
        return None
    overview: Overview = ExperienceView(path).overview()
    return asdict(overview)


def _data(run_dir: Path, unreadable: list[str]) -> dict[str, Any] | None:
    """What the data was and what of it was left out; None for a run that has not begun."""
    path = run_dir / DATA_FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        return {"data": found["data"], "dropped": found["dropped"]}
    except (ValueError, TypeError, KeyError) as error:
        unreadable.append(f"{path}: damaged: {error}")
        return None


def _idle(run_dir: Path) -> float | None:
    """Seconds since the last step was written, None before the first."""
    path = run_dir / METRICS_FILE
    return time.time() - path.stat().st_mtime if path.exists() else None


def _in_words(state: dict[str, Any]) -> str:
    lines = [
        f"{state['algorithm']} on {state['model']}: {state['steps_trained']} of {state['num_steps']} steps trained"
    ]
    if state["seconds_a_step"] is not None:
        left = state["seconds_a_step"] * (state["num_steps"] - state["steps_trained"])
        lines.append(f"{state['seconds_a_step']:.1f} s a step lately, {duration(left)} left at this pace")
    if state["idle_s"] is not None:
        lines.append(f"last step written {duration(state['idle_s'])} ago")
    if state["status"]:
        lines.append(_status_in_words(state["status"]))
    if state["last_metrics"]:
        lines.append(f"last step: {summary(state['last_metrics'])}")
    lines += _experience_in_words(state["experience"])
    lines.append(f"newest checkpoint: {state['checkpoint'] or 'none yet'}")
    lines += [f"not used: {refused}" for refused in state["checkpoints_refused"]]
    if state["data"]:
        lines.append(f"data: {state['data']['data']}")
    for row in state["evaluations"]:
        if "values" in row:
            lines.append(f"held-out after {row['step']} steps: {HeldoutMeasures(**row).describe()}")
            continue
        mean, deviation = row["reward_mean"], row["reward_std"]
        lines.append(f"held-out after {row['step']} steps: reward {mean:.4g} ± {deviation:.2g} over {row['n']} answers")
    lines += [f"not readable: {what}" for what in state["unreadable"]]
    return "\n".join(lines)


def _experience_in_words(overview: dict[str, Any] | None) -> list[str]:
    if overview is None:
        return ["no experience yet"]
    lines = ["prompts: " + "  ".join(f"{name} {count}" for name, count in overview["counts"].items())]
    if overview["last_version"] is not None:
        lines.append(f"policy version {overview['last_version']} (fingerprint {overview['last_fingerprint']})")
    lines += [f"step {step} is taken and not yet trained" for step in overview["steps_taken"]]
    lines += [
        held(owner, lease["prompt_ids"], None, max(0.0, time.time() - lease["since"]))
        for owner, lease in overview["leases"].items()
    ]
    lines += [f"{count} prompts dropped: {reason}" for reason, count in overview["drop_reasons"].items()]
    lines += [f"{count} groups discarded: {reason}" for reason, count in overview["discard_reasons"].items()]
    return lines
