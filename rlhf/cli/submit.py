"""`rlhf submit`: ships a run to a cluster's job server, follows it, and ends with its exit code.

What travels is a folder with the run file, the cluster file, the local files that the run file names, and this very
version of `rlhf` and `actors`; the libraries must be installed on the cluster. The run itself stays in its run
directory there, so that submitting it again goes on with it. The driver asks for the custom resources of the buffer, as
driver and buffer share a file that two nodes cannot share; without any it is on the head.
"""

import argparse
import asyncio
import json
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf.cli.exit_codes import DONE, FAILED, INTERRUPTED
from rlhf.cluster import Cluster
from rlhf.config_file import dump, load_cluster, load_run
from rlhf.credentials import refuse_credentials
from rlhf.errors import BadInput, RunFailed
from rlhf.yaml_reader import parse, write

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

Answer = TypeVar("Answer")

RUN_DIR_KEY = "rlhf_run_dir"
PACKAGES = Path(__file__).resolve().parents[2]
MIB = 1 << 20
# Ray keeps what travels in the head's memory; data sets and models belong on storage that the nodes share.
LARGEST_FILE_MIB = 64
NO_AGENT = "No available agent"  # what a job server says before any node has reported to it
AGENT_TIMEOUT_S = 60.0
RETRY_S = 1.0
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
TOKEN_REMEDY = (
    "Next: put the cluster's token into RAY_AUTH_TOKEN, or its file into RAY_AUTH_TOKEN_PATH, and set "
    "RAY_AUTH_MODE=token; `ray get-auth-token` on the head prints it"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="run file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the file's")
    parser.add_argument("--cluster", type=Path, required=True, metavar="FILE", help="cluster file (YAML)")
    parser.add_argument(
        "--run-dir", required=True, metavar="DIR", help="run directory on the cluster, an absolute path"
    )
    parser.add_argument(
        "--address", default="http://127.0.0.1:8265", metavar="URL", help="job server (default: %(default)s)"
    )
    parser.add_argument(
        "--ship-nothing", action="store_true", help="paths in the run file are those of the cluster; no data is copied"
    )
    parser.add_argument("--detach", action="store_true", help="do not follow the run")
    parser.add_argument(
        "--pack", type=Path, metavar="DIR", help="write what would be shipped into a new folder, and submit nothing"
    )


def run(arguments: argparse.Namespace) -> int:
    refuse_credentials(arguments.address, "--address")
    config = load_run(arguments.config, arguments.overrides)
    cluster = load_cluster(arguments.cluster, [])
    _check(arguments.run_dir, cluster)
    settings = parse(dump(config), "config")
    if arguments.pack is not None:
        _pack(settings, cluster, arguments)
        return DONE
    client = _client(arguments.address)
    job = _running(client, arguments.run_dir)
    if job is None:
        with packed(settings, cluster, ship=not arguments.ship_nothing) as folder:
            job = _once_it_can(
                lambda: client.submit_job(
                    entrypoint=_entrypoint(arguments.run_dir),
                    runtime_env={"working_dir": str(folder)},
                    metadata={RUN_DIR_KEY: arguments.run_dir},
                    entrypoint_resources=dict(cluster.buffer.resources) or None,
                )
            )
        print(
            f"{job}: {arguments.config.name} in {arguments.run_dir}. By hand, with a folder that --pack FOLDER writes:"
        )
        print(f"  {_by_hand(arguments, cluster, 'FOLDER')}", flush=True)
    else:
        print(f"{job} is at {arguments.run_dir} already: following it", flush=True)
    if arguments.detach:
        return DONE
    return _follow(client, job, arguments.address)


def _pack(settings: dict[str, Any], cluster: Cluster, arguments: argparse.Namespace) -> None:
    to: Path = arguments.pack
    if to.exists():
        raise BadInput(f"--pack {to}: exists already; expected a new folder")
    with packed(settings, cluster, ship=not arguments.ship_nothing) as folder:
        shutil.copytree(folder, to)
    print(f"{to} holds what a job needs. To submit it:\n  {_by_hand(arguments, cluster, str(to))}")


def _entrypoint(run_dir: str) -> str:
    words = ["python", "-m", "rlhf.cli.main", "run", "run.yaml", "--cluster", "cluster.yaml", "--run-dir", run_dir]
    return shlex.join(words)


def _by_hand(arguments: argparse.Namespace, cluster: Cluster, folder: str) -> str:
    """The same submission without `rlhf`; its metadata is how a second one finds the first."""
    metadata = json.dumps({RUN_DIR_KEY: arguments.run_dir})
    words = ["ray", "job", "submit", "--address", arguments.address, "--working-dir", folder]
    words += ["--metadata-json", metadata]
    if beside := dict(cluster.buffer.resources):
        words += ["--entrypoint-resources", json.dumps(beside)]
    return f"{shlex.join(words)} -- {_entrypoint(arguments.run_dir)}"


