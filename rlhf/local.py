"""The team in one process: the same parts as on Ray, without it, under any debugger."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from rlhf.buffer.schema import FILE_NAME
from rlhf.buffer.store import ExperienceBuffer
from rlhf.experience import REF_LOGPROBS, REWARD, Group, TrainBatch, fill_in
from rlhf.generation.build import build_generator
from rlhf.interfaces import Judge, Published
from rlhf.judges.build import build_reward_judge
from rlhf.judges.reference import ReferenceJudge
from rlhf.learner.learner import PolicyLearner
from rlhf.loop import Team
from rlhf.metrics import Metrics
from rlhf.sources import JudgeDesk, PolicySource
from rlhf.team import MAX_ATTEMPTS, Order, assemble, dataset_workers, examines, pins
from rlhf.workers import LocalWorkers, answers, judgement


class LocalLearner:
    """The only rank of a policy trainer, in this process."""

    def __init__(self, rank: PolicyLearner) -> None:
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

    def save(self, folder: Path) -> None:
        self._rank.save(folder)

    def load(self, folder: Path) -> None:
        self._rank.load(folder)


@contextmanager
def local_team(order: Order) -> Iterator[tuple[Team, PolicySource]]:
    """The whole team in this process; everything that it started ends with the block.

    Threads are those that the cluster file gives a trainer rank: sums on a CPU depend on their number.
    """
    config, blueprint = order.blueprint.config, order.blueprint
    torch.set_num_threads(order.cluster.threads_of(order.cluster.trainer))
    with ExitStack() as closing:
        buffer = ExperienceBuffer(order.run_dir / FILE_NAME, blueprint.judged, None, MAX_ATTEMPTS)
        buffer.open()
        closing.callback(buffer.close)
        for name, value in pins(order).items():
            buffer.pin(name, value)
        rank = PolicyLearner(config, blueprint.algorithm, 0, 1, None)
        rank.setup()
        closing.callback(rank.close)  # after the generator: vLLM leaves the process group that they may share
        rollouts = dataset_workers(order)
        if rollouts is None:
            generator = build_generator(config, "rollout-0")
            closing.callback(generator.close)
            generator.setup()
            rollouts = LocalWorkers("rollout-0", partial(answers, generator), generator.load)
        desks = []
        for name, columns, judge in _judges(order):
            closing.callback(judge.close)
            judge.setup()
            work = partial(judgement, judge)
            desks.append(JudgeDesk(name, columns, examines(order, name), LocalWorkers(name, work, None)))
        yield assemble(order, LocalLearner(rank), buffer, rollouts, desks)


def _judges(order: Order) -> Iterator[tuple[str, frozenset[str], Judge]]:
    config = order.blueprint.config
    if config.reward is not None:
        yield "reward", frozenset({REWARD}), build_reward_judge(config)
    if order.blueprint.reference_judge:
        yield "reference", frozenset({REF_LOGPROBS}), ReferenceJudge(config)
