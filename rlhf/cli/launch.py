"""One run from start to end: builds the team, goes on from what the run directory holds, and keeps the record.

The outermost layer, and the only place that imports `actors`. Everything before this (reading files, refusing bad
input) is in `rlhf/cli/run.py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rlhf import checkpoint, metrics
from rlhf.blueprint import draw, evaluation_sampling, without_rollouts
from rlhf.buffer.schema import FILE_NAME, DamagedExperience
from rlhf.buffer.snapshot import moment_of
from rlhf.chaos.points import point
from rlhf.cli.restarts import Restarts
from rlhf.cli.run_directory import CONFIG_FILE
from rlhf.cli.skipped import skipped_text
from rlhf.cli.stop import StopRequest
from rlhf.cluster import Cluster
from rlhf.config import RunConfig
from rlhf.data.recorded import RecordedSet
from rlhf.errors import ActorDied, BadInput, RunFailed, TrainerDied
from rlhf.evaluation import heldout
from rlhf.judges.scales import SCALES_FILE
from rlhf.loop import Team, train
from rlhf.metrics import Metrics
from rlhf.observers import EVALUATIONS_FILE, METRICS_FILE, Observer, Outcome, append_durably, read_steps
from rlhf.sources import Interrupted, PolicySource
from rlhf.storage import Archive, Storage
from rlhf.team import Order, Prompts
from rlhf.watchdog import Watchdog

# Mean |log-prob difference| a token, in nats, above which a step is reported. Seen: 1e-5 in float32, 0.01 in bfloat16.
MISMATCH_ALARM = {"float32": 1e-4, "bfloat16": 0.1}

# The phases of a step by the names that the loop gives them.
PHASES = {
    "wait": "waiting for groups",
    "annotate": "annotating",
    "update": "training",
    "sync": "publishing, committing, bringing the engines to the new weights",
}


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
        watchdog: Watchdog,
        archive: Archive | None,
    ) -> None:
        self._watchdog = watchdog
        self._config, self._run_dir, self._team, self._source = config, run_dir, team, source
        self._archive = archive
        self._heldout, self._observer, self._restarts = prompts.heldout_prompts(), observer, restarts
        self._evaluations = run_dir / EVALUATIONS_FILE
        self._saved: checkpoint.Checkpoint | None = None
        self._samples_itself = not isinstance(prompts, RecordedSet)

    def step_at(self, step: int, phase: str) -> None:
        self._watchdog.enter(f"step {step + 1}: {PHASES.get(phase, phase)}")

    def step_done(self, step: int, measured: Metrics) -> None:
        values = metrics.values(measured)
        told = {"step": step, "policy_version": step + 1, **self._restarts.read(), **values}
        if self._archive is not None:
            told["faults/uploads"] = self._archive.failed
        self._observer.step(step, told)
        if (skipped := skipped_text(step, values)) is not None:
            self._observer.note(skipped)
        self._restarts.step_done(step)
        self._watch_mismatch(step, values.get("mismatch/logprob_abs_mean", 0.0))
        if self._archive is not None:
            self._archive.step_done(step + 1)

    def _watch_mismatch(self, step: int, gap: float) -> None:
        """Says so when trainer and rollout engine disagree, and ends the run where the run file asks for that."""
        generation = self._config.generation
        if generation is None or not self._samples_itself:
            return
        alarm = generation.mismatch_alarm or MISMATCH_ALARM[generation.dtype or self._config.learner.dtype]
        found = f"step {step}: trainer and rollout engine differ by {gap:.3g} nats a token on average"
        if generation.mismatch_stop is not None and gap > generation.mismatch_stop:
            raise RunFailed(f"{found}, generation.mismatch_stop is {generation.mismatch_stop:g}")
        if gap > alarm:
            self._observer.note(f"mismatch alarm at {found} (alarm at {alarm:g})")

    def evaluate_if_due(self, updates: int) -> None:
        loop = self._config.loop
        due = updates in (0, loop.num_steps) or (loop.eval_every and updates % loop.eval_every == 0)
        if not due or not self._heldout or any(row["step"] == updates for row in read_steps(self._evaluations)[0]):
            return
        self._watchdog.enter(f"evaluating after {updates} steps")
        report = self._evaluation(updates)
        point("evaluation: measured")
        append_durably(self._evaluations, report.to_json())
        point("evaluation: appended")
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

    def save(self, updates: int) -> Path:
        """Writes a checkpoint of now, unless there is one, and returns its folder; then the old ones make way."""
        if self._saved is None or self._saved.updates != updates:
            self._watchdog.enter(f"saving a checkpoint after {updates} steps")
            info = {"seed": self._config.seed}
            self._saved = checkpoint.write(self._run_dir, updates, info, self._team.learner.save)
            _make_way(self._config, self._run_dir, updates)
            if self._archive is not None:
                self._archive.checkpoint_saved()
        return self._saved.folder


def _make_way(config: RunConfig, run_dir: Path, updates: int) -> None:
    """Old checkpoints are removed, but for the one of now and the best so far, where that is to be kept.

    Newer ones than that of now may be damaged in ways that only checksums show."""
    measure, kept = config.loop.keep_best, [updates]
    if measure is not None:
        best = heldout.best(read_steps(run_dir / EVALUATIONS_FILE)[0], measure, checkpoint.committed(run_dir))
        kept += [] if best is None else [best]
    checkpoint.prune(run_dir, config.loop.keep_checkpoints, kept)


def run(
    config: RunConfig, cluster: Cluster, run_dir: Path, prompts: Prompts, *, in_process: bool, observer: Observer
) -> Outcome:
    """Trains to the end, or until it is asked to stop; the run directory then holds everything to go on.

    When a trainer rank dies, the trainer is built again (`_train`). When that is not enough the whole team is: it goes
    on from the last checkpoint, and trains the steps since then from the buffer. Raises what the parts raise
    (rlhf.errors).
    """
    return _run(_Job(config, cluster, run_dir.absolute(), prompts, in_process, observer, None))


def generate(
    config: RunConfig,
    cluster: Cluster,
    run_dir: Path,
    prompts: Prompts,
    steps: int,
    *,
    in_process: bool,
    observer: Observer,
) -> Outcome:
    """Samples and judges so many steps ahead with the policy as it is, and trains nothing: `run` goes on with them."""
    return _run(_Job(config, cluster, run_dir.absolute(), prompts, in_process, observer, steps))


def _run(job: "_Job") -> Outcome:
    with job.stop.listening(), job.watchdog:
        while True:
            try:
                return _attempt(job)
            except ActorDied as died:
                if job.stop():
                    return "interrupted"
                job.restarts.count("team", died)
            except DamagedExperience as damaged:
                if job.archive is None:
                    raise
                raise DamagedExperience(f"{damaged}. Next: {job.archive.remedy}") from damaged


def gather(order: Order, stop: StopRequest, *, in_process: bool) -> None:
    """Fills the buffer with the judged groups of all steps, sampled from the policy as it is; trains nothing."""
    with stop.listening(), _built(order, in_process) as (team, source):
        stop.setting_up = False
        source.sync(team.learner.publish())
        for step in range(order.blueprint.demand.num_steps):
            source.take(step)


class _Job:
    """What all attempts at one run have in common. generate_only, the steps to sample ahead in place of training."""

    def __init__(
        self,
        config: RunConfig,
        cluster: Cluster,
        run_dir: Path,
        prompts: Prompts,
        in_process: bool,
        observer: Observer,
        generate_only: int | None,
    ) -> None:
        self.config, self.cluster, self.run_dir, self.prompts = config, cluster, run_dir, prompts
        self.in_process, self.observer, self.generate_only = in_process, observer, generate_only
        self.stop = StopRequest()
        self.restarts = Restarts(config.loop.max_restarts, observer.note)
        self.watchdog = Watchdog(run_dir, config.loop.wait_timeout_s, observer.note)
        self.archive = _archive(cluster, run_dir, observer)


def _attempt(job: _Job) -> Outcome:
    """One team, from where the run directory stands to the end of the run, unless an actor dies before."""
    config, run_dir = job.config, job.run_dir
    start = _where_to_start(job)
    if start.folder is not None:  # the process that wrote it may have died before others made way
        _make_way(config, run_dir, start.updates)
    if start.updates >= config.loop.num_steps and not _misses_evaluation(config, run_dir, job.prompts):
        job.observer.note(f"all {config.loop.num_steps} steps are done")
        if job.archive is not None:
            job.archive.finish()
        return "done"
    blueprint = draw(config)
    order = Order(
        without_rollouts(blueprint) if isinstance(job.prompts, RecordedSet) else blueprint,
        job.cluster,
        run_dir,
        job.prompts,
        start.folder,
        start.updates,
        job.stop,
        job.observer.note,
        job.restarts.count,
    )
    job.stop.setting_up = True
    job.watchdog.enter("setting up the team")
    with _team(order, job) as (team, source):
        job.stop.setting_up = False
        job.watchdog.follows(lambda: source.last_progress)
        try:
            if job.generate_only is not None:
                return _generate(job, team, source, job.generate_only)
            updates = _train(job, team, source, start)
        except Interrupted:
            updates = team.learner.version
        if updates < config.loop.num_steps:
            _record(job, team, source).save(updates)
        job.watchdog.enter("dismissing the team")
    if job.archive is not None:
        job.archive.finish()
    return "done" if updates == config.loop.num_steps else "interrupted"


def _generate(job: _Job, team: Team, source: PolicySource, steps: int) -> Outcome:
    """Samples and judges so many steps ahead under the policy as it is; trains nothing. They are the next run's."""
    job.watchdog.enter(f"sampling {steps} steps ahead, training none")
    source.sync(team.learner.publish())
    count = source.fill(steps)
    job.observer.note(f"{count} groups are stored and judged, for the steps from {team.learner.version} on")
    if job.archive is not None:
        job.archive.finish()
    return "done"


