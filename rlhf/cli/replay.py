"""`rlhf replay`: trains a step again from the buffer, in this process, and compares it with the record.

Starts from the newest checkpoint that is not later than the step (or from the model before training) and trains every
step from there on with the groups that were stored. Nothing is generated or judged, and the run directory is not
changed."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf import checkpoint, metrics
from rlhf.buffer.audit import ExperienceView
from rlhf.buffer.ledger import CommittedStep
from rlhf.buffer.schema import FILE_NAME
from rlhf.cli.exit_codes import BROKEN, DONE
from rlhf.cli.run_directory import CLUSTER_FILE, read_config
from rlhf.cluster import Cluster
from rlhf.config import RunConfig
from rlhf.config_file import load_cluster
from rlhf.errors import BadInput
from rlhf.interfaces import Learner

# Another number of ranks or threads adds in another order: equal maths then differs by rounding, which training grows.
RELATIVE_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Comparison:
    """A step trained again. `differences` hold metric -> (recorded, replayed) where they differ beyond rounding."""

    step: int
    same_weights: bool
    recorded_fingerprint: str
    replayed_fingerprint: str
    differences: Mapping[str, tuple[float, float]]

    @property
    def ok(self) -> bool:
        return self.same_weights or not self.differences


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory")
    parser.add_argument(
        "--step", type=int, required=True, metavar="N", help="the step, counted from 0 as in metrics.jsonl"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    config = read_config(arguments.run_dir)
    cluster = load_cluster(arguments.run_dir / CLUSTER_FILE, [])
    history = ExperienceView(arguments.run_dir / FILE_NAME).history()
    steps = [record.step for record in history]
    if arguments.step not in steps:
        there = f"steps {steps[0]} to {steps[-1]} are" if steps else "none is"
        raise BadInput(f"--step {arguments.step}: not a committed step of {arguments.run_dir}; {there}")
    found = replay(arguments.run_dir, config, cluster, history, arguments.step)
    print(json.dumps(_as_json(found)) if arguments.json else _in_words(found))
    return DONE if found.ok else BROKEN


def replay(
    run_dir: Path, config: RunConfig, cluster: Cluster, history: Sequence[CommittedStep], step: int
) -> Comparison:
    """Trains up to and including `step` on the stored groups and compares its last step with the record."""
    learner, first = _learner(run_dir, config, cluster, step)
    view = ExperienceView(run_dir / FILE_NAME)
    records = {record.step: record for record in history}
    measured: metrics.Metrics = {}
    for number in range(first, step + 1):
        groups = learner.annotate(view.replay(number))
        measured = learner.update(learner.prepare(groups))
    record, replayed = records[step], learner.publish()
    return Comparison(
        step,
        replayed.fingerprint == record.fingerprint,
        record.fingerprint,
        replayed.fingerprint,
        differences(record.metrics, metrics.values(measured)),
    )


def differences(recorded: Mapping[str, float], replayed: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """The metrics of both sides that differ by more than rounding. Times and rates are no part of the result."""
    found = {}
    for name in sorted(recorded.keys() & replayed.keys()):
        if name.startswith(("time/", "tokens/", "sync/")):
            continue
        left, right = recorded[name], replayed[name]
        if abs(left - right) > RELATIVE_TOLERANCE * max(abs(left), abs(right), RELATIVE_TOLERANCE):
            found[name] = (left, right)
    return found


def _learner(run_dir: Path, config: RunConfig, cluster: Cluster, step: int) -> tuple[Learner, int]:
    """The learner as it was at the newest checkpoint up to `step`, and the first step that it has not trained."""
    import torch

    from rlhf.blueprint import draw
    from rlhf.learner.paired import PairedLearner
    from rlhf.local import LocalLearner

    torch.set_num_threads(cluster.threads_of(cluster.trainer))
    rank = PairedLearner(config, draw(config).algorithm, 0, 1, None)
    rank.setup()
    learner = LocalLearner(rank)
    early = [folder for folder in checkpoint.folders(run_dir) if checkpoint.updates_of(folder.name) <= step]
    start = next((folder for folder in reversed(early) if not checkpoint.problems(folder)), None)
    if start is not None:
        learner.load(start)
    return learner, learner.version


def _in_words(found: Comparison) -> str:
    if found.same_weights:
        return (
            f"step {found.step}: the weights after it are the recorded ones, bit for bit ({found.recorded_fingerprint})"
        )
    lines = [
        f"step {found.step}: the weights differ from the recorded ones "
        f"({found.replayed_fingerprint}, recorded {found.recorded_fingerprint})"
    ]
    lines += [f"  {name}: {right:.6g}, recorded {left:.6g}" for name, (left, right) in found.differences.items()]
    if found.ok:
        lines.append("  but no metric differs beyond rounding; other ranks, threads or hardware do that")
    return "\n".join(lines)


def _as_json(found: Comparison) -> dict[str, object]:
    return {
        "ok": found.ok,
        "step": found.step,
        "same_weights": found.same_weights,
        "recorded_fingerprint": found.recorded_fingerprint,
        "replayed_fingerprint": found.replayed_fingerprint,
        "differences": {name: list(pair) for name, pair in found.differences.items()},
    }
