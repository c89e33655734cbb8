"""Builds the team of a run as actors, each with the resources of its role, and tears down only what it started."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle

from actors import placement
from actors.buffer import BufferActor, RemoteBuffer
from actors.judge import JudgeActor
from actors.policy import PolicyActor, RemoteLearner
from actors.pool import ActorWorkers, PoolSpec
from actors.rollout import RolloutActor
from rlhf.buffer.schema import FILE_NAME
from rlhf.cluster import Cluster, Role
from rlhf.experience import REF_LOGPROBS, REWARD
from rlhf.judges.build import build_reward_judge, longest_call_s
from rlhf.judges.reference import ReferenceJudge
from rlhf.loop import Team
from rlhf.sources import MAX_ATTEMPTS, JudgeDesk, PolicySource
from rlhf.team import Order, assemble, dataset_workers, examines, failures_of, pins, scales_of

CLOSE_TIMEOUT_S = 10.0
JUDGED = {"reward": REWARD, "reference": REF_LOGPROBS}


@contextmanager
def ray_team(order: Order) -> Iterator[tuple[Team, PolicySource]]:
    """The team on Ray. Its actors end with it; Ray itself only where it was started here."""
    roles = dict(placement.roles_of(order.cluster))
    if not order.blueprint.reference_judge:
        del roles["reference"]
    if not order.blueprint.samples:
        del roles["rollout"]
    if order.blueprint.config.reward is None:
        del roles["reward"]
    with placement.started(order.cluster, roles):
        crew = _Crew(order.cluster)
        try:
            placement.wait_for_room(roles, order.cluster.placement_timeout_s, order.note)
            yield _build(order, crew)
        finally:
            crew.dismiss()


class _Crew:
    """The actors that this run created, so that it can end them and nothing else."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._closable: list[ActorHandle] = []
        self._actors: list[ActorHandle] = []
        self._pools: list[ActorWorkers] = []

    def pool(self, spec: PoolSpec, hire: Callable[[str], ActorHandle], note: Callable[[str], None]) -> ActorWorkers:
        """A pool whose workers are of this crew; it looks after them until the crew is dismissed."""
        pool = ActorWorkers(spec, hire, lambda actor: self.end([actor]), note)
        self._pools.append(pool)
        return pool

    def hire(self, actor_class: Any, role: Role, *arguments: Any, closable: bool) -> ActorHandle:
        actor = actor_class.options(**placement.options(self._cluster, role)).remote(*arguments)
        self._actors.append(actor)
        if closable:
            self._closable.append(actor)
        return actor

    def end(self, actors: Sequence[ActorHandle]) -> None:
        """Ends some actors, dead or alive, whatever they are at."""
        for actor in actors:
            ray.kill(actor)
            self._actors.remove(actor)
            if actor in self._closable:
                self._closable.remove(actor)

    def disband(self, pool: ActorWorkers, hired: Sequence[ActorHandle]) -> None:
        """Ends a pool before the others, with all whom it had hired; their places are free again."""
        pool.close()
        self._pools.remove(pool)
        self.end([actor for actor in hired if actor in self._actors])

    def dismiss(self) -> None:
        """Lets actors end what they started, then ends them. An actor that does not answer is killed all the same."""
        for pool in self._pools:
            pool.close()
        closing: list[ray.ObjectRef[None]] = [actor.close.remote() for actor in self._closable]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
        for actor in self._actors:
            ray.kill(actor)


def _build(order: Order, crew: _Crew) -> tuple[Team, PolicySource]:
    """Creates all actors at once, waits until each is set up, then puts the team together."""
    buffer = _hire_buffer(order, crew)
    learner = _hire_learner(order, crew)
    rows = dataset_workers(order)
    engines = [] if rows else [_hire_engines(order, crew)]
    judges = _hire_judges(order, crew)
    buffer.open()
    for name, value in pins(order).items():
        buffer.pin(name, value)
    learner.end_setup(learner.begin_setup())
    for pool in [*engines, *judges.values()]:
        pool.wait_until_up()
    desks = [
        JudgeDesk(name, frozenset({JUDGED[name]}), examines(order, name), pool, failures_of(order, name))
        for name, pool in judges.items()
    ]
    return assemble(order, learner, buffer, rows or engines[0], desks)


