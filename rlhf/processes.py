"""What a process asks of Linux about its own end and its children's. Light: the keeper of a run's Ray imports it."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def prctl(option: int, value: int) -> None:
    """Linux's prctl(2) with one argument; raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def end_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends, in whatever way, and also if it has ended already.

    Strictly, when the thread of the parent ends that started this process: it must be one that lives as long."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
