"""`rlhf export`: the policy as a model folder, or the experience as a Hugging Face data set."""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rlhf import checkpoint
from rlhf.cli.exit_codes import DONE
from rlhf.cli.folders import writing
from rlhf.cli.run_directory import CONFIG_FILE, read_config
from rlhf.config import RunConfig
from rlhf.errors import BadInput
from rlhf.evaluation import heldout
from rlhf.observers import EVALUATIONS_FILE, read_steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--what", choices=("policy", "experience"), default="policy", help="default: policy")
    parser.add_argument(
        "--checkpoint",
        type=_choice,
        metavar="WHICH",
        help="which policy: latest (default), best (by loop.keep_best), or the number of updates before it",
    )


def run(arguments: argparse.Namespace) -> int:
    config = read_config(arguments.run_dir)
    _check_outside_checkpoints(arguments.to)
    if arguments.what == "policy":
        policy = policy_of(arguments.run_dir, config, arguments.checkpoint or "latest")
        with writing("--to", arguments.to):
            source = export_policy(policy, arguments.to)
        print(f"{arguments.to}: the policy of {source.parent.name}; loads with from_pretrained and in vLLM")
        return DONE
    if arguments.checkpoint is not None:
        raise BadInput("--checkpoint: chooses a policy; with --what experience all samples are written. Leave it out")
    from rlhf.buffer.export import export_experience

    with writing("--to", arguments.to):
        count = export_experience(arguments.run_dir, arguments.to)
    print(f"{arguments.to}: {count} samples; loads with datasets.load_dataset")
    return DONE


def _check_outside_checkpoints(to: Path) -> None:
    """What stands among the checkpoints of a run, this one or another, is read as one of them, and pruned as one."""
    with writing("--to", to):
        place = to.resolve()
    for folder in (place, *place.parents):
        if folder.name == checkpoint.FOLDER and (folder.parent / CONFIG_FILE).is_file():
            raise BadInput(f"--to {to}: is among the checkpoints of the run {folder.parent}; expected a folder outside")


def policy_of(run_dir: Path, config: RunConfig, which: int | str) -> Path:
    """The policy folder of a checkpoint: `latest`, `best`, or by its updates. Raises BadInput when there is none, or
    when the one that was asked for is not whole, with what was refused."""
    if which == "latest":
        return newest_policy(run_dir)
    there = checkpoint.committed(run_dir)
    updates = _best(run_dir, config, there) if which == "best" else int(which)
    folder = run_dir / checkpoint.FOLDER / f"step-{updates:06d}"
    if not folder.is_dir():
        raise BadInput(f"--checkpoint {which}: {run_dir} has the checkpoints {there}")
    if faults := checkpoint.problems(folder):
        raise BadInput(f"--checkpoint {which}: {folder.name} is not used: {faults[0]}. Others are {there}")
    return folder / "policy"


def _best(run_dir: Path, config: RunConfig, among: Sequence[int]) -> int:
    measure = config.loop.keep_best
    if measure is None:
        raise BadInput("--checkpoint best: loop.keep_best is not set, so none was kept as the best; expected a number")
    updates = heldout.best(read_steps(run_dir / EVALUATIONS_FILE)[0], measure, among)
    if updates is None:
        raise BadInput(f"--checkpoint best: none of the checkpoints {list(among)} was evaluated")
    return updates


def _choice(text: str) -> int | str:
    if text in ("latest", "best"):
        return text
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"'{text}': expected latest, best or a number of updates")


def newest_policy(run_dir: Path) -> Path:
    """The policy folder of the newest valid checkpoint. Raises BadInput when there is none, with what was refused."""
    newest, rejected = checkpoint.newest(run_dir)
    if newest is None:
        refused = "".join(f"; {entry.folder.name} is not used: {entry.reason}" for entry in rejected)
        raise BadInput(f"{run_dir}: no checkpoint yet{refused}. Next: let the run reach loop.checkpoint_every steps")
    return newest.folder / "policy"


def export_policy(source: Path, to: Path) -> Path:
    """Copies a policy; the folder appears whole or not at all. Returns what was copied."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise BadInput(f"--to {to}: exists already; expected a new or empty folder")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-") as scratch:
        whole = Path(scratch) / "policy"
        shutil.copytree(source, whole)
        if to.exists():
            to.rmdir()
        whole.rename(to)
    return source
