"""Builds the team of a run as actors, each with the resources of its role, and tears down only what it started."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle

from actors import placement, waiting
from actors.buffer import BufferActor, RemoteBuffer
from actors.critic import CriticActor
from actors.judge import JudgeActor
from actors.learner import RemoteLearner
from actors.notices import Notices
from actors.policy import PolicyActor
from actors.pool import ActorWorkers
from actors.ranks import RankGroup
from actors.rollout import RolloutActor
from actors.turn_taking import SleepingActors
from actors.worker import PoolSpec, slot_of
from rlhf.buffer.schema import FILE_NAME
from rlhf.cluster import Cluster, Ranks, Role
from rlhf.colocation import places_of, shared_gpus, turn_takers
from rlhf.errors import ActorDied, TrainerDied
from rlhf.experience import REF_LOGPROBS, REWARD
from rlhf.judges.build import build_reward_judge, longest_call_s
from rlhf.judges.reference import ReferenceJudge
from rlhf.loop import Team
from rlhf.sources import MAX_ATTEMPTS, JudgeDesk, PolicySource
from rlhf.team import Order, assemble, dataset_workers, examines, failures_of, pins, roles_of, scales_of
from rlhf.turns import take_turns

CLOSE_TIMEOUT_S = 10.0
JUDGED = {"reward": REWARD, "reference": REF_LOGPROBS}


@contextmanager
def ray_team(order: Order) -> Iterator[tuple[Team, PolicySource]]:
    """The team on Ray. Its actors end with it; Ray itself only where it was started here."""
    with placement.started(order.cluster, places_of(order.cluster, roles_of(order))):
        crew = _Crew(order.cluster)
        try:
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
        self._places: list[placement.RankPlaces] = []

    def reserve(self, role: Ranks) -> placement.RankPlaces:
        """Asks for the places of a role's ranks, which are held until the crew is dismissed."""
        self._places.append(placement.RankPlaces(role))
        return self._places[-1]

    def pool(self, spec: PoolSpec, hire: Callable[[str], ActorHandle], note: Callable[[str], None]) -> ActorWorkers:
        """A pool whose workers are of this crew; it looks after them until the crew is dismissed."""
        kind = SleepingActors if spec.takes_turns else ActorWorkers
        pool = kind(spec, hire, lambda actor: self.end([actor]), note)
        self._pools.append(pool)
        return pool

    def hire(
        self, name: str, actor_class: Any, role: Role, *arguments: Any, closable: bool, seat: placement.Seat | None
    ) -> ActorHandle:
        """An actor of the role of this name; seat, where it goes, None for wherever there is room."""
        options = placement.options(self._cluster, name, role)
        actor = actor_class.options(**options, scheduling_strategy=seat or "DEFAULT").remote(*arguments)
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
        for places in self._places:
            places.release()


@dataclass(frozen=True, slots=True)
class _Reserved:
    """Places that are held: for the ranks of a role, or for all actors of a colocation group. parts, what an actor of
    each role takes of one."""

    seats: placement.RankPlaces
    claim: placement.Claim
    parts: Mapping[str, Role]

    def seat(self, worker: str) -> placement.Seat:
        """Where a worker of a pool goes, by its name."""
        return self.seats.seat(slot_of(worker))


def _reserve(order: Order, crew: _Crew) -> dict[str, _Reserved]:
    """Asks for the places of the ranks and of those who share them, by role."""
    roles, found = roles_of(order), dict[str, _Reserved]()

    def hold(name: str, role: Ranks, parts: Mapping[str, Role]) -> None:
        seats = crew.reserve(role)
        reserved = _Reserved(seats, placement.Claim(name, role, role.replicas, seats.placed), parts)
        found.update({part: reserved for part in parts})

    for shared in shared_gpus(order.cluster, roles):
        hold(shared.name, shared.bundles, {name: shared.part_of(name) for name in shared.roles})
    for name, role in roles.items():
        if isinstance(role, Ranks) and name not in found:
            hold(name, role, {name: role})
    return found


