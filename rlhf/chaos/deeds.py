"""The faults that are files: a full disk, within bounds, and a changed byte."""

import errno
import os
import random
import shutil
from pathlib import Path

from rlhf import checkpoint
from rlhf.buffer.schema import FILE_NAME
from rlhf.chaos.journal import BALLAST_FILE

_MIB = 1 << 20
_BLOCK = 4096
_SQLITE_HEADER = 100  # bytes; a file without it is no database at all


def room_mib(run_dir: Path) -> float:
    """Free space on the file system of the run directory."""
    return shutil.disk_usage(run_dir).free / _MIB


def fill_disk(run_dir: Path, mib: int) -> str:
    """Writes the ballast until nothing is left, in falling portions; does nothing where more than `mib` are free."""
    if room_mib(run_dir) > mib:
        return f"not filled: {room_mib(run_dir):.0f} MiB are free, the limit is {mib}"
    written, portion = 0, _MIB
    with (run_dir / BALLAST_FILE).open("ab", buffering=0) as file:
        while written < mib * _MIB:
            try:
                written += file.write(b"\0" * portion)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                if portion == _BLOCK:
                    break
                portion = _BLOCK
    return f"filled with {written / _MIB:.1f} MiB"


def free_disk(run_dir: Path) -> None:
    (run_dir / BALLAST_FILE).unlink(missing_ok=True)


def corrupt(run_dir: Path, what: str, generator: random.Random) -> str:
    """Changes one byte of the newest checkpoint, or of the experience buffer; says which."""
    if what == "buffer":
        path, start = run_dir / FILE_NAME, _SQLITE_HEADER
    else:
        newest = checkpoint.latest(run_dir)
        files = sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size) if newest else []
        if not files:
            return "nothing changed: there is no checkpoint"
        path, start = generator.choice(files), 0
    if not path.is_file() or path.stat().st_size <= start:
        return f"nothing changed: {path.name} is not there yet"
    place = generator.randrange(start, path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(place)
        before = file.read(1)[0]
        file.seek(place)
        file.write(bytes([before ^ 0xFF]))
        file.flush()
        os.fsync(file.fileno())
    return f"{path.relative_to(run_dir)}: byte {place} changed from {before} to {before ^ 0xFF}"
