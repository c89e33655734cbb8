"""`--pdb`: a debugger at the place where an error was raised."""

import pdb
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def post_mortem() -> Iterator[None]:
    """Shows an error of the block whole and opens pdb in the frame of its first cause; on leaving it, the error rises.

    The team is dismissed by then: values can be looked at, engines and the buffer are closed."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        pdb.post_mortem(cause.__traceback__)
        raise
