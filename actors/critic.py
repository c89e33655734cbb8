"""The critic: a group of rank actors of its own, which learns beside the policy from the same batches."""

from collections.abc import Sequence
from pathlib import Path

import ray
import torch

from actors.ranks import free_address
from rlhf.algorithms import ActorCriticAlgorithm
from rlhf.algorithms.table import build
from rlhf.config import RunConfig
from rlhf.experience import Columns, Group, TrainBatch
from rlhf.learner.critic import CriticLearner
from rlhf.metrics import Metrics


class CriticRank:
    """One rank of the critic. The ranks meet in collectives inside every method but `meeting_point`."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, threads: int) -> None:
        self._config, self._rank, self._world_size, self._threads = config, rank, world_size, threads

    def meeting_point(self) -> str:
        return free_address()

    def setup(self, meeting_point: str) -> None:
        torch.set_num_threads(self._threads)
        algorithm = build(self._config.algorithm)
        if not isinstance(algorithm, ActorCriticAlgorithm):
            raise TypeError(f"algorithm.name={self._config.algorithm.name} has no critic")
        self._learner = CriticLearner(self._config, algorithm, self._rank, self._world_size, meeting_point)
        self._learner.setup()

    def annotate_share(self, groups: Sequence[Group]) -> list[Columns]:
        return self._learner.annotate_share(groups)

    def update(self, batch: TrainBatch) -> tuple[int, Metrics]:
        measured = self._learner.update(batch)
        return self._learner.version, measured

    def offload(self) -> None:
        self._learner.offload()

    def reload(self) -> None:
        self._learner.reload()

    def save(self, folder: Path) -> None:
        self._learner.save(folder)

    def load(self, folder: Path) -> int:
        self._learner.load(folder)
        return self._learner.version


CriticActor = ray.remote(CriticRank)
