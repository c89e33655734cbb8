"""The status file and the watchdog, by themselves. A live run's status is looked at in tests/test_recovery.py."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rlhf import watchdog
from rlhf.watchdog import STATUS_FILE, Watchdog


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_phase_without_progress_is_named_once_and_in_the_file(tmp_path: Path) -> None:
    told: list[str] = []
    with Watchdog(tmp_path, 0.2, told.append) as dog:
        dog.asks(lambda: ("buffer: committing step 3 (the buffer actor)", time.time() - 60))
        dog.enter("step 4: waiting for groups")
        wait_for(lambda: bool(told))
        wait_for(lambda: (status := watchdog.read(tmp_path)) is not None and status.stalled)
        dog.follows(time.monotonic)
        assert not dog.look().stalled
        dog.follows(lambda: 0.0)
        assert dog.look().stalled
        time.sleep(3 * watchdog.POLL_S)  # the same phase again: nothing new to say
        assert len(told) == 1 and "no progress" in told[0]
        assert "step 4: waiting for groups" in told[0] and "committing step 3 (the buffer actor) for 1m00s" in told[0]
        dog.enter("step 4: training")
        wait_for(lambda: len(told) == 2)
        assert "step 4: training" in told[1]
    assert not (tmp_path / STATUS_FILE).exists()


def test_a_folder_that_cannot_be_written_ends_neither_the_watch_nor_the_run(tmp_path: Path) -> None:
    """As with a full disk: once there is room again the file is there, and phases are still named."""
    told: list[str] = []
    gone = tmp_path / "gone"
    with Watchdog(gone, 0.1, told.append) as dog:
        wait_for(lambda: bool(told))
        dog.enter("step 2: training")
        wait_for(lambda: len(told) == 2)
        gone.mkdir()
        wait_for(lambda: (gone / STATUS_FILE).exists())


def test_a_run_with_progress_is_not_disturbed(tmp_path: Path) -> None:
    told: list[str] = []
    with Watchdog(tmp_path, 30.0, told.append) as dog:
        wait_for(lambda: (tmp_path / STATUS_FILE).exists())
        status = watchdog.read(tmp_path)
        assert status is not None and status.pid == os.getpid() and status.alive() and not status.stalled
        # Another process that was given the number of a dead one is not taken for it; another host is not judged.
        assert replace(status, process_began=1.0).alive() is False
        assert replace(status, host="elsewhere").alive() is None
        assert json.loads((tmp_path / STATUS_FILE).read_text())["doing"] == "starting"
        assert dog.look().doing == "starting"
    assert not told
