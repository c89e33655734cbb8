"""A full disk: libraries report it in many ways, `rlhf run` in one."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.errors import RunFailed

# What the system, SQLite and the writers of tensors say. Some say nothing of the kind: then the free space tells.
SAID = ("No space left on device", "database or disk is full", "Disk quota exceeded")
FULL_BELOW = 1 << 20  # bytes


class DiskFull(RunFailed):
    """Nothing more can be written."""


@contextmanager
def names_a_full_disk(run_dir: Path) -> Iterator[None]:
    """Whatever fails in this block because nothing more can be written fails with DiskFull, which says so."""
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        place = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.is_dir())
        disk = shutil.disk_usage(place)
        free, causes = disk.free, _chain(error)
        full = disk.total > 0 and free < FULL_BELOW  # /proc has no size at all
        if not full and not any(said in str(cause) for cause in causes for said in SAID):
            raise
        first = str(causes[-1]).strip().splitlines() or [type(causes[-1]).__name__]
        raise DiskFull(
            f"{run_dir}: no space is left on its disk ({free >> 10} KiB free): {first[0]}. Nothing that was committed "
            "is lost. Next: make room, then give the same command again"
        ) from error


def _chain(error: BaseException | None) -> list[BaseException]:
    """An exception and those that led to it, the first of them last."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
