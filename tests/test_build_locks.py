"""Locks of torch's extensions that a SIGKILL leaves behind. Not covered: shared file systems."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from rlhf.learner.build_locks import free_abandoned_locks

HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_is_freed_when_its_process_was_killed_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "some_extension" / "lock"
    lock.parent.mkdir(parents=True)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert free_abandoned_locks() == [] and lock.exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=60)
    assert lock.exists() and not FileBaton(str(lock)).try_acquire()
    assert free_abandoned_locks() == [lock] and FileBaton(str(lock)).try_acquire()
