"""Faults on purpose for one run: checks the chaos file, and puts the listener and the injector in place."""

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.chaos import deeds, points
from rlhf.chaos.journal import PLAN_FILE, Journal
from rlhf.chaos.listener import PointFaults
from rlhf.chaos.plan import ChaosPlan, FillDisk, Kill, Stop
from rlhf.config_file import dump, load_chaos
from rlhf.durable import replace_durably
from rlhf.errors import BadInput, RunFailed

START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 10.0


def check_chaos(path: Path, run_dir: Path, *, fresh: bool, in_process: bool) -> ChaosPlan:
    """The chaos file. Raises BadInput for one that cannot be used, or that is not the one this run was started with."""
    plan = load_chaos(path)
    before = run_dir / PLAN_FILE
    if not fresh and before.exists() and Journal(run_dir).faults() and load_chaos(before) != plan:
        raise BadInput(
            f"--chaos {path}: differs from {before}, whose faults this run goes on with; expected the same file, or "
            "--fresh"
        )
    struck = {role for fault in plan.faults if isinstance(fault, Kill | Stop) for role in fault.roles}
    if in_process and struck - {"driver"}:
        raise BadInput(
            f"--chaos {path}: with --in-process there is only the driver, no process of its own for "
            f"{', '.join(sorted(struck - {'driver'}))}"
        )
    largest = max([fault.mib for fault in plan.faults if isinstance(fault, FillDisk)], default=None)
    place = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.is_dir())
    if largest is not None and (free := deeds.room_mib(place)) > largest:
        raise BadInput(
            f"--chaos {path}: the disk of {run_dir} has {free:.0f} MiB free and fill_disk.mib is {largest}: it would "
            "not be full; expected a run directory on a small file system, such as a tmpfs with size=128m"
        )
    return plan


@contextmanager
def faults_on_purpose(plan: ChaosPlan | None, run_dir: Path) -> Iterator[None]:
    """Strikes what happens in this block; nothing without a plan."""
    if plan is None:
        os.environ.pop(points.RUN_VARIABLE, None)  # of a run that started this one
        yield
        return
    place = run_dir.absolute()
    deeds.free_disk(place)  # what a killed run may have left
    replace_durably(place / PLAN_FILE, dump(plan))
    os.environ[points.RUN_VARIABLE] = str(place)
    points.listen(PointFaults(place, "driver"))
    try:
        if plan.watched:
            with _injector(place):
                yield
        else:
            yield
    finally:
        points.listen(None)
        del os.environ[points.RUN_VARIABLE]


@contextmanager
def _injector(run_dir: Path) -> Iterator[None]:
    """The process beside; the pipe to its standard input closes with this block, or with this process."""
    command = [sys.executable, "-m", "rlhf.chaos.injector", str(run_dir), str(os.getpid())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        if not select.select([process.stdout], [], [], START_TIMEOUT_S)[0] or not os.read(process.stdout.fileno(), 64):
            raise RunFailed(f"the process that injects faults (rlhf.chaos.injector, {process.pid}) did not come up")
        yield  # it is ready; what happens from now on, it sees
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=END_TIMEOUT_S)  # it ends at the end of its input
        except subprocess.TimeoutExpired:
            process.kill()
