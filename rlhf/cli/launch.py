"""One run from start to end: builds the team, goes on from what the run directory holds, and keeps the record.

The outermost layer, and the only place that imports `actors`. Everything before this (reading files, refusing bad
input) is in `rlhf/cli/run.py`."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rlhf import checkpoint, metrics
from rlhf.blueprint import draw, evaluation_sampling
from rlhf.cluster import Cluster
from rlhf.config import RunConfig
from rlhf.errors import ActorDied, RunFailed
from rlhf.evaluation import heldout
from rlhf.loop import Team, train
from rlhf.metrics import Metrics
from rlhf.observers import EVALUATIONS_FILE, Observer, Outcome, append_durably, read_jsonl
from rlhf.sources import Interrupted, PolicySource
from rlhf.team import Order, Prompts

# Mean |log-prob difference| a token, in nats, above which a step is reported. Seen: 1e-5 in float32, 0.01 in bfloat16.
MISMATCH_ALARM = {"float32": 1e-4, "bfloat16": 0.1}


class StopRequest:
    """Set by the first SIGINT or SIGTERM; the run then stops at the next safe point. The second SIGINT is immediate."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    @contextmanager
    def listening(self) -> Iterator[None]:
        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Restarts:
    """How often the team was built again because an actor died. `limit` bounds those in a row without a new step."""

    def __init__(self, limit: int) -> None:
        self.total = 0
        self._limit, self._in_a_row, self._furthest = limit, 0, -1

    def step_done(self, step: int) -> None:
        """A step that was done before and is replayed is no progress."""
        if step > self._furthest:
            self._furthest, self._in_a_row = step, 0

    def count(self, died: ActorDied) -> None:
        """Raises RunFailed when there were too many."""
        self.total += 1
        self._in_a_row += 1
        if self._in_a_row > self._limit:
            raise RunFailed(
                f"an actor died {self._in_a_row} times in a row without a new step; the last: {died}"
            ) from died


