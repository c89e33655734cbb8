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
from rlhf.data.prompts import PromptSet
from rlhf.errors import RunFailed
from rlhf.evaluation import heldout
from rlhf.loop import Team, train
from rlhf.metrics import Metrics
from rlhf.observers import EVALUATIONS_FILE, Observer, Outcome, append_durably, read_jsonl
from rlhf.sources import Interrupted, PolicySource
from rlhf.team import Order

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


class Record:
    """The chronicle of a run in its directory: steps, evaluations, checkpoints."""

    def __init__(
        self, config: RunConfig, run_dir: Path, team: Team, source: PolicySource, prompts: PromptSet, observer: Observer
    ) -> None:
        self._config, self._run_dir, self._team, self._source = config, run_dir, team, source
        self._heldout, self._observer = prompts.heldout_prompts(), observer
        self._evaluations = run_dir / EVALUATIONS_FILE
        self._saved_at: int | None = None

    def step_done(self, step: int, measured: Metrics) -> None:
        values = metrics.values(measured)
        self._observer.step(step, {"step": step, "policy_version": step + 1, **values})
        self._watch_mismatch(step, values.get("mismatch/logprob_abs_mean", 0.0))

    def _watch_mismatch(self, step: int, gap: float) -> None:
        """Says so when trainer and rollout engine disagree, and ends the run where the run file asks for that."""
        generation = self._config.generation
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
        groups = self._source.answer(self._heldout, evaluation_sampling(self._config))
        report = heldout.report(updates, groups, self._config.evaluation.samples)
        append_durably(self._evaluations, report.to_json())
        self._observer.evaluated(updates, report)

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
    config: RunConfig, cluster: Cluster, run_dir: Path, prompts: PromptSet, *, in_process: bool, observer: Observer
) -> Outcome:
    """Trains to the end, or until it is asked to stop; the run directory then holds everything to go on.

    Raises what the parts raise (rlhf.errors); the observer has been told by then.
    """
    stop = StopRequest()
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
        record = Record(config, run_dir, team, source, prompts, observer)
        try:
            updates = train(team, config.loop, record, stop)
        except Interrupted:
            updates = team.learner.version
        if updates < config.loop.num_steps:
            record.save(updates)
            return "interrupted"
    return "done"


def _misses_evaluation(config: RunConfig, run_dir: Path, prompts: PromptSet) -> bool:
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
