"""The team in one process: the same parts as on Ray, without it, under any debugger."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from rlhf.buffer.schema import FILE_NAME
from rlhf.buffer.store import ExperienceBuffer
from rlhf.colocation import turn_takers
from rlhf.experience import REF_LOGPROBS, REWARD, Group, TrainBatch, fill_in
from rlhf.generation.build import build_generator, build_sleeper
from rlhf.interfaces import Judge, Published, Workers
from rlhf.judges.build import build_reward_judge
from rlhf.judges.reference import ReferenceJudge
from rlhf.judges.weighted import Scale
from rlhf.learner.paired import PairedLearner
from rlhf.loop import Team
from rlhf.metrics import Metrics
from rlhf.sources import MAX_ATTEMPTS, JudgeDesk, PolicySource
from rlhf.team import Order, assemble, dataset_workers, examines, failures_of, pins, roles_of, scales_of
from rlhf.turns import take_turns
from rlhf.workers import LocalWorkers, MidTaskWorkers, SleepingLocalWorkers, answers, judgement


class LocalLearner:
    """The only rank of the policy's trainer, and of the critic where there is one, in this process."""

    def __init__(self, rank: PairedLearner) -> None:
        self._rank = rank

    @property
    def version(self) -> int:
        return self._rank.version

    def annotate(self, groups: list[Group]) -> list[Group]:
        return fill_in(groups, self._rank.annotate_share(groups))

    def prepare(self, groups: list[Group]) -> TrainBatch:
        return self._rank.prepare(groups)

    def update(self, batch: TrainBatch) -> Metrics:
        return self._rank.update(batch)

    def evaluate(self, groups: list[Group]) -> Metrics:
        return self._rank.evaluate(groups)

    def publish(self) -> Published:
        weights = self._rank.publish()
        assert weights is not None  # rank 0 publishes
        return Published(weights.version, weights.fingerprint, weights.size_bytes, weights)

    def offload(self) -> None:
        self._rank.offload()

    def reload(self) -> None:
        self._rank.reload()

    def save(self, folder: Path) -> None:
        self._rank.save(folder)

    def load(self, folder: Path | None) -> None:
        """With None nothing is to be done: a learner in the driver's process cannot die alone, so it is a new one."""
        if folder is not None:
            self._rank.load(folder)

    def notice(self) -> bool:
        """Never: where the driver's machine goes, so does the run."""
        return False

    def move(self, folder: Path) -> bool:
        return False


@contextmanager
def local_team(order: Order) -> Iterator[tuple[Team, PolicySource]]:
    """The whole team in this process; everything that it started ends with the block.

    Threads are those that the cluster file gives a trainer rank: sums on a CPU depend on their number.
    """
    config, blueprint = order.blueprint.config, order.blueprint
    torch.set_num_threads(order.cluster.threads_of(order.cluster.trainer))
    scales = scales_of(order, partial(_raw_rewards, order))
    with ExitStack() as closing:
        buffer = ExperienceBuffer(order.run_dir / FILE_NAME, blueprint.judged, None, MAX_ATTEMPTS)
        buffer.open()
        closing.callback(buffer.close)
        for name, value in pins(order).items():
            buffer.pin(name, value)
        rank = PairedLearner(config, blueprint.algorithm, 0, 1, None)
        rank.setup()
        closing.callback(rank.close)  # after the generator: vLLM leaves the process group that they may share
        takers = turn_takers(order.cluster, roles_of(order))
        if takers:
            rank.offload()  # while the samplers are set up
        rollouts, desks = _samplers(order, scales, takers, closing)
        learner, rollouts, desks = take_turns(LocalLearner(rank), rollouts, desks)
        yield assemble(order, learner, buffer, rollouts, desks)


def _samplers(
    order: Order, scales: Mapping[str, Scale], takers: frozenset[str], closing: ExitStack
) -> tuple[Workers, Sequence[JudgeDesk]]:
    """The engine, or what looks rows up, and the judges, set up; those that take turns can sleep."""
    config, rollouts = order.blueprint.config, dataset_workers(order)
    if rollouts is None:
        sleeps = "rollout" in takers
        generator = (build_sleeper if sleeps else build_generator)(
            config, "rollout-0", order.cluster.rollout.tensor_parallel
        )
        closing.callback(generator.close)
        generator.setup()
        work = partial(answers, generator)
        if sleeps:
            rollouts = SleepingLocalWorkers("rollout-0", work, generator.load, generator.sleep, None)
        else:
            kind = MidTaskWorkers if order.blueprint.mid_sequence else LocalWorkers
            rollouts = kind("rollout-0", work, generator.load)
    desks = []
    for name, columns, judge in _judges(order, scales):
        closing.callback(judge.close)
        judge.setup()
        judging = partial(judgement, judge)
        workers = LocalWorkers(name, judging, None)
        if name in takers:
            assert isinstance(judge, ReferenceJudge)  # the only judge that a colocation group may name
            workers = SleepingLocalWorkers(name, judging, None, judge.sleep, judge.wake)
        desks.append(JudgeDesk(name, columns, examines(order, name), workers, failures_of(order, name)))
    return rollouts, desks


@contextmanager
def _raw_rewards(order: Order) -> Iterator[LocalWorkers]:
    """The reward's judge before anything is normalised, for as long as the block lasts."""
    judge = build_reward_judge(order.blueprint.config, {}, order.run_dir)
    try:
        judge.setup()
        yield LocalWorkers("reward", partial(judgement, judge), None)
    finally:
        judge.close()


def _judges(order: Order, scales: Mapping[str, Scale]) -> Iterator[tuple[str, frozenset[str], Judge]]:
    config = order.blueprint.config
    if config.reward is not None:
        yield "reward", frozenset({REWARD}), build_reward_judge(config, scales, order.run_dir)
    if order.blueprint.reference_judge:
        yield "reference", frozenset({REF_LOGPROBS}), ReferenceJudge(config)