class Record:
    """The chronicle of a run in its directory: steps, evaluations, checkpoints."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        team: Team,
        source: PolicySource,
        prompts: Prompts,
        observer: Observer,
        restarts: Restarts,
    ) -> None:
        self._config, self._run_dir, self._team, self._source = config, run_dir, team, source
        self._heldout, self._observer, self._restarts = prompts.heldout_prompts(), observer, restarts
        self._evaluations = run_dir / EVALUATIONS_FILE
        self._saved_at: int | None = None

    def step_done(self, step: int, measured: Metrics) -> None:
        values = metrics.values(measured)
        told = {"step": step, "policy_version": step + 1, "faults/restarts": self._restarts.total, **values}
        self._observer.step(step, told)
        self._restarts.step_done(step)
        self._watch_mismatch(step, values.get("mismatch/logprob_abs_mean", 0.0))

    def _watch_mismatch(self, step: int, gap: float) -> None:
        """Says so when trainer and rollout engine disagree, and ends the run where the run file asks for that."""
        generation = self._config.generation
        if generation is None:
            return
        alarm = generation.mismatch_alarm or MISMATCH_ALARM[self._config.learner.dtype]
        found = f"step {step}: trainer and rollout engine differ by {gap:.3g} nats a token on average"
        if generation.mismatch_stop is not None and gap > generation.mismatch_stop:
            raise RunFailed(f"{found}, generation.mismatch_stop is {generation.mismatch_stop:g}")
        if gap > alarm:
            self._observer.note(f"mismatch alarm at {found} (alarm at {alarm:g})")

    def evaluate_if_due(self, updates: int) -> None:
        loop = self._config.loop
        due = updates in (0, loop.num_steps) or (loop.eval_every and updates % loop.eval_every == 0)
        if not due or not self._heldout or any(row["step"] == updates for row in read_jsonl(self._evaluations)):
            return
        report = self._evaluation(updates)
        append_durably(self._evaluations, report.to_json())
        self._observer.evaluated(updates, report)

    def _evaluation(self, updates: int) -> heldout.Evaluation:
        """Answers to held-out prompts and their rewards; for held-out rows of data, what the loss measures of them."""
        groups = self._source.answer(self._heldout, evaluation_sampling(self._config))
        if self._config.records == "prompts":
            return heldout.report(updates, groups, self._config.evaluation.samples)
        learner = self._team.learner
        measured = metrics.values(learner.evaluate(learner.annotate(groups)))
        return heldout.HeldoutMeasures(updates, len(groups), measured)

    def checkpoint_if_due(self, updates: int) -> None:
        loop = self._config.loop
        if updates == loop.num_steps or (loop.checkpoint_every and updates % loop.checkpoint_every == 0):
            self.save(updates)

    def save(self, updates: int) -> None:
        """Writes a checkpoint of now, unless there is one; then the old ones make way."""
        if self._saved_at == updates:
            return
        checkpoint.write(self._run_dir, updates, {"seed": self._config.seed}, self._team.learner.save)
        checkpoint.prune(self._run_dir, self._config.loop.keep_checkpoints)
        self._saved_at = updates


def run(
    config: RunConfig, cluster: Cluster, run_dir: Path, prompts: Prompts, *, in_process: bool, observer: Observer
) -> Outcome:
    """Trains to the end, or until it is asked to stop; the run directory then holds everything to go on.

    When an actor dies the team is built again: it goes on from the last checkpoint, and trains the steps since then
    from the buffer. Raises what the parts raise (rlhf.errors).
    """
    stop, restarts = StopRequest(), Restarts(config.loop.max_restarts)
    while True:
        try:
            return _attempt(config, cluster, run_dir, prompts, observer, stop, restarts, in_process=in_process)
        except ActorDied as died:
            if stop():
                return "interrupted"
            restarts.count(died)
            observer.note(f"{died}. The team is built again; nothing that was stored is generated again")


def _attempt(
    config: RunConfig,
    cluster: Cluster,
    run_dir: Path,
    prompts: Prompts,
    observer: Observer,
    stop: StopRequest,
    restarts: Restarts,
    *,
    in_process: bool,
) -> Outcome:
    """One team, from where the run directory stands to the end of the run, unless an actor dies before."""
    start = _where_to_start(run_dir, observer)
    first = start.updates if start else 0
    folder = start.folder if start else None
    if first >= config.loop.num_steps and not _misses_evaluation(config, run_dir, prompts):
        observer.note(f"all {config.loop.num_steps} steps are done")
        return "done"
    order = Order(draw(config), cluster, run_dir.absolute(), prompts, folder, first, stop, observer.note)
    # Ray puts its own handlers in place when it starts, so ours go on top of them.
    with _team(order, in_process) as (team, source), stop.listening():
        observer.started(config, first, config.loop.num_steps)
        record = Record(config, run_dir, team, source, prompts, observer, restarts)
        try:
            updates = train(team, config.loop, record, stop)
        except Interrupted:
            updates = team.learner.version
        if updates < config.loop.num_steps:
            record.save(updates)
            return "interrupted"
    return "done"


def _misses_evaluation(config: RunConfig, run_dir: Path, prompts: Prompts) -> bool:
    """Whether the run was ended between its last checkpoint and its last evaluation."""
    recorded = {row["step"] for row in read_jsonl(run_dir / EVALUATIONS_FILE)}
    return bool(prompts.heldout_prompts()) and config.loop.num_steps not in recorded


def _where_to_start(run_dir: Path, observer: Observer) -> checkpoint.Checkpoint | None:
    newest, rejected = checkpoint.newest(run_dir)
    for refused in rejected:
        observer.note(f"checkpoint {refused.folder.name} is not used: {refused.reason}")
    if newest:
        observer.note(f"goes on from {newest.folder}")
    return newest


@contextmanager
def _team(order: Order, in_process: bool) -> Iterator[tuple[Team, PolicySource]]:
    """Ray is imported only when it is used: a run in one process needs none."""
    if in_process:
        from rlhf.local import local_team

        with local_team(order) as built:
            yield built
    else:
        from actors.team import ray_team

        with ray_team(order) as built:
            yield built