def _train(job: _Job, team: Team, source: PolicySource, start: "Start") -> int:
    """The loop. When a rank of the trainer dies, the trainer alone goes back to its checkpoint: the steps since then
    come out of the buffer again, while engines and judges keep what they hold and take the weights that it publishes.

    Raises ActorDied when another actor dies, or a rank again before the trainer stands.
    """
    source.pause_when(team.learner.notice)
    while True:
        job.observer.started(job.config, start.updates, job.config.loop.num_steps)
        record = _record(job, team, source)
        try:
            while (updates := _train_until_notice(job, team, record)) is None:
                _heed_notice(job, team, record)
            return updates
        except TrainerDied as died:
            if job.stop():
                raise
            job.restarts.count("trainer", died)
            job.watchdog.enter("building the trainer again")
            start = _where_to_start(job)
            team.learner.load(start.folder)
            team.buffer.rewind(start.updates)


def _train_until_notice(job: _Job, team: Team, record: Record) -> int | None:
    """The loop; None where it came to a safe point because the learner is to leave a machine that is about to go."""
    loop = job.config.loop
    try:
        updates = train(team, loop, record, lambda: job.stop() or team.learner.notice())
    except Interrupted:
        if job.stop():
            raise
        return None
    return updates if updates == loop.num_steps or job.stop() else None