def _build(order: Order, crew: _Crew) -> tuple[Team, PolicySource]:
    """Asks for everything at once, waits until all have a place and are set up, then puts the team together."""
    reserved = _reserve(order, crew)
    buffer = _hire_buffer(order, crew)
    rows = dataset_workers(order)
    engines = {} if rows else {"rollout": _hire_engines(order, crew, reserved)}
    judges = _hire_judges(order, crew, reserved)
    pools = {**engines, **judges}
    ledger = placement.Claim("buffer", order.cluster.buffer, 1, buffer.placed)
    apart = [pool.claim() for name, pool in pools.items() if name not in reserved]
    _wait_for_places(order, [*_claims(reserved), ledger, *apart])
    learner = _hire_learner(order, crew, reserved)
    buffer.open()
    for name, value in pins(order).items():
        buffer.pin(name, value)
    learner.set_up()
    sleepers = [pool for pool in pools.values() if isinstance(pool, SleepingActors)]
    if sleepers:
        learner.offload()  # while the samplers are set up
    for sleeper in sleepers:
        sleeper.wake()
    for pool in pools.values():
        pool.wait_until_up()
    desks = [
        JudgeDesk(name, frozenset({JUDGED[name]}), examines(order, name), pool, failures_of(order, name))
        for name, pool in judges.items()
    ]
    taking, rollouts, desks_in_turn = take_turns(learner, rows or engines["rollout"], desks)
    return assemble(order, taking, buffer, rollouts, desks_in_turn)


def _claims(reserved: Mapping[str, _Reserved]) -> list[placement.Claim]:
    """One a group of places, whoever shares them."""
    return list({id(each): each.claim for each in reserved.values()}.values())


def _wait_for_places(order: Order, claims: Sequence[placement.Claim]) -> None:
    cluster = order.cluster
    can_grow = cluster.address != "local"
    placement.wait_for_places(claims, cluster.placement_timeout_s, order.note, order.stop, can_grow=can_grow)


def _hire_buffer(order: Order, crew: _Crew) -> RemoteBuffer:
    """Beside the driver, which reads the same file."""
    arguments = (order.run_dir / FILE_NAME, order.blueprint.judged, None, MAX_ATTEMPTS)
    role, seat = order.cluster.buffer, placement.beside_the_driver()
    return RemoteBuffer(
        lambda: crew.hire("buffer", BufferActor, role, *arguments, closable=True, seat=seat),
        lambda actor: crew.end([actor]),
        partial(order.restarting, "buffer"),
        order.blueprint.config.loop.wait_timeout_s,
        order.blueprint.config.loop.heartbeat_timeout_s,
    )


def _hire_learner(order: Order, crew: _Crew, reserved: Mapping[str, _Reserved]) -> RemoteLearner:
    """The ranks of the policy, and of the critic where there is one, each on the places that are held for them."""
    blueprint, takers = order.blueprint, turn_takers(order.cluster, roles_of(order))
    policy = _hire_ranks(order, crew, "policy", "trainer", PolicyActor, reserved)
    critic = _hire_ranks(order, crew, "critic", "critic", CriticActor, reserved) if blueprint.has_critic else None
    sharing = [group for name, group in (("trainer", policy), ("critic", critic)) if group and name in takers]
    notices = Notices({each.claim.name: each.seats for each in reserved.values()}, order.note)
    loop = blueprint.config.loop
    return RemoteLearner(
        policy,
        critic,
        notices,
        sharing,
        loop.wait_timeout_s,
        loop.heartbeat_timeout_s,
        annotates=blueprint.learner_annotates,
    )


def _hire_ranks(
    order: Order, crew: _Crew, name: str, role_name: str, actor_class: Any, places: Mapping[str, _Reserved]
) -> RankGroup:
    """name, how messages call the group of ranks of the role."""
    config, reserved = order.blueprint.config, places[role_name]
    role, seats = reserved.parts[role_name], reserved.seats
    threads = order.cluster.threads_of(role)

    def start() -> list[ActorHandle]:
        return [
            crew.hire(role_name, actor_class, role, config, rank, role.replicas, threads, closable=False, seat=seat)
            for rank, seat in enumerate(seats.seats()[: role.replicas])
        ]

    return RankGroup(name, start(), partial(_started_again, order, crew, reserved, start), crew.end)


