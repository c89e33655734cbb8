"""Checkpoints: written beside, synced, renamed; the manifest with the checksum of every part goes last.

A directory without a valid manifest is not a checkpoint. `step-000010` was written after ten updates: a run that
loads it goes on with step 10. What is inside belongs to the learner; this module only makes it whole or absent.
Imports neither torch nor ray."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
            return _read(final)
        _remove(final)
    beside = final.with_name(f".{final.name}.{os.getpid()}")
    _remove(beside)
    beside.mkdir(parents=True)
    save(beside)
    files = {}
    for path in sorted(p for p in beside.rglob("*") if p.is_file()):
        _sync(path)
        files[path.relative_to(beside).as_posix()] = {"size": path.stat().st_size, "blake2b": _checksum(path)}
    manifest = {"format": FORMAT, "updates": updates, "info": dict(info), "files": files}
    (beside / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _sync(beside / MANIFEST)
    for folder in [p for p in beside.rglob("*") if p.is_dir()] + [beside]:
        _sync(folder)
    os.rename(beside, final)
    _sync(final.parent)
    return _read(final)


def newest(run_dir: Path) -> tuple[Checkpoint | None, list[Rejected]]:
    """The newest valid checkpoint, checked byte by byte, and the newer folders that were refused, with reasons."""
    rejected: list[Rejected] = []
    for folder in sorted((run_dir / FOLDER).glob("step-*"), reverse=True):
        found = problems(folder)
        if not found:
            return _read(folder), rejected
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
        return [fault for name, entry in files.items() if (fault := _fault(folder / name, entry))]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{path}: unreadable: {error!r}"]


def prune(run_dir: Path, keep: int) -> list[Path]:
    """Removes all but the newest `keep` checkpoints and what interrupted writes left; returns what it removed.

    Call it only after a newer checkpoint is committed.
    """
    root = run_dir / FOLDER
    old = sorted(root.glob("step-*"), reverse=True)[keep:] + sorted(root.glob(".step-*"))
    for folder in old:
        _remove(folder)
    return old


def _read(folder: Path) -> Checkpoint:
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


def _remove(folder: Path) -> None:
    """Removes a folder; the manifest first, so that a removal that is cut short leaves no checkpoint."""
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
