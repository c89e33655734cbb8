"""Places that a command is told to write to: what the system refuses is bad input, with the option that named it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.errors import BadInput, RunFailed


@contextmanager
def writing(option: str, place: Path) -> Iterator[None]:
    """A block that writes to a place. Raises BadInput when the place cannot be written to, RunFailed on a full disk."""
    try:
        yield
    except OSError as error:
        what = f"{option} {place}: cannot be written: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFailed(f"{what}. Next: make room, then give the same command again") from error
        raise BadInput(f"{what}; expected a folder that can be made, or a file in one") from error
