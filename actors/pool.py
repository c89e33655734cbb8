"""A pool of actors of one role: the `Workers` of a team on Ray. They may die, hang, join and leave during a run.

A thread looks after the workers, also while the driver is busy elsewhere: it reads what they yield (an item that nobody
has read is lost with its actor), ends those that stopped advancing, and brings every new one to the newest weights
before it gets work. What it finds, results and failures, is handed to the driver at its next call."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError

from actors import heartbeat, placement, waiting
from actors.losses import Losses, taken_back
from actors.shortage import Shortage
from actors.worker import Errand, Phase, PoolSpec, Worker, cause_of_death, is_unreachable, worker_name
from rlhf.errors import ActorDied, RunFailed, WorkerLost
from rlhf.interfaces import Handle, Published, Replacements, Result, Task
from rlhf.weights import Receipt

POLL_S = 0.02
ANSWER_TIMEOUT_S = 60.0  # for an answer that Ray has said is there
DRAIN_POLL_S = 2.0
LOOKED_AWAY_S = 1.0  # a longer pause between two looks was this process's own, and is held against nobody
QUEUED = 2  # tasks that a worker without weights holds at a time: one to work on, one to go on with


class ActorWorkers:
    """Actors of one role, one a slot. `hire` makes the actor of a worker's name, `let_go` ends an actor for good."""

    def __init__(
        self,
        spec: PoolSpec,
        hire: Callable[[str], ActorHandle],
        let_go: Callable[[ActorHandle], None],
        note: Callable[[str], None],
    ) -> None:
        self._spec, self._hire, self._let_go, self._note = spec, hire, let_go, note
        self._queue: deque[Task] = deque()
        self._finished: deque[Result] = deque()
        self._notes: deque[str] = deque()
        self._failure: Exception | None = None
        self._published: Published | None = None
        self._receipts: dict[str, Receipt] = {}
        self._losses = Losses(spec)
        self._incarnations: Counter[int] = Counter()
        self._looked = self._drains_looked = time.monotonic()
        self._shortage = Shortage(spec)
        self._resting: set[int] = set()  # slots without a worker, until there is work
        self._started = False  # whether enough workers were up once
        self._pulses = heartbeat.Pulses(spec.lifeless_s)
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._workers = [self._new_worker(slot) for slot in range(spec.needed)]
        self._thread = threading.Thread(target=self._look_after, name=f"pool of {spec.role}", daemon=True)
        self._thread.start()

    # For the driver.

    def wait_until_up(self) -> None:
        """Until enough workers are set up for the run to start. Raises what their set-up raised, NoCapacity where they
        find no room."""
        self._shortage.count_from_now()
        while True:
            with self._changed:
                self._raise_failure()
                if self._count("without weights", "ready") >= self._spec.needed:
                    if not self._started:  # the others must not take the places of what the run cannot do without
                        self._started = True
                        self._workers += [self._new_worker(slot) for slot in range(self._spec.needed, self._spec.size)]
                    return
                self._changed.wait(POLL_S)
            self._tell_notes()

    def claim(self) -> placement.Claim:
        """What the run cannot start without."""
        return placement.Claim(self._spec.role, self._spec.resources, self._spec.needed, self._placed)

    def _placed(self) -> int:
        with self._changed:
            self._raise_failure()
            workers = list(self._workers)
        return sum(worker.place is not None or placement.has_place(worker.actor) for worker in workers)

    def submit(self, task: Task, worker: str | None) -> None:
        with self._changed:
            self._wake()
            if worker is None:
                self._queue.append(task)
                self._dispatch()
                return
            named = next((each for each in self._workers if each.name == worker and each.is_free), None)
            if named is None:
                gone = WorkerLost(f"{worker} left before it began", counted=False)
                self._finished.append(Result(task.number, task.prompt_ids, None, gone, worker, 0.0))
            else:
                named.start(task, bound=True, in_slices=self._spec.in_slices)

    def collect(self, timeout_s: float) -> list[Result]:
        self._tell_notes()
        with self._changed:
            if not self._finished and (self._is_busy() or not self._count("ready")):
                self._changed.wait_for(lambda: bool(self._finished or self._failure), timeout_s)
            results = list(self._finished)
            self._finished.clear()
            if not results:
                self._raise_failure()
            return results

    def free(self) -> list[str]:
        with self._changed:
            return [] if self._queue else [worker.name for worker in self._workers if worker.is_free]

    def size(self) -> int:
        with self._changed:
            return self._count("ready")

    def holding(self) -> list[str]:
        now = time.monotonic()
        with self._changed:
            lines = [line for worker in self._workers for line in worker.holding(now)]
            return lines + [f"nobody yet has prompts {sorted(task.prompt_ids)[:8]}" for task in self._queue]

    def replaced(self) -> Replacements:
        with self._changed:
            return self._losses.replaced()

    def load(self, published: Published) -> list[Receipt]:
        """Waits for the workers that are up now, or for their loss; those that come up later load before they work."""
        with self._changed:
            self._published = published
            self._receipts.clear()
            asked = [worker for worker in self._workers if worker.phase in ("without weights", "ready")]
            for worker in asked:
                if not worker.leaving:
                    worker.joined = True
                    self._begin_loading(worker)
        while True:
            with self._changed:
                self._raise_failure()
                if not any(worker.phase == "loading" for worker in asked if worker in self._workers):
                    return [receipt for _, receipt in sorted(self._receipts.items())]
                self._changed.wait(POLL_S)
            self._tell_notes()

    def fetch(self, handle: Handle) -> Any:
        return waiting.get([handle], "fetching a value", self._spec.wait_timeout_s)[0]

    def close(self) -> None:
        """Ends the thread, and the workers that are not yet built; the others are their owner's to end."""
        self._closing.set()
        self._thread.join(timeout=ANSWER_TIMEOUT_S)
        for worker in self._workers:
            if worker.phase in ("asked", "starting"):
                self._let_go(worker.actor)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _tell_notes(self) -> None:
        while self._notes:
            self._note(self._notes.popleft())

    # In the thread, but for what `submit` and `load` share with it under the lock.

    def _look_after(self) -> None:
        while not self._closing.is_set():
            with self._changed:
                awaited: list[Any] = [errand.stream for worker in self._workers for errand in list(worker.errands)[:1]]
                awaited += [worker.awaited for worker in self._workers if worker.comes_up]
            if awaited:
                ray.wait(awaited, num_returns=1, timeout=POLL_S, fetch_local=False)
            else:
                self._closing.wait(POLL_S)
            with self._changed:
                try:
                    self._turn()
                except Exception as failure:  # noqa: BLE001  the driver raises it at its next call
                    self._failure = failure
                    self._closing.set()
                self._changed.notify_all()

    def _turn(self) -> None:
        now = time.monotonic()
        away, self._looked = now - self._looked, now
        for worker in list(self._workers):
            if away > LOOKED_AWAY_S:
                worker.sign, worker.since = worker.sign + away, worker.since + away
            self._read(worker)
        for worker in list(self._workers):
            if worker.comes_up:
                self._bring_up(worker)
        if now - self._drains_looked > DRAIN_POLL_S:
            self._drains_looked = now
            self._heed_drains()
            self._note_who_starts()
        self._end_the_hung(now)
        for worker in list(self._workers):
            if worker.leaving and not worker.errands:
                self._retire(worker)
        self._dispatch()
        self._let_rest()
        note = self._shortage.look(self._workers, started=self._started)
        if note is not None:
            self._notes.append(note)

    def _new_worker(self, slot: int) -> Worker:
        number, self._incarnations[slot] = self._incarnations[slot], self._incarnations[slot] + 1
        name = worker_name(self._spec.role, slot, number)
        actor, now = self._hire(name), time.monotonic()
        self._pulses.follow(actor, name)
        return Worker(slot, name, actor, actor.where.remote(), now, now)

    def _read(self, worker: Worker) -> None:
        """What the worker has yielded; a death ends all that it holds, another error its task."""
        while worker.errands:
            errand = worker.errands[0]
            try:
                for value, header in errand.pairs():
                    worker.sign = time.monotonic()
                    self._finished.append(self._result(worker, errand, value, header))
            except RayError as error:
                if worker.died_by(error):
                    self._lose(worker, "died", cause_of_death(error), counted=not is_unreachable(error))
                    return
                self._fail(worker, errand, waiting.failure_of(error, f"{worker.name} at prompts {errand.named}"))
            except RunFailed as error:
                self._fail(worker, errand, error)
            if errand.missing:
                return
            worker.errands.popleft()

    def _result(self, worker: Worker, errand: Errand, value: Handle, header: tuple[int, float] | None) -> Result:
        if header is None:
            return Result(errand.task.number, (), None, None, worker.name, 0.0)
        prompt_id, seconds = header
        errand.missing.discard(prompt_id)
        self._losses.forgive(worker)
        return Result(errand.task.number, (prompt_id,), value, None, worker.name, seconds)

    def _fail(self, worker: Worker, errand: Errand, error: Exception) -> None:
        lost, errand.missing = tuple(sorted(errand.missing)), set()
        self._finished.append(Result(errand.task.number, lost, None, error, worker.name, 0.0))

    def _bring_up(self, worker: Worker) -> None:
        """The next phase, once what the worker waits for is there."""
        if worker.phase == "loading" and worker.errands and not self._spec.mid_task:
            return  # a worker does one thing after the other: it loads once its task is done
        if not ray.wait([worker.awaited], timeout=0, fetch_local=False)[0]:
            return
        try:
            answer = ray.get(worker.awaited, timeout=ANSWER_TIMEOUT_S)
        except RayError as error:
            self._not_up(worker, error)
            return
        self._advance(worker, answer)

    def _advance(self, worker: Worker, answer: Any) -> None:
        if worker.phase in ("asked", "starting"):
            worker.place = answer
            self._begin_setup(worker)
        elif worker.phase == "setting up" and not self._spec.takes_weights:
            self._is_up(worker)
        elif worker.phase == "setting up":
            worker.enter("without weights", worker.awaited)
            if self._published is not None:
                self._begin_loading(worker)
        elif worker.loading is not None and worker.loading is self._published:
            worker.loading.check(answer)
            worker.version, self._receipts[worker.name] = answer.version, answer
            self._is_up(worker)
        else:
            self._begin_loading(worker)  # a newer version was published meanwhile

    def _begin_setup(self, worker: Worker) -> None:
        worker.enter("setting up", worker.actor.setup.remote())

    def _begin_loading(self, worker: Worker) -> None:
        assert self._published is not None
        worker.loading = self._published
        worker.enter("loading", worker.actor.load.remote(self._published.weights))

    def _is_up(self, worker: Worker) -> None:
        worker.enter("ready", worker.awaited)
        if self._started and not worker.joined:
            at = "" if worker.version is None else f" at version {worker.version}"
            self._notes.append(f"{worker.name} joins{at}")
        worker.joined = True

    def _not_up(self, worker: Worker, error: RayError) -> None:
        """Its own death is made good, lost weights are published again by the next learner; all else is an error of
        the run: a model that does not load, weights that do not fit."""
        if worker.died_by(error):
            self._lose(worker, "died", cause_of_death(error), counted=False)
            return
        if isinstance(error, RayActorError) and error.actor_init_failed:
            raise RunFailed(f"{worker.name} could not be built: {error}")
        failure = waiting.failure_of(error, f"{worker.name} {worker.phase}")
        if worker.phase != "loading" or not isinstance(failure, ActorDied):
            raise failure
        worker.enter("without weights", worker.awaited)
        self._notes.append(f"{worker.name} has no weights: {failure}")

    def _heed_drains(self) -> None:
        """A worker whose node is about to go gets no new task and is replaced at once; it may finish what it has."""
        draining = placement.draining_nodes()
        for worker in list(self._workers):
            if worker.leaving or worker.place is None or worker.place.node_id not in draining:
                continue
            worker.leaving = True
            self._losses.count("left")
            self._notes.append(f"{worker.name} leaves, its node {worker.place.host} is drained; another is asked for")
            self._workers.append(self._new_worker(worker.slot))

    def _let_rest(self) -> None:
        """Workers beyond the needed ones that have had no work for long are let go, so that their nodes can go."""
        long_ago = time.monotonic() - self._spec.idle_release_s
        spare = [worker for worker in self._workers if worker.is_free and worker.slot >= self._spec.needed]
        for worker in [worker for worker in spare if max(worker.since, worker.sign) < long_ago]:
            self._notes.append(f"{worker.name} is let go after {self._spec.idle_release_s:g} s without work")
            self._resting.add(worker.slot)
            self._retire(worker)

    def _wake(self) -> None:
        """There is work: asks for all again."""
        if self._resting:
            self._notes.append(f"there is work again: {self._spec.role} workers {sorted(self._resting)} are asked for")
            self._workers += [self._new_worker(slot) for slot in sorted(self._resting)]
            self._resting.clear()

    def _note_who_starts(self) -> None:
        for worker in self._workers:
            if worker.phase == "asked" and placement.has_place(worker.actor):
                worker.enter("starting", worker.awaited)

    def _retire(self, worker: Worker) -> None:
        self._workers.remove(worker)
        self._let_go(worker.actor)
        self._pulses.forget(worker.actor)

    def _end_the_hung(self, now: float) -> None:
        silent = {each.actor_id: each.seconds for each in self._pulses.silent()}
        for worker in list(self._workers):
            lifeless_s = silent.get(worker.actor._actor_id.hex(), 0.0)
            if why := worker.why_hung(now, lifeless_s, self._spec.silence_s, self._spec.wait_timeout_s):
                self._lose(worker, "hung", f"{why} (at {worker.whereabouts})", counted=True)

    def _lose(self, worker: Worker, how: str, why: str, *, counted: bool) -> None:
        """Ends what the worker held, and the worker, and asks for another one in its place.

        Only what it had begun is suspected; tasks of which it had not heard go back to the queue."""
        node_id = None if worker.place is None else worker.place.node_id
        node_gone = how == "died" and placement.went_with_its_node(worker.actor, node_id)
        what = "left with its node" if node_gone else how
        message = f"{worker.name} {what}: {why}"
        held_by_it = "; ".join(f"prompts {errand.named}" for errand in worker.errands) or "nothing"
        suspected = counted and not node_gone and not worker.leaving
        again, results = taken_back(worker, message, suspected=suspected)
        self._queue.extendleft(again)
        self._finished.extend(results)
        self._retire(worker)
        if worker.leaving:
            return
        if worker.place is not None or not node_gone:  # one that found only a dying node was never there
            self._losses.count("left" if node_gone else how)
        if not node_gone:
            self._losses.blame(worker, message)
        self._notes.append(f"{message}. It held {held_by_it}. Another one takes its place")
        self._workers.append(self._new_worker(worker.slot))

    def _dispatch(self) -> None:
        """Tasks for nobody in particular go to the workers with the fewest."""
        room = 1 if self._spec.takes_weights else QUEUED
        while self._queue:
            able = [worker for worker in self._workers if worker.phase == "ready" and not worker.leaving]
            able = [worker for worker in able if len(worker.errands) < room]
            if not able:
                return
            worker = min(able, key=lambda worker: (len(worker.errands), worker.slot))
            worker.start(self._queue.popleft(), bound=False, in_slices=self._spec.in_slices)

    def _is_busy(self) -> bool:
        return bool(self._queue) or any(worker.errands for worker in self._workers)

    def _count(self, *phases: Phase) -> int:
        return sum(worker.phase in phases and not worker.leaving for worker in self._workers)
