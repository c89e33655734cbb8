"""The judge actor: hosts the reference model, the reward function, or any other judge."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import ray

from rlhf.experience import Group
from rlhf.interfaces import Judge


class JudgeHost:
    """One judge. It is built inside the actor, so that nothing heavy travels; `build` is a function of this project."""

    def __init__(self, build: Callable[..., Judge], arguments: tuple[Any, ...]) -> None:
        self._judge = build(*arguments)

    def setup(self) -> None:
        self._judge.setup()

    def work(self, group: Group) -> Iterator[Any]:
        """(prompt id, seconds), then the columns."""
        before = time.monotonic()
        columns = self._judge.judge(group)
        yield group.prompt.id, time.monotonic() - before
        yield columns

    def close(self) -> None:
        self._judge.close()


JudgeActor = ray.remote(JudgeHost)
