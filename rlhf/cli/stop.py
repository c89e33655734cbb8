"""How a run is asked to stop: by signals."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Set by the first SIGINT or SIGTERM; the run then stops at the next safe point. Immediate are the second SIGINT,
    and any of them while a team is set up and there is nothing to save."""

    def __init__(self) -> None:
        self.asked = False
        self.setting_up = True

    def __call__(self) -> bool:
        return self.asked

    @contextmanager
    def listening(self) -> Iterator[None]:
        def ask(number: int, frame: FrameType | None) -> None:
            again = self.asked and number == signal.SIGINT
            self.asked = True
            if again or self.setting_up:
                raise KeyboardInterrupt

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
