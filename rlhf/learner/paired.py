"""A policy and, where the algorithm has one, its critic, in one process: one rank of both, called as one learner."""

from collections.abc import Sequence
from pathlib import Path

from rlhf import metrics
from rlhf.algorithms import ActorCriticAlgorithm, Algorithm, ScoreAlgorithm
from rlhf.config import RunConfig
from rlhf.experience import Columns, Group, TrainBatch
from rlhf.learner.critic import CriticLearner
from rlhf.learner.learner import PolicyLearner
from rlhf.metrics import Metrics
from rlhf.weights import Weights


class PairedLearner:
    """The methods of PolicyLearner, for both. On Ray each has ranks of its own (actors/learner.py): the same calls, and
    the same bits."""

    def __init__(
        self,
        config: RunConfig,
        algorithm: Algorithm | ActorCriticAlgorithm | ScoreAlgorithm,
        rank: int,
        world_size: int,
        meeting_point: str | None,
    ) -> None:
        self.policy = PolicyLearner(config, algorithm, rank, world_size, meeting_point)
        self.critic = None
        self._both: list[PolicyLearner | CriticLearner] = [self.policy]
        if isinstance(algorithm, ActorCriticAlgorithm):
            self.critic = CriticLearner(config, algorithm, rank, world_size, meeting_point)
            self._both.append(self.critic)

    @property
    def version(self) -> int:
        return self.policy.version

    def setup(self) -> None:
        """The critic's engine comes second: it is then a guest in the process group of the policy's."""
        for learner in self._both:
            learner.setup()

    def annotate_share(self, groups: Sequence[Group]) -> list[Columns]:
        return [columns for learner in self._both for columns in learner.annotate_share(groups)]

    def prepare(self, groups: Sequence[Group]) -> TrainBatch:
        return self.policy.prepare(groups)

    def update(self, batch: TrainBatch) -> Metrics:
        return metrics.merge(learner.update(batch) for learner in self._both)

    def evaluate(self, groups: Sequence[Group]) -> Metrics:
        return self.policy.evaluate(groups)

    def publish(self) -> Weights | None:
        return self.policy.publish()

    def save(self, folder: Path) -> None:
        for learner in self._both:
            learner.save(folder)

    def load(self, folder: Path) -> None:
        for learner in self._both:
            learner.load(folder)

    def offload(self) -> None:
        for learner in self._both:
            learner.offload()

    def reload(self) -> None:
        for learner in self._both:
            learner.reload()

    def close(self) -> None:
        """The guest leaves first."""
        for learner in reversed(self._both):
            learner.close()
