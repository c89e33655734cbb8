"""Builds the team of a run as actors, each with the resources of its role, and tears down only what it started."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle

from actors import placement, waiting
from actors.buffer import BufferActor, RemoteBuffer
from actors.judge import JudgeActor
from actors.policy import PolicyActor, RemoteLearner
from actors.pool import ActorWorkers
from actors.rollout import RolloutActor
from rlhf.buffer.schema import FILE_NAME
from rlhf.cluster import Cluster, Role
from rlhf.experience import REF_LOGPROBS, REWARD
from rlhf.judges.build import build_reward_judge
from rlhf.judges.reference import ReferenceJudge
from rlhf.loop import Team
from rlhf.sources import JudgeDesk, PolicySource
from rlhf.team import MAX_ATTEMPTS, Order, assemble, dataset_workers, examines, pins

CLOSE_TIMEOUT_S = 10.0


@contextmanager
def ray_team(order: Order) -> Iterator[tuple[Team, PolicySource]]:
    """The team on Ray. Ray itself is stopped at the end only when it was started here; the actors always are."""
    roles = dict(placement.roles_of(order.cluster))
    if not order.blueprint.reference_judge:
        del roles["reference"]
    if not order.blueprint.samples:
        del roles["rollout"]
    if order.blueprint.config.reward is None:
        del roles["reward"]
    ours = placement.start(order.cluster, roles)
    crew = _Crew(order.cluster)
    try:
        placement.wait_for_room(roles, order.cluster.placement_timeout_s, order.note)
        yield _build(order, crew)
    finally:
        crew.dismiss()
        if ours:
            ray.shutdown()


class _Crew:
    """The actors that this run created, so that it can end them and nothing else."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._closable: list[ActorHandle] = []
        self._actors: list[ActorHandle] = []

    def hire(self, actor_class: Any, role: Role, *arguments: Any, closable: bool) -> ActorHandle:
        actor = actor_class.options(**placement.options(self._cluster, role)).remote(*arguments)
        self._actors.append(actor)
        if closable:
            self._closable.append(actor)
        return actor

    def dismiss(self) -> None:
        """Lets actors end what they started, then ends them. An actor that does not answer is killed all the same."""
        closing: list[ray.ObjectRef[None]] = [actor.close.remote() for actor in self._closable]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
        for actor in self._actors:
            ray.kill(actor)


def _build(order: Order, crew: _Crew) -> tuple[Team, PolicySource]:
    """Creates all actors at once, waits until each is set up, then puts the team together."""
    config, cluster, blueprint = order.blueprint.config, order.cluster, order.blueprint
    timeout_s = config.loop.wait_timeout_s
    buffer = RemoteBuffer(
        crew.hire(
            BufferActor, cluster.buffer, order.run_dir / FILE_NAME, blueprint.judged, None, MAX_ATTEMPTS, closable=True
        ),
        timeout_s,
    )
    trainer_threads = cluster.threads_of(cluster.trainer)
    ranks = [
        crew.hire(PolicyActor, cluster.trainer, config, rank, cluster.trainer.replicas, trainer_threads, closable=False)
        for rank in range(cluster.trainer.replicas)
    ]
    rows = dataset_workers(order)
    engines = [
        crew.hire(RolloutActor, cluster.rollout, config, f"rollout-{n}", closable=True)
        for n in range(cluster.rollout.replicas if rows is None else 0)
    ]
    judges = _hire_judges(order, crew)
    buffer.open()
    for name, value in pins(order).items():
        buffer.pin(name, value)
    learner = RemoteLearner(ranks, timeout_s, annotates=blueprint.learner_annotates)
    hosts = [host for _, _, hosts in judges for host in hosts]
    waiting.get(
        [*learner.begin_setup(), *(actor.setup.remote() for actor in [*engines, *hosts])],
        "setting up the team",
        timeout_s,
    )
    desks = [
        JudgeDesk(name, columns, examines(order, name), ActorWorkers(name, hosts, timeout_s))
        for name, columns, hosts in judges
    ]
    rollouts = rows or ActorWorkers("rollout", engines, timeout_s)
    return assemble(order, learner, buffer, rollouts, desks)


def _hire_judges(order: Order, crew: _Crew) -> Sequence[tuple[str, frozenset[str], list[ActorHandle]]]:
    config, cluster = order.blueprint.config, order.cluster

    def hosts(role: Role, build: Any, argument: Any) -> list[ActorHandle]:
        return [crew.hire(JudgeActor, role, build, (argument,), closable=True) for _ in range(role.replicas)]

    judges = []
    if config.reward is not None:
        judges.append(("reward", frozenset({REWARD}), hosts(cluster.reward, build_reward_judge, config)))
    if order.blueprint.reference_judge:
        judges.append(("reference", frozenset({REF_LOGPROBS}), hosts(cluster.reference, ReferenceJudge, config)))
    return judges
