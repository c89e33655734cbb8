"""The `rlhf run` commands in files for machines: whether they can be typed, and what they name."""

import contextlib
import io
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from clusters.checks.documents import ROOT, Fault
from rlhf.cli.main import _parser
from rlhf.cluster import Cluster
from rlhf.config_file import load_cluster, load_run
from rlhf.errors import BadInput

IN_THE_IMAGE = "/opt/ray-rlhf/"
COMMAND = re.compile(r"\brlhf run\b[^\n;|&]*")


def cluster_file(field: str, name: object) -> tuple[Cluster | None, list[Fault]]:
    """The cluster file that a file is for, or why there is none."""
    if not isinstance(name, str):
        return None, [Fault(field, f"found {name!r}; expected the path of a file in clusters/")]
    try:
        return load_cluster(_here(name), []), []
    except BadInput as error:
        return None, [Fault(field, str(error))]


def run_command(field: str, text: str, variables: Mapping[str, str], run_dirs: str | None) -> Iterator[Fault]:
    """The one `rlhf run` of a script: it parses, its files exist and load, its run directory is absolute.

    variables, the script's own that the command uses; run_dirs, the folder below which run directories must be.
    """
    commands = COMMAND.findall(text.replace("\\\n", " "))
    if len(commands) != 1:
        yield Fault(field, f"expected one `rlhf run` command, found {len(commands)}")
        return
    words = [word for word in map(lambda word: _filled(word, variables), shlex.split(commands[0])) if word]
    parser, _ = _parser(words[1:])
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            asked = parser.parse_args(words[1:])
    except SystemExit:
        yield Fault(field, f"`{commands[0].strip()}` is refused: {told.getvalue().strip().splitlines()[-1]}")
        return
    try:
        load_run(_here(str(asked.config)), asked.overrides)
    except BadInput as error:
        yield Fault(field, f"run file: {error}")
    yield from cluster_file(field, None if asked.cluster is None else str(asked.cluster))[1]
    run_dir = str(asked.run_dir)
    if not run_dir.startswith("/"):
        yield Fault(field, f"--run-dir {run_dir}: expected an absolute path")
    if run_dirs is not None and not Path(run_dir).is_relative_to(run_dirs):
        yield Fault(field, f"--run-dir {run_dir}: expected a folder below {run_dirs}, where storage is mounted")


def _here(name: str) -> Path:
    return ROOT / name.removeprefix(IN_THE_IMAGE)


def _filled(word: str, variables: Mapping[str, str]) -> str:
    return re.sub(r"\$\{?(\w+|@)\}?", lambda match: variables.get(match[1], match[0]), word)
