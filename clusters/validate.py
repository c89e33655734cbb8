"""Checks every file in this folder without a cluster: `make validate-clusters`, or `python -m clusters.validate FILE`.

A file is held against the schema of its kind, closed, so that a misspelt key is a fault, and against rules for what
schemas leave free (checks/). One line a fault, with the file and the field; the exit code is 1 when there is one.
docs/clusters.md says what is checked and what cannot be.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from clusters.checks import kuberay, lock, ray_up, secrets, skypilot, slurm
from clusters.checks.documents import Fault, against, document, documents, own_schema
from rlhf.config_file import load_cluster
from rlhf.errors import BadInput

HERE = Path(__file__).resolve().parent
PREREQUISITES = "prerequisites.yaml"
# Files that are none for machines.
OURS = {".py", ".json", ".dockerignore", ".pyc"}


def files() -> list[Path]:
    """Every file that is for a person to run with; each kind has a folder."""
    found = [path for path in HERE.rglob("*") if path.is_file() and path.suffix not in OURS]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def faults(path: Path) -> Iterator[Fault]:
    """What is wrong with a file. Its folder, or its name, says of which kind it is; copies elsewhere keep both."""
    kind = path.parent.name
    try:
        if path.name == "Dockerfile":
            yield from lock.dockerfile(path.read_text())
        elif path.suffix == ".sbatch":
            text = path.read_text()
            yield from [*secrets.in_clear([text]), *secrets.open_doors([text]), *slurm.faults(text)]
        elif path.suffix == ".yaml":
            found = documents(path) if kind == "kuberay" else document(path)
            yield from [*secrets.in_clear(found), *secrets.open_doors(found)]
            yield from _yaml(path, kind, found)
        else:
            yield Fault("(file)", "is of no kind that is known here, so that nothing checks it")
    except BadInput as error:
        yield Fault("(file)", str(error))


def _yaml(path: Path, kind: str, found: object) -> Iterator[Fault]:
    if kind == "ray_up":
        yield from ray_up.faults(found)
    elif kind == "kuberay":
        beside = path.with_name(PREREQUISITES)
        names = kuberay.names_of(documents(beside)) if beside.exists() else {}
        yield from kuberay.faults(found if isinstance(found, list) else [found], names)
    elif kind == "skypilot":
        yield from skypilot.faults(found)
    elif kind == "ray_job":
        yield from against(own_schema("runtime_env.json"), found, "")
    else:
        load_cluster(path, [])


def main(arguments: Sequence[str]) -> int:
    paths = [Path(argument).resolve() for argument in arguments] or files()
    count = 0
    for path in paths:
        name = path.relative_to(HERE.parent) if path.is_relative_to(HERE.parent) else path
        found = list(faults(path))
        count += len(found)
        for fault in found:
            print(f"{name}: {fault.field}: {fault.text}")
        if not found:
            print(f"{name}: good")
    print(f"{len(paths)} files, {count} faults")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