def _started_again(
    order: Order, crew: _Crew, reserved: _Reserved, start: Callable[[], list[ActorHandle]]
) -> list[ActorHandle]:
    """Ranks in the places of dead ones, once these are on nodes that are up. A dead node may pass for one for a while:
    ranks that were started on it die with it, and are started once more when it has been replaced."""
    claim, seats = reserved.claim, reserved.seats
    while True:
        seats.renew()
        _wait_for_places(order, [claim])
        if order.stop():
            raise TrainerDied(f"the {claim.name} has no place, and the run was asked to stop")
        ranks: list[ActorHandle] = []
        try:
            ranks = start()
            ready = [rank.__ray_ready__.remote() for rank in ranks]
            waiting.get(ready, f"starting the ranks of the {claim.name}", order.blueprint.config.loop.wait_timeout_s)
        except ActorDied:
            crew.end(ranks)
            if seats.are_where_they_were():
                raise
        else:
            return ranks


def _hire_engines(order: Order, crew: _Crew, reserved: Mapping[str, _Reserved]) -> ActorWorkers:
    config, places = order.blueprint.config, reserved.get("rollout")
    role = order.cluster.rollout if places is None else places.parts["rollout"]
    spec = _pool_spec(order, "rollout", role, takes_weights=True, call_limit_s=0.0)

    def hire(name: str) -> ActorHandle:
        seat = None if places is None else places.seat(name)
        arguments = (config, name, order.cluster.rollout.tensor_parallel, spec.takes_turns)
        return crew.hire("rollout", RolloutActor, role, *arguments, closable=True, seat=seat)

    return crew.pool(spec, hire, order.note)


def _hire_judges(order: Order, crew: _Crew, reserved: Mapping[str, _Reserved]) -> dict[str, ActorWorkers]:
    config = order.blueprint.config

    def pool(name: str, build: Any, arguments: tuple[Any, ...], call_limit_s: float) -> ActorWorkers:
        places = reserved.get(name)
        role = order.cluster.roles[name] if places is None else places.parts[name]
        spec = _pool_spec(order, name, role, takes_weights=False, call_limit_s=call_limit_s)

        def hire(worker: str) -> ActorHandle:
            seat = None if places is None else places.seat(worker)
            return crew.hire(name, JudgeActor, role, build, arguments, closable=True, seat=seat)

        return crew.pool(spec, hire, order.note)

    judges = {}
    if config.reward is not None:
        scales = scales_of(order, partial(_raw_rewards, order, crew))
        judges["reward"] = pool("reward", build_reward_judge, (config, scales, order.run_dir), longest_call_s(config))
    if order.blueprint.reference_judge:
        judges["reference"] = pool("reference", ReferenceJudge, (config,), 0.0)
    return judges


@contextmanager
def _raw_rewards(order: Order, crew: _Crew) -> Iterator[ActorWorkers]:
    """One host of the reward's judge before anything is normalised, for as long as the block lasts."""
    config, role = order.blueprint.config, order.cluster.reward
    spec = _pool_spec(order, "reward", role, takes_weights=False, call_limit_s=longest_call_s(config))
    hired: list[ActorHandle] = []

    def hire(name: str) -> ActorHandle:
        arguments: tuple[Any, ...] = (config, {}, order.run_dir)
        hired.append(crew.hire("reward", JudgeActor, role, build_reward_judge, arguments, closable=False, seat=None))
        return hired[-1]

    pool = crew.pool(replace(spec, size=1, needed=1), hire, order.note)
    _wait_for_places(order, [pool.claim()])
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
        resources=role,
        silence_s=loop.heartbeat_timeout_s + call_limit_s,
        lifeless_s=loop.heartbeat_timeout_s,
        wait_timeout_s=loop.wait_timeout_s,
        placement_timeout_s=order.cluster.placement_timeout_s,
        max_restarts=loop.max_restarts,
        idle_release_s=role.idle_release_s or math.inf,
        takes_turns=name in turn_takers(order.cluster, roles_of(order)),
    )
