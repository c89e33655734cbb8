"""The policy trainer: a group of rank actors, and the driver's view of them as one learner."""

import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.actor import ActorHandle

from actors import waiting
from actors.heartbeat import Pulses
from rlhf import metrics
from rlhf.algorithms.table import build
from rlhf.config import RunConfig
from rlhf.errors import TrainerDied
from rlhf.experience import Columns, Group, TrainBatch, fill_in
from rlhf.interfaces import Handle, Published
from rlhf.learner.learner import PolicyLearner
from rlhf.metrics import Metrics
from rlhf.weights import Weights

# How long the other ranks may take to fail, or to turn out dead, after one of them failed.
PEERS_S = 10.0


class PolicyRank:
    """One rank of the trainer. The ranks meet in collectives inside `update`, `publish`, `save` and `load`."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, threads: int, life: int) -> None:
        """`life` counts the groups of ranks of this run; what a later one publishes replaces that of an earlier one."""
        self._config, self._rank, self._world_size, self._threads = config, rank, world_size, threads
        self._life = life

    def meeting_point(self) -> str:
        """host:port where the ranks find each other; asked of rank 0, whose system picks the port."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

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

    def publish(self) -> tuple[Published | None, Weights | None]:
        """What was published and the weights themselves, from rank 0; None from the others, which take part."""
        weights = self._learner.publish()
        if weights is None:
            return None, None
        weights = replace(weights, life=self._life)
        return Published(weights.version, weights.fingerprint, weights.size_bytes, None), weights

    def save(self, folder: Path) -> None:
        self._learner.save(folder)

    def load(self, folder: Path) -> int:
        self._learner.load(folder)
        return self._learner.version


PolicyActor = ray.remote(PolicyRank)


class RemoteLearner:
    """`Learner` on Ray. Groups, batches and weights are references that go from actor to actor.

    A call that finds a rank dead raises TrainerDied; the next `load` then starts all ranks anew, because those that are
    left wait for the dead one in a collective. hire and dismiss start and end the ranks of one life. A rank that shows
    no sign of life for lifeless_s counts as dead."""

    def __init__(
        self,
        hire: Callable[[int], Sequence[ActorHandle]],
        dismiss: Callable[[Sequence[ActorHandle]], None],
        timeout_s: float,
        lifeless_s: float,
        *,
        annotates: bool,
    ) -> None:
        self._hire, self._dismiss = hire, dismiss
        self._timeout_s = timeout_s
        self._annotates = annotates
        self._life, self._version = 0, 0
        self._pulses = Pulses(lifeless_s)
        self._ranks = self._hired()
        self._dead = False

    @property
    def version(self) -> int:
        return self._version

    def begin_setup(self) -> list[ray.ObjectRef]:
        """Starts the set-up of all ranks, which wait for each other; `end_setup` waits for the references."""
        meeting_point: ray.ObjectRef[str] = self._ranks[0].meeting_point.remote()
        return [rank.setup.remote(meeting_point) for rank in self._ranks]

    def end_setup(self, begun: Sequence[ray.ObjectRef]) -> None:
        self._all(begun, "setting up")

    def annotate(self, groups: Handle) -> Handle:
        if not self._annotates:
            return groups
        shares = [rank.annotate_share.remote(groups) for rank in self._ranks]
        self._all(shares, "annotating")
        return self._ranks[0].fill_in.remote(groups, *shares)

    def prepare(self, groups: Handle) -> Handle:
        return self._ranks[0].prepare.remote(groups)

    def update(self, batch: Handle) -> Metrics:
        answers = self._all([rank.update.remote(batch) for rank in self._ranks], f"update {self._version + 1}")
        self._version = answers[0][0]
        return metrics.merge(measured for _, measured in answers)

    def evaluate(self, groups: Handle) -> Metrics:
        return metrics.merge(self._all([rank.evaluate.remote(groups) for rank in self._ranks], "evaluating"))

    def publish(self) -> Published:
        refs: list[list[ray.ObjectRef[Any]]] = [rank.publish.options(num_returns=2).remote() for rank in self._ranks]
        published, *_ = self._all([summary for summary, _ in refs], f"publishing version {self._version}")
        return Published(published.version, published.fingerprint, published.size_bytes, refs[0][1])

    def save(self, folder: Path) -> None:
        self._all([rank.save.remote(folder) for rank in self._ranks], f"saving to {folder}")

    def load(self, folder: Path | None) -> None:
        if self._dead:
            self._start_again()
        if folder is not None:
            versions = self._all([rank.load.remote(folder) for rank in self._ranks], f"loading {folder}")
            self._version = versions[0]

    def _start_again(self) -> None:
        self._dismiss(self._ranks)
        for rank in self._ranks:
            self._pulses.forget(rank)
        self._life, self._version = self._life + 1, 0
        self._ranks = self._hired()
        self._all(self.begin_setup(), "setting up again")
        self._dead = False

    def _hired(self) -> list[ActorHandle]:
        ranks = list(self._hire(self._life))
        for number, rank in enumerate(ranks):
            self._pulses.follow(rank, f"rank {number}")
        return ranks

    def _all(self, refs: Sequence[ray.ObjectRef], what: str) -> list[Any]:
        """One answer a rank. Raises TrainerDied when one of the ranks is gone."""
        named = {f"rank {rank}": ref for rank, ref in enumerate(refs)}
        try:
            return waiting.gather(named, f"policy trainer: {what}", self._timeout_s, PEERS_S, self._pulses)
        except waiting.KnownActorDied as died:
            if died.actor_id not in {rank._actor_id.hex() for rank in self._ranks}:
                raise
            self._dead = True
            raise TrainerDied(str(died)) from died