def _check(run_dir: str, cluster: Cluster) -> None:
    if not run_dir.startswith("/"):
        raise BadInput(
            f"--run-dir {run_dir}: is relative, and a job's own folder goes away with it; expected an absolute path on "
            "the cluster's head, or on storage that the nodes share"
        )
    if cluster.address != "auto":
        raise BadInput(
            f"cluster file: address={cluster.address}, but a submitted run joins the cluster that it is submitted to; "
            "expected auto"
        )


@contextmanager
def packed(settings: dict[str, Any], cluster: Cluster, *, ship: bool) -> Iterator[Path]:
    """A folder with everything that the job needs, for as long as the block lasts.

    Local files and folders that the run file names are copied into it, and the run file names the copies. Raises
    BadInput, naming the key, for one that is too large to travel.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-submit-") as name:
        folder = Path(name)
        for package in ("rlhf", "actors"):
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(PACKAGES / package, folder / package, ignore=ignored)
        if ship:
            settings = _shipped(settings, "", folder)
        (folder / "run.yaml").write_text(write(settings))
        (folder / "cluster.yaml").write_text(dump(cluster))
        yield folder


def _shipped(value: Any, key: str, folder: Path) -> Any:
    """The settings with each local path copied below `folder` and replaced by its relative name there."""
    if isinstance(value, dict):
        return {name: _shipped(part, f"{key}.{name}" if key else name, folder) for name, part in value.items()}
    if not isinstance(value, str) or not value.startswith("/"):
        return value
    path, colon, function = value.partition(":")
    source = Path(path)
    if not source.exists():
        return value
    size = sum(file.stat().st_size for file in ([source] if source.is_file() else source.rglob("*")) if file.is_file())
    if size > LARGEST_FILE_MIB * MIB:
        raise BadInput(
            f"{key}: {source} has {size / MIB:.0f} MiB, more than the {LARGEST_FILE_MIB} that travel with a job. Next: "
            "put it on storage that the nodes share and use --ship-nothing"
        )
    copy = Path("files") / key / source.name
    (folder / copy).parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, folder / copy)
    else:
        shutil.copy2(source, folder / copy)
    return f"{copy}{colon}{function}"


def _client(address: str) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    try:
        return _ask(lambda: JobSubmissionClient(address))
    except (ConnectionError, ValueError) as error:
        raise BadInput(f"--address {address}: no job server answers there: {error}") from error


def _ask(call: Callable[[], Answer]) -> Answer:
    """The job server's answer. Raises BadInput, with a remedy, when it refuses the token."""
    from ray.exceptions import AuthenticationError

    try:
        return call()
    except AuthenticationError as error:
        raise BadInput(f"the job server refuses the token: {str(error).splitlines()[0]}. {TOKEN_REMEDY}") from error
    except RuntimeError as error:
        raise RunFailed(f"the job server: {error}") from error


def _once_it_can(submit: Callable[[], str]) -> str:
    """The job's name. A cluster that has just come up has a job server before it has anybody to start a job."""
    deadline = time.monotonic() + AGENT_TIMEOUT_S
    while True:
        try:
            return _ask(submit)
        except RunFailed as error:
            if NO_AGENT not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(RETRY_S)


def _running(client: "JobSubmissionClient", run_dir: str) -> str | None:
    """The job that has this run directory and has not ended."""
    for job in _ask(client.list_jobs):
        if (job.metadata or {}).get(RUN_DIR_KEY) == run_dir and job.status.value not in ENDED and job.submission_id:
            return job.submission_id
    return None


def _follow(client: "JobSubmissionClient", job: str, address: str) -> int:
    """Prints the run's lines until it ends; returns its exit code. Ctrl-C leaves it alone."""
    try:
        asyncio.run(_print_lines(client, job))
        return _exit_code(_ask(lambda: client.get_job_info(job)))
    except KeyboardInterrupt:
        print(f"\n{job} goes on. The same command follows it again; `ray job stop --address {address} {job}` ends it")
        return INTERRUPTED


async def _print_lines(client: "JobSubmissionClient", job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def _exit_code(job: "JobDetails") -> int:
    if job.driver_exit_code is not None:
        return job.driver_exit_code
    if job.status.value == "STOPPED":
        return INTERRUPTED
    print(f"the job ended as {job.status.value}: {json.dumps(job.message)}")
    return DONE if job.status.value == "SUCCEEDED" else FAILED
