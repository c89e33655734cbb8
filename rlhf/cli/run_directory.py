"""The run directory before a run: new, to be gone on with, or to be moved aside. Nothing is ever deleted here."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from rlhf import checkpoint
from rlhf.buffer.schema import FILE_NAME, DamagedExperience
from rlhf.buffer.snapshot import moment_of
from rlhf.cli.folders import writing
from rlhf.cluster import Cluster
from rlhf.config import RunConfig
from rlhf.config_file import differing_keys, dump, load_run
from rlhf.durable import BESIDE, replace_durably
from rlhf.errors import BadInput
from rlhf.observers import METRICS_FILE
from rlhf.ui.report import DATA_FILE

CONFIG_FILE = "config.yaml"
CLUSTER_FILE = "cluster.yaml"
LOCK_FILE = ".lock"
KIND_FILE = "kind"
OPTION = "--run-dir"

# What a run directory is for. Its prompts are issued and taken by other rules for each, so none goes on with another's.
Kind = Literal["training", "pairs"]
HOLDS: dict[Kind, str] = {
    "training": "a training run (`rlhf run`)",
    "pairs": "answers and scores of `rlhf data pairs`",
}

# Keys that may change when a run is gone on with: none of them changes a step that is already history.
MAY_CHANGE = (
    "loop.num_steps",
    "loop.checkpoint_every",
    "loop.keep_checkpoints",
    "loop.keep_best",
    "loop.eval_every",
    "loop.wait_timeout_s",
    "loop.max_restarts",
    "reward.timeout_s",
    "learner.engine",  # these two: another order of sums, equal maths
    "learner.zero_stage",
    "reward.retries",
    "reward.backoff_s",
    "reward.max_failed_in_a_row",
    "reward.max_dropped_fraction",
    "evaluation.",
)


@contextmanager
def settled(run_dir: Path, config: RunConfig, cluster: Cluster, kind: Kind, *, fresh: bool) -> Iterator[list[str]]:
    """Holds a directory that is ours alone, with this config and this cluster, and the run so far if it is the same;
    yields what there is to tell.

    The lock comes first: nothing is moved or written under a run that is alive. With `fresh` an old directory is moved
    to <name>.old-<number>; so is one in which another start, refused late, left nothing to go on with. Raises BadInput
    when the directory holds another run, or something that is not a run, or when another process runs it."""
    check_directory(run_dir, config, kind, fresh=fresh)
    told = []
    if not is_empty(run_dir) and (fresh or _holds_another(run_dir, config, kind)):
        with held(run_dir):
            check_directory(run_dir, config, kind, fresh=fresh)  # again: it may have begun since
            aside = run_dir.rename(_free_name(run_dir))
        told.append(f"{run_dir}: what it held is moved to {aside}")
    with held(run_dir):
        check_directory(run_dir, config, kind, fresh=False)  # again: another process may have come before the lock
        with writing(OPTION, run_dir):
            replace_durably(run_dir / CONFIG_FILE, dump(config))
            replace_durably(run_dir / CLUSTER_FILE, dump(cluster))
            replace_durably(run_dir / KIND_FILE, kind + "\n")
        yield told


def is_empty(run_dir: Path) -> bool:
    """Missing, or without anything but a lock: the mark of a process that died before its first file stood."""
    return not run_dir.is_dir() or all(path.name == LOCK_FILE for path in run_dir.iterdir())


def check_directory(run_dir: Path, config: RunConfig, kind: Kind, *, fresh: bool) -> None:
    """The refusals of `settled` but for the lock, changing nothing."""
    with writing(OPTION, run_dir):
        if run_dir.exists() and not run_dir.is_dir():
            raise BadInput(f"--run-dir {run_dir}: is a file; expected a folder, or nothing")
    # It would be taken for a part of the outer one: for one of its checkpoints, or for what a copy of it holds.
    for outer in run_dir.absolute().parents:
        if (outer / CONFIG_FILE).is_file() and (outer / FILE_NAME).is_file():
            raise BadInput(f"--run-dir {run_dir}: is inside another run, {outer}; expected a folder outside")
    if fresh:
        return
    if (run_dir / CONFIG_FILE).is_file():
        if _has_begun(run_dir):
            _check_kind(run_dir, kind)
            _check_same_run(run_dir, config)
    elif run_dir.is_dir() and (found := {path.name for path in run_dir.iterdir()} - {CONFIG_FILE + BESIDE, LOCK_FILE}):
        there = ", ".join(sorted(found)[:5])
        raise BadInput(f"--run-dir {run_dir}: holds {there} but no {CONFIG_FILE}; expected a run or an empty folder")


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Holds the run directory, made where it is missing: one run at a time. Raises BadInput, naming the process, when
    another one has it.

    The lock is the kernel's and ends with the process, however that ends."""
    with writing(OPTION, run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        opened = (run_dir / LOCK_FILE).open("a+")
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise BadInput(
                f"--run-dir {run_dir}: is being run by process {file.read().strip() or 'unknown'}. Next: wait for it, "
                "stop it, or choose another --run-dir"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def read_config(run_dir: Path) -> RunConfig:
    """The resolved run file of a run directory. Raises BadInput when it is not one."""
    if not (run_dir / CONFIG_FILE).is_file():
        raise BadInput(f"{run_dir}: not a run directory: it has no {CONFIG_FILE}")
    return load_run(run_dir / CONFIG_FILE, [])


def _has_begun(run_dir: Path) -> bool:
    """Whether a prompt was issued there or a step trained. Where none was, and the files are ours, they are those of a
    start that was refused late or killed early, and bind nobody."""
    buffer = run_dir / FILE_NAME
    if not (run_dir / KIND_FILE).is_file() or checkpoint.folders(run_dir):
        return True
    try:
        return buffer.is_file() and moment_of(buffer).issued > 0
    except DamagedExperience:
        return True


def _holds_another(run_dir: Path, config: RunConfig, kind: Kind) -> bool:
    if not (run_dir / CONFIG_FILE).is_file():
        return False
    try:
        _check_kind(run_dir, kind)
        _check_same_run(run_dir, config)
    except BadInput:
        return True
    return False


def _check_kind(run_dir: Path, kind: Kind) -> None:
    there = _kind_of(run_dir)
    if there is not None and there != kind:
        raise BadInput(
            f"--run-dir {run_dir}: holds {HOLDS[there]}, which would be lost to {HOLDS[kind]}. Next: another --run-dir"
        )


def _kind_of(run_dir: Path) -> Kind | None:
    """None where it cannot be told: directories of before this file was written, in which nothing was trained yet."""
    path = run_dir / KIND_FILE
    if path.is_file():
        return "pairs" if path.read_text(encoding="utf-8").strip() == "pairs" else "training"
    trained = any((run_dir / name).exists() for name in (METRICS_FILE, DATA_FILE, checkpoint.FOLDER))
    return "training" if trained else None


def _check_same_run(run_dir: Path, config: RunConfig) -> None:
    old = read_config(run_dir)
    differing = [key for key in differing_keys(old, config) if not key.startswith(MAY_CHANGE)]
    fixed = [key for key in differing if _in_package(_value(old, key)) != _in_package(_value(config, key))]
    if old.loop.num_steps != config.loop.num_steps and config.learner.schedule != "constant":
        fixed.append("loop.num_steps")  # the learning rate of every step depends on the last one
    if fixed:
        changes = "; ".join(f"{key} was {_value(old, key)}, now {_value(config, key)}" for key in fixed)
        raise BadInput(
            f"--run-dir {run_dir}: holds another run: {changes}. Next: another --run-dir, --fresh to move the old one "
            "aside, or the old values"
        )


def _in_package(value: object) -> object:
    """A path without the folder in which Ray unpacked what a job brought along: each submission has another one."""
    return re.sub(r".*/_ray_pkg_[0-9a-f]+/", "", value) if isinstance(value, str) else value


def _value(config: BaseModel, key: str) -> object:
    place: object = config.model_dump(mode="json")
    for part in key.split("."):
        if not isinstance(place, dict) or part not in place:
            return "not set"
        place = place[part]
    return place


def _free_name(run_dir: Path) -> Path:
    number = 1
    while (candidate := run_dir.with_name(f"{run_dir.name}.old-{number}")).exists():
        number += 1
    return candidate
