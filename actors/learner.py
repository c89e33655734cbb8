"""The driver's view of all that is trained, the policy's ranks and the critic's, as one learner."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from actors import waiting
from actors.heartbeat import Pulses
from actors.notices import Notices
from actors.ranks import RankGroup
from rlhf import metrics
from rlhf.errors import RunFailed, TrainerDied
from rlhf.interfaces import Handle, Published
from rlhf.metrics import Metrics

# How long the other ranks may take to fail, or to turn out dead, after one of them failed.
PEERS_S = 10.0


class RemoteLearner:
    """`Learner` on Ray. Groups, batches and weights are references that go from actor to actor.

    Policy and critic work at the same time: both fill in their columns of the same groups, and both learn from the
    same batch. A call that finds a rank of either dead raises TrainerDied; the next `load` then starts all ranks of
    both anew, because the critic of a policy is the one that learnt from the same steps. A rank that shows no sign of
    life for lifeless_s counts as dead. `sharing`, the groups that take turns on their GPUs."""

    def __init__(
        self,
        policy: RankGroup,
        critic: RankGroup | None,
        notices: Notices,
        sharing: Sequence[RankGroup],
        timeout_s: float,
        lifeless_s: float,
        *,
        annotates: bool,
    ) -> None:
        self._policy, self._notices = policy, notices
        self._trained = [policy] if critic is None else [policy, critic]
        self._sharing, self._offloaded = sharing, False
        self._timeout_s = timeout_s
        self._annotates = annotates
        self._life, self._version = 0, 0
        self._dead = False
        self._pulses = Pulses(lifeless_s)
        for group in self._trained:
            self._listen_to(group)

    @property
    def version(self) -> int:
        return self._version

    def set_up(self) -> None:
        begun = {name: ref for group in self._trained for name, ref in group.begin_setup().items()}
        self._all(begun, "setting up")

    def annotate(self, groups: Handle) -> Handle:
        if not self._annotates:
            return groups
        shares = self._ask(lambda rank: rank.annotate_share.remote(groups), self._trained)
        self._all(shares, "annotating")
        return self._policy.ranks[0].fill_in.remote(groups, *shares.values())

    def prepare(self, groups: Handle) -> Handle:
        return self._policy.ranks[0].prepare.remote(groups)

    def update(self, batch: Handle) -> Metrics:
        answers = self._all(
            self._ask(lambda rank: rank.update.remote(batch), self._trained), f"update {self._version + 1}"
        )
        self._version = _common([version for version, _ in answers], "the update")
        return metrics.merge(measured for _, measured in answers)

    def evaluate(self, groups: Handle) -> Metrics:
        refs = [rank.evaluate.remote(groups) for rank in self._policy.ranks]
        return metrics.merge(self._all(self._policy.named(refs), "evaluating"))

    def publish(self) -> Published:
        refs: list[list[ray.ObjectRef[Any]]] = [
            rank.publish.options(num_returns=2).remote(self._life) for rank in self._policy.ranks
        ]
        summaries = self._policy.named([summary for summary, _ in refs])
        published, *_ = self._all(summaries, f"publishing version {self._version}")
        return Published(published.version, published.fingerprint, published.size_bytes, refs[0][1])

    def offload(self) -> None:
        """The ranks that share their GPUs give them up, until `reload`."""
        if not self._offloaded:
            self._all(self._ask(lambda rank: rank.offload.remote(), self._sharing), "giving the GPUs up")
            self._offloaded = True

    def reload(self) -> None:
        """Does nothing for ranks of which one is known to be dead: `load` brings others, which have their GPUs."""
        if self._offloaded and not self._dead:
            self._all(self._ask(lambda rank: rank.reload.remote(), self._sharing), "taking the GPUs back")
            self._offloaded = False

    def save(self, folder: Path) -> None:
        self._all(self._ask(lambda rank: rank.save.remote(folder), self._trained), f"saving to {folder}")

    def notice(self) -> bool:
        return self._notices.due()

    def move(self, folder: Path) -> bool:
        """All ranks of both are started anew, also those whose node stays: they go on from one checkpoint together."""
        if not self._notices.found_places():
            return False
        self._dead = True
        self.load(folder)
        return True

    def load(self, folder: Path | None) -> None:
        if self._dead:
            self._start_again()
        if folder is not None:
            versions = self._all(self._ask(lambda rank: rank.load.remote(folder), self._trained), f"loading {folder}")
            self._version = _common(versions, f"loading {folder}")

    def _start_again(self) -> None:
        self._life, self._version, self._offloaded = self._life + 1, 0, False
        for group in self._trained:
            for rank in group.ranks:
                self._pulses.forget(rank)
            group.hire_again()
            self._listen_to(group)
        self.set_up()
        self._dead = False

    def _listen_to(self, group: RankGroup) -> None:
        for number, rank in enumerate(group.ranks):
            self._pulses.follow(rank, group.name_of(number))

    def _ask(
        self, call: Callable[[ActorHandle], ray.ObjectRef], groups: Sequence[RankGroup]
    ) -> dict[str, ray.ObjectRef]:
        """The same call to every rank of the groups, the policy's rank 0 first; answers by who gives them."""
        asked: dict[str, ray.ObjectRef] = {}
        for group in groups:
            asked |= group.named([call(rank) for rank in group.ranks])
        return asked

    def _all(self, named: dict[str, ray.ObjectRef], what: str) -> list[Any]:
        """The answers, in order. Raises TrainerDied when one of the ranks is gone."""
        try:
            return waiting.gather(named, f"trainer: {what}", self._timeout_s, PEERS_S, self._pulses)
        except waiting.KnownActorDied as died:
            if not any(group.has(died.actor_id) for group in self._trained):
                raise
            self._dead = True
            raise TrainerDied(str(died)) from died


def _common(versions: Sequence[int], after: str) -> int:
    """The version that all ranks have. Raises RunFailed where they differ: policy and critic have come apart."""
    if len(set(versions)) > 1:
        raise RunFailed(f"after {after} the ranks of policy and critic are at different versions: {list(versions)}")
    return versions[0]
