"""Frees the locks that a killed process left on torch's C++ extensions.

DeepSpeed compiles one when its ranks first meet, and looks at it at each start. Meanwhile torch keeps a file named
`lock`; a rank that is killed there leaves it, and every later start on the machine would wait for it for ever."""

import fcntl
import os
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

GUARD = ".rlhf-guard"
SHARED = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "fuse", "9p", "afs")


def free_abandoned_locks() -> list[Path]:
    """Removes and returns the locks of the extensions' folder that no process of this machine holds open.

    Torch keeps a lock open for as long as it is valid. Nothing is done where other machines may hold it."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    if not root.is_dir() or _is_shared(root):
        return []
    freed = []
    with (root / GUARD).open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # ranks start together; it ends with its holder
        for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
            if not _is_held(lock):
                lock.unlink(missing_ok=True)
                freed.append(lock)
    return freed


def _is_held(lock: Path) -> bool:
    """Whether a process has it open, or one of this user's that may not be looked into might."""
    for process in psutil.process_iter():
        try:
            if process.uids().effective != os.getuid():
                continue
            entries = list(Path(f"/proc/{process.pid}/fd").iterdir())
        except (psutil.NoSuchProcess, FileNotFoundError):
            continue
        except PermissionError:
            return True
        if any(_is_same(entry, lock) for entry in entries):
            return True
    return False


def _is_same(entry: Path, lock: Path) -> bool:
    try:
        return entry.samefile(lock)
    except OSError:  # closed meanwhile, or no file
        return False


def _is_shared(folder: Path) -> bool:
    """Whether the folder lies on a file system of several machines."""
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(part.mountpoint)]
    return bool(mounts) and max(mounts, key=lambda part: len(part.mountpoint)).fstype.lower().startswith(SHARED)
