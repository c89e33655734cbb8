"""The policy trainer: a group of rank actors."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import ray
import torch

from actors.ranks import free_address
from rlhf.algorithms.table import build
from rlhf.config import RunConfig
from rlhf.experience import Columns, Group, TrainBatch, fill_in
from rlhf.interfaces import Published
from rlhf.learner.learner import PolicyLearner
from rlhf.metrics import Metrics
from rlhf.weights import Weights


class PolicyRank:
    """One rank of the trainer. The ranks meet in collectives inside `update`, `publish`, `save` and `load`."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, threads: int) -> None:
        self._config, self._rank, self._world_size, self._threads = config, rank, world_size, threads

    def meeting_point(self) -> str:
        return free_address()

    def setup(self, meeting_point: str) -> None:
        torch.set_num_threads(self._threads)
        algorithm = build(self._config.algorithm)
        self._learner = PolicyLearner(self._config, algorithm, self._rank, self._world_size, meeting_point)
        self._learner.setup()

    def annotate_share(self, groups: Sequence[Group]) -> list[Columns]:
        return self._learner.annotate_share(groups)

    def fill_in(self, groups: Sequence[Group], *shares: list[Columns]) -> list[Group]:
        return fill_in(groups, [columns for share in shares for columns in share])

    def prepare(self, groups: Sequence[Group]) -> TrainBatch:
        return self._learner.prepare(groups)

    def update(self, batch: TrainBatch) -> tuple[int, Metrics]:
        measured = self._learner.update(batch)
        return self._learner.version, measured

    def evaluate(self, groups: Sequence[Group]) -> Metrics:
        return self._learner.evaluate(groups)

    def publish(self, life: int) -> tuple[Published | None, Weights | None]:
        """What was published and the weights themselves, from rank 0; None from the others, which take part.

        `life` counts the groups of ranks of this run; what a later one publishes replaces that of an earlier one."""
        weights = self._learner.publish()
        if weights is None:
            return None, None
        weights = replace(weights, life=life)
        return Published(weights.version, weights.fingerprint, weights.size_bytes, None), weights

    def offload(self) -> None:
        self._learner.offload()

    def reload(self) -> None:
        self._learner.reload()

    def save(self, folder: Path) -> None:
        self._learner.save(folder)

    def load(self, folder: Path) -> int:
        self._learner.load(folder)
        return self._learner.version


PolicyActor = ray.remote(PolicyRank)
