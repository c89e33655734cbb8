"""Checkpoints: written beside, synced, renamed; the manifest with the checksum of every part goes last.

A directory without a valid manifest is not a checkpoint. `step-000010` was written after ten updates: a run that
loads it goes on with step 10. What is inside belongs to the learner; this module only makes it whole or absent.
Imports neither torch nor ray."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rlhf.chaos.points import point

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
FORMAT = 1
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint: its folder, the updates before it, and what the run said about it."""

    folder: Path
    updates: int
    info: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A folder that looks like a checkpoint and is not a whole one, with the file and the reason."""

    folder: Path
    reason: str


def write(run_dir: Path, updates: int, info: Mapping[str, Any], save: Callable[[Path], None]) -> Checkpoint:
    """Has `save` fill a folder, then commits it; at no moment is there a half checkpoint under its final name.

    A valid checkpoint of the same step is kept as it is. A folder of that name that is not valid makes way.
    """
    final = run_dir / FOLDER / f"step-{updates:06d}"
    if final.exists():
        if not problems(final):
            return read(final)
        _remove(final)
    beside = final.with_name(f".{final.name}.{os.getpid()}")
    _remove(beside)
    beside.mkdir(parents=True)
    point("checkpoint: folder made")
    save(beside)
    point("checkpoint: parts written")
    seal(beside, updates, info)
    os.rename(beside, final)
    point("checkpoint: renamed")
    _sync(final.parent)
    point("checkpoint: committed")
    return read(final)


def seal(folder: Path, updates: int, info: Mapping[str, Any]) -> None:
    """Syncs what is in a folder and writes the manifest with the checksum of every file, last."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _sync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "blake2b": _checksum(path)}
    point("checkpoint: parts synced")
    manifest = {"format": FORMAT, "updates": updates, "info": dict(info), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _sync(folder / MANIFEST)
    point("checkpoint: manifest written")
    for inner in [p for p in folder.rglob("*") if p.is_dir()] + [folder]:
        _sync(inner)


def newest(run_dir: Path) -> tuple[Checkpoint | None, list[Rejected]]:
    """The newest valid checkpoint, checked byte by byte, and the newer folders that were refused, with reasons."""
    rejected: list[Rejected] = []
    for folder in reversed(folders(run_dir)):
        found = problems(folder)
        if not found:
            return read(folder), rejected
        rejected.append(Rejected(folder, found[0]))
    return None, rejected


def latest(run_dir: Path) -> Path | None:
    """The folder of the newest valid checkpoint, or None."""
    checkpoint, _ = newest(run_dir)
    return checkpoint.folder if checkpoint else None


def problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, a line a fault, each with the file's name; empty when it is whole."""
    path = folder / MANIFEST
    if not path.is_file():
        return [f"{path}: missing, so the checkpoint was never finished"]
    try:
        manifest = json.loads(path.read_text())
        files = dict(manifest["files"])
        if manifest["format"] != FORMAT:
            return [f"{path}: format {manifest['format']}, this version reads format {FORMAT}"]
        if outside := [name for name in files if not stays_inside(name)]:
            return [f"{path}: names {outside[0]!r}, which is not inside of the checkpoint"]
        return [fault for name, entry in files.items() if (fault := _fault(folder / name, entry))]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{path}: unreadable: {error!r}"]


def stays_inside(name: str) -> bool:
    """Whether a manifest's name of a file can only be one below the manifest's folder, as `seal` writes them."""
    parts = PurePosixPath(name).parts
    return bool(parts) and name == "/".join(parts) and ".." not in parts


def committed(run_dir: Path) -> list[int]:
    """The updates before each checkpoint that looks whole, ascending: files and sizes, not checksums."""
    return [updates_of(folder.name) for folder in folders(run_dir) if _looks_whole(folder)]


def folders(run_dir: Path) -> list[Path]:
    """Everything under a checkpoint's name, whole or not, oldest first."""
    named = [folder for folder in (run_dir / FOLDER).glob("step-*") if folder.name.removeprefix("step-").isdecimal()]
    return sorted(named, key=lambda folder: updates_of(folder.name))


def updates_of(name: str) -> int:
    """10 of `step-000010`."""
    return int(name.removeprefix("step-"))


def prune(run_dir: Path, keep: int, also: Collection[int]) -> list[Path]:
    """Removes all checkpoints but the newest `keep` whole ones and those of the updates in `also`, and what
    interrupted writes left; returns what it removed.

    Call it only once a newer checkpoint is committed.
    """
    root = run_dir / FOLDER
    kept = {*committed(run_dir)[-keep:], *also}
    old = [folder for folder in folders(run_dir) if updates_of(folder.name) not in kept]
    left = sorted(root.glob(".step-*"))
    for folder in old:
        _remove(folder)
    for folder in left:
        shutil.rmtree(folder)
    point("checkpoint: old ones removed")
    return old + left


def read(folder: Path) -> Checkpoint:
    """What the manifest of a valid checkpoint says."""
    manifest = json.loads((folder / MANIFEST).read_text())
    return Checkpoint(folder, int(manifest["updates"]), manifest["info"])


def _fault(path: Path, entry: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != entry["size"]:
        return f"{path}: {path.stat().st_size} bytes, the manifest says {entry['size']}"
    if _checksum(path) != entry["blake2b"]:
        return f"{path}: its bytes are not those that were written (checksum differs)"
    return None


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _looks_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all(
            stays_inside(name) and (folder / name).stat().st_size == entry["size"] for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _remove(folder: Path) -> None:
    """Removes a folder; it loses its name first, so that a removal that is cut short leaves no half checkpoint."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name.lstrip('.')}.removed.{os.getpid()}")
        os.rename(folder, gone)
        point("checkpoint: old one renamed")
        shutil.rmtree(gone)