def _heed_notice(job: _Job, team: Team, record: Record) -> None:
    """Saves what is done, and moves the learner if there is another place for it."""
    folder = record.save(team.learner.version)
    job.watchdog.enter("moving the trainer to nodes that stay")
    if team.learner.move(folder):
        job.restarts.moved(team.learner.version)


def _record(job: _Job, team: Team, source: PolicySource) -> Record:
    return Record(
        job.config, job.run_dir, team, source, job.prompts, job.observer, job.restarts, job.watchdog, job.archive
    )


def _misses_evaluation(config: RunConfig, run_dir: Path, prompts: Prompts) -> bool:
    """Whether the run was ended between its last checkpoint and its last evaluation."""
    recorded = {row["step"] for row in read_steps(run_dir / EVALUATIONS_FILE)[0]}
    return bool(prompts.heldout_prompts()) and config.loop.num_steps not in recorded


def _archive(cluster: Cluster, run_dir: Path, observer: Observer) -> Archive | None:
    """What keeps the address of the cluster file in step with the run directory; None where it names none."""
    place = cluster.storage
    if place.address is None:
        return None
    logs = (CONFIG_FILE, METRICS_FILE, EVALUATIONS_FILE, SCALES_FILE)
    return Archive(Storage(place.address), run_dir, place.buffer_every, logs, observer.note)


class Start(NamedTuple):
    """Where the run directory stands: the updates so far and the checkpoint of then, None at the very start."""

    updates: int
    folder: Path | None


def _where_to_start(job: _Job) -> Start:
    """The newest whole checkpoint; a damaged newer one is replaced by its stored copy, where there is a whole one."""
    newest, rejected = checkpoint.newest(job.run_dir)
    for refused in rejected:
        job.observer.note(f"checkpoint {refused.folder.name} is not used: {refused.reason}")
        if job.archive is not None and job.archive.mend(refused):
            job.observer.note(f"{refused.folder.name} is restored from {job.archive.address}")
            newest, _ = checkpoint.newest(job.run_dir)
            break
    if newest is None:
        return Start(0, None)
    _check_ledger(newest, job.run_dir / FILE_NAME, job.archive)
    job.observer.note(f"goes on from {newest.folder}")
    return Start(newest.updates, newest.folder)


def _check_ledger(start: checkpoint.Checkpoint, path: Path, archive: Archive | None) -> None:
    """Raises BadInput where the ledger lacks steps of the checkpoint: their prompts would be trained again."""
    committed = moment_of(path).updates if path.exists() else 0
    if committed < start.updates:
        found = f"knows {committed} steps" if path.exists() else "is missing"
        remedy = "restore the run directory from a copy" if archive is None else archive.remedy
        raise BadInput(f"{path}: {found}, but {start.folder.name} was written after {start.updates}. Next: {remedy}")


@contextmanager
def _team(order: Order, job: _Job) -> Iterator[tuple[Team, PolicySource]]:
    if not job.in_process:
        from actors import waiting

        job.watchdog.asks(waiting.current)
    with _built(order, job.in_process) as built:
        yield built


@contextmanager
def _built(order: Order, in_process: bool) -> Iterator[tuple[Team, PolicySource]]:
    """Ray is imported only when it is used: a run in one process needs none."""
    if in_process:
        from rlhf.local import local_team

        with local_team(order) as built:
            yield built
    else:
        from actors.team import ray_team

        with ray_team(order) as built:
            yield built
