"""`rlhf export`: the policy as a model folder, or the experience as a Hugging Face data set."""

import argparse
import shutil
import tempfile
from pathlib import Path

from rlhf import checkpoint
from rlhf.cli.exit_codes import DONE
from rlhf.cli.run_directory import read_config
from rlhf.errors import BadInput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--what", choices=("policy", "experience"), default="policy", help="default: policy")


def run(arguments: argparse.Namespace) -> int:
    read_config(arguments.run_dir)
    if arguments.what == "policy":
        source = export_policy(arguments.run_dir, arguments.to)
        print(f"{arguments.to}: the policy of {source.parent.name}; loads with from_pretrained and in vLLM")
    else:
        from rlhf.buffer.export import export_experience

        count = export_experience(arguments.run_dir, arguments.to)
        print(f"{arguments.to}: {count} samples; loads with datasets.load_dataset")
    return DONE


def newest_policy(run_dir: Path) -> Path:
    """The policy folder of the newest valid checkpoint. Raises BadInput when there is none, with what was refused."""
    newest, rejected = checkpoint.newest(run_dir)
    if newest is None:
        refused = "".join(f"; {entry.folder.name} is not used: {entry.reason}" for entry in rejected)
        raise BadInput(f"{run_dir}: no checkpoint yet{refused}. Next: let the run reach loop.checkpoint_every steps")
    return newest.folder / "policy"


def export_policy(run_dir: Path, to: Path) -> Path:
    """Copies the newest policy; the folder appears whole or not at all. Returns what was copied."""
    source = newest_policy(run_dir)
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
