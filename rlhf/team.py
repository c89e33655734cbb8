"""What it takes to build a team, in one process or on Ray, and what every team does once it stands."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from rlhf.admission import PromptSupply
from rlhf.blueprint import Blueprint
from rlhf.cluster import Cluster, Role
from rlhf.data.mixed import MixedSet
from rlhf.data.offline import DatasetGenerator, OfflineSet
from rlhf.data.recorded import RecordedSet
from rlhf.errors import ActorDied
from rlhf.experience import REWARD, Prompt
from rlhf.interfaces import Buffer, Learner, Workers
from rlhf.judges.failures import JudgeFailures
from rlhf.judges.scales import SCALES_FILE, settle_scales
from rlhf.judges.weighted import Scale
from rlhf.loop import Team
from rlhf.mixing import EnginesAndRows, NotAsked
from rlhf.sources import JudgeDesk, PolicySource
from rlhf.workers import LocalWorkers, answers

Part = Literal["team", "trainer", "buffer"]  # what can be built again, the last two while the others go on


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

    def __len__(self) -> int:
        """How many rows are trained on in one epoch."""

    def heldout_prompts(self) -> list[Prompt]: ...

    def describe(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Order:
    """A team to build. checkpoint, the folder to go on from, None for a new run; first_step, the updates before it.

    restarting is told that a part of a team is built again while the rest goes on; it raises RunFailed when that
    happens too often."""

    blueprint: Blueprint
    cluster: Cluster
    run_dir: Path
    prompts: Prompts
    checkpoint: Path | None
    first_step: int
    stop: Callable[[], bool]
    note: Callable[[str], None]
    restarting: Callable[[Part, ActorDied], None]


def roles_of(order: Order) -> dict[str, Role]:
    """The roles that this run has, by name, as the cluster file gives them."""
    blueprint = order.blueprint
    absent = {
        "critic": not blueprint.has_critic,
        "reference": not blueprint.reference_judge,
        "rollout": not blueprint.samples,
        "reward": blueprint.config.reward is None,
    }
    return {name: role for name, role in order.cluster.roles.items() if not absent.get(name, False)}


def pins(order: Order) -> dict[str, str]:
    """What must be the same whenever the run goes on, or its prompt ids would mean something else."""
    pinned = {"seed": str(order.blueprint.config.seed), "data": order.prompts.fingerprint}
    scales = order.run_dir / SCALES_FILE
    return pinned | ({"reward scales": " ".join(scales.read_text().split())} if scales.exists() else {})


def scales_of(order: Order, hire: Callable[[], AbstractContextManager[Workers]]) -> Mapping[str, Scale]:
    """The zero and unit of normalised rewards, measured by the hired judge when the run is new; before `pins`."""
    return settle_scales(order.blueprint.config, order.run_dir, hire, order.note)


def dataset_workers(order: Order) -> Workers | None:
    """What stands in for rollout engines in a run on preferences or demonstrations, or on what another run recorded: it
    looks them up, in the driver."""
    if not isinstance(order.prompts, OfflineSet | RecordedSet):
        return None
    return LocalWorkers("data", partial(answers, DatasetGenerator(order.prompts)), None)


def examines(order: Order, judge: str) -> bool:
    """Whether evaluation wants a judge's columns: the reward of an answer; for rows of the data, all that the loss
    reads."""
    return judge == "reward" or not order.blueprint.samples


def failures_of(order: Order, judge: str) -> JudgeFailures | None:
    """What is done about groups that a judge cannot judge; the reference's errors end the run."""
    reward = order.blueprint.config.reward
    if judge != "reward" or reward is None:
        return None
    return JudgeFailures(reward.max_failed_in_a_row, reward.max_dropped_fraction, order.note)


def beside_rows(order: Order, rollouts: Workers, desks: Sequence[JudgeDesk]) -> tuple[Workers, Sequence[JudgeDesk]]:
    """In a run that mixes, rows are looked up beside the engines, and no reward is asked for them; else nothing new."""
    if not isinstance(order.prompts, MixedSet):
        return rollouts, desks
    is_row = order.prompts.interleaving.is_row
    lookup = LocalWorkers("data", partial(answers, DatasetGenerator(order.prompts)), None)
    count = 2 if order.blueprint.config.mixed_records == "preferences" else 1
    asked = [
        replace(desk, workers=NotAsked(desk.workers, is_row, desk.columns, count)) if REWARD in desk.columns else desk
        for desk in desks
    ]
    return EnginesAndRows(rollouts, lookup, is_row), asked


def assemble(
    order: Order, learner: Learner, buffer: Buffer, rollouts: Workers, desks: Sequence[JudgeDesk]
) -> tuple[Team, PolicySource]:
    """Brings learner and ledger to the same step and the groups that wait for judges to their judges."""
    learner.load(order.checkpoint)
    buffer.rewind(order.first_step)
    rollouts, desks = beside_rows(order, rollouts, desks)
    source = PolicySource(order.blueprint.demand, order.prompts, buffer, rollouts, desks, order.stop)
    waiting = source.resume()
    if waiting:
        order.note(f"{waiting} stored groups go to their judges; none of them is generated again")
    return Team(source, learner, buffer), source