def _hire_buffer(order: Order, crew: _Crew) -> RemoteBuffer:
    arguments = (order.run_dir / FILE_NAME, order.blueprint.judged, None, MAX_ATTEMPTS)
    return RemoteBuffer(
        lambda: crew.hire(BufferActor, order.cluster.buffer, *arguments, closable=True),
        lambda actor: crew.end([actor]),
        partial(order.restarting, "buffer"),
        order.blueprint.config.loop.wait_timeout_s,
        order.blueprint.config.loop.heartbeat_timeout_s,
    )


def _hire_learner(order: Order, crew: _Crew) -> RemoteLearner:
    config, role = order.blueprint.config, order.cluster.trainer
    threads = order.cluster.threads_of(role)

    def hire(life: int) -> list[ActorHandle]:
        return [
            crew.hire(PolicyActor, role, config, rank, role.replicas, threads, life, closable=False)
            for rank in range(role.replicas)
        ]

    timeouts = (config.loop.wait_timeout_s, config.loop.heartbeat_timeout_s)
    return RemoteLearner(hire, crew.end, *timeouts, annotates=order.blueprint.learner_annotates)


def _hire_engines(order: Order, crew: _Crew) -> ActorWorkers:
    role, config = order.cluster.rollout, order.blueprint.config
    return crew.pool(
        _pool_spec(order, "rollout", role, takes_weights=True, call_limit_s=0.0),
        lambda name: crew.hire(RolloutActor, role, config, name, closable=True),
        order.note,
    )


def _hire_judges(order: Order, crew: _Crew) -> dict[str, ActorWorkers]:
    config, cluster = order.blueprint.config, order.cluster

    def pool(name: str, role: Role, build: Any, arguments: tuple[Any, ...], call_limit_s: float) -> ActorWorkers:
        spec = _pool_spec(order, name, role, takes_weights=False, call_limit_s=call_limit_s)
        return crew.pool(spec, lambda _: crew.hire(JudgeActor, role, build, arguments, closable=True), order.note)

    judges = {}
    if config.reward is not None:
        scales = scales_of(order, partial(_raw_rewards, order, crew))
        arguments = (config, scales, order.run_dir)
        judges["reward"] = pool("reward", cluster.reward, build_reward_judge, arguments, longest_call_s(config))
    if order.blueprint.reference_judge:
        judges["reference"] = pool("reference", cluster.reference, ReferenceJudge, (config,), 0.0)
    return judges


@contextmanager
def _raw_rewards(order: Order, crew: _Crew) -> Iterator[ActorWorkers]:
    """One host of the reward's judge before anything is normalised, for as long as the block lasts."""
    config, role = order.blueprint.config, order.cluster.reward
    spec = _pool_spec(order, "reward", role, takes_weights=False, call_limit_s=longest_call_s(config))
    hired: list[ActorHandle] = []

    def hire(name: str) -> ActorHandle:
        hired.append(crew.hire(JudgeActor, role, build_reward_judge, (config, {}, order.run_dir), closable=False))
        return hired[-1]

    pool = crew.pool(replace(spec, size=1, needed=1), hire, order.note)
    pool.wait_until_up()
    yield pool
    crew.disband(pool, hired)


def _pool_spec(order: Order, name: str, role: Role, *, takes_weights: bool, call_limit_s: float) -> PoolSpec:
    """call_limit_s: how long one call may take that shows no progress meanwhile and has a time limit of its own."""
    loop = order.blueprint.config.loop
    return PoolSpec(
        role=name,
        size=role.replicas,
        needed=role.needed,
        takes_weights=takes_weights,
        mid_task=takes_weights and order.blueprint.mid_sequence,
        asks_for=placement.asked_by(role),
        silence_s=loop.heartbeat_timeout_s + call_limit_s,
        lifeless_s=loop.heartbeat_timeout_s,
        wait_timeout_s=loop.wait_timeout_s,
        placement_timeout_s=order.cluster.placement_timeout_s,
        max_restarts=loop.max_restarts,
    )
