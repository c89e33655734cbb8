"""The judge actor: hosts the reference model, the reward function, or any other judge."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import ray

from actors.worker import Place, place_of_this_actor
from rlhf.errors import RunFailed
from rlhf.experience import Group
from rlhf.interfaces import Judge
from rlhf.judges.reference import ReferenceJudge


class JudgeHost:
    """One judge. It is built inside the actor, so that nothing heavy travels; `build` is a function of this project."""

    def __init__(self, build: Callable[..., Judge], arguments: tuple[Any, ...]) -> None:
        self._judge = build(*arguments)

    def where(self) -> Place:
        return place_of_this_actor()

    def setup(self) -> None:
        self._judge.setup()

    def work(self, group: Group) -> Iterator[Any]:
        """None and None, which is a mark: it has begun; then the columns and (prompt id, seconds)."""
        yield None
        yield None
        before = time.monotonic()
        columns = self._judge.judge(group)
        yield columns
        yield group.prompt.id, time.monotonic() - before

    def sleep(self) -> None:
        """Gives its GPU up until `wake`; of judges that can."""
        self._sleeper().sleep()

    def wake(self) -> None:
        self._sleeper().wake()

    def _sleeper(self) -> ReferenceJudge:
        if not isinstance(self._judge, ReferenceJudge):
            raise RunFailed(f"a {type(self._judge).__name__} cannot sleep; only the reference model takes turns")
        return self._judge

    def close(self) -> None:
        self._judge.close()


JudgeActor = ray.remote(JudgeHost)
