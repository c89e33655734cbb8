"""What it takes to build a team, in one process or on Ray, and what every team does once it stands."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from rlhf.blueprint import Blueprint
from rlhf.cluster import Cluster
from rlhf.data.offline import DatasetGenerator, OfflineSet
from rlhf.experience import Prompt
from rlhf.interfaces import Buffer, Learner, Workers
from rlhf.loop import Team
from rlhf.sources import JudgeDesk, PolicySource, PromptSupply
from rlhf.workers import LocalWorkers, answers

MAX_ATTEMPTS = 3  # a prompt whose work came to nothing so often is dropped, with the reason


class Prompts(PromptSupply, Protocol):
    """The prompts of a run, or its preferences or demonstrations, and a hash of them, so that a run does not go on with
    other data."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def dropped(self) -> Mapping[str, int]:
        """How many rows were left out, by reason."""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt; where the rows hold answers, with the longest answer."""

    def heldout_prompts(self) -> list[Prompt]: ...

    def describe(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Order:
    """A team to build. checkpoint, the folder to go on from, None for a new run; first_step, the updates before it."""

    blueprint: Blueprint
    cluster: Cluster
    run_dir: Path
    prompts: Prompts
    checkpoint: Path | None
    first_step: int
    stop: Callable[[], bool]
    note: Callable[[str], None]


def pins(order: Order) -> dict[str, str]:
    """What must be the same whenever the run goes on, or its prompt ids would mean something else."""
    return {"seed": str(order.blueprint.config.seed), "data": order.prompts.fingerprint}


def dataset_workers(order: Order) -> Workers | None:
    """What stands in for rollout engines in a run on preferences or demonstrations: it looks rows up, in the driver."""
    if not isinstance(order.prompts, OfflineSet):
        return None
    return LocalWorkers("data", partial(answers, DatasetGenerator(order.prompts)), None)


def examines(order: Order, judge: str) -> bool:
    """Whether evaluation wants a judge's columns: the reward of an answer; for rows of the data, all that the loss
    reads."""
    return judge == "reward" or not order.blueprint.samples


class Ledger(Buffer, Protocol):
    def rewind(self, step: int) -> None: ...


def assemble(
    order: Order, learner: Learner, ledger: Ledger, rollouts: Workers, desks: Sequence[JudgeDesk]
) -> tuple[Team, PolicySource]:
    """Brings learner and ledger to the same step and the groups that wait for judges to their judges."""
    if order.checkpoint is not None:
        learner.load(order.checkpoint)
    ledger.rewind(order.first_step)
    source = PolicySource(order.blueprint.demand, order.prompts, ledger, rollouts, desks, order.stop)
    waiting = source.resume()
    if waiting:
        order.note(f"{waiting} stored groups go to their judges; none of them is generated again")
    return Team(source, learner, ledger), source
