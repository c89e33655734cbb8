"""`rlhf submit` against a real job server that asks for a token: logs, exit codes, going on, and what travels.

Not covered: several nodes, a head that is lost, an address behind TLS.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import yaml
from ray_nodes import end_tree

import rlhf.cli.submit as submit_command
from rlhf.cli.main import main
from rlhf.cli.submit import LARGEST_FILE_MIB, RUN_DIR_KEY, packed
from rlhf.cluster import Cluster
from rlhf.errors import BadInput

TOKEN = "0123456789abcdef" * 4
RUN = {
    "seed": 3,
    "model": {"name": "tiny"},
    "algorithm": {"name": "rloo", "samples_per_prompt": 2},
    "data": {"path": "prompts.jsonl"},
    "loop": {"num_steps": 1, "groups_per_step": 2},
    "generation": {"engine": "transformers", "max_new_tokens": 4},
    "learner": {"engine": "torch"},
    "reward": {"function": "reward.py:reward"},
}
TAG = {"trainer": 0.01}
CLUSTER = {
    "address": "auto",
    **{role: {"cpus": 0.1} for role in ("trainer", "rollout", "reference", "reward")},
    "buffer": {"cpus": 0.1, "resources": TAG},
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(20)))
    (tmp_path / "reward.py").write_text("def reward(prompts, completions):\n    return [1.0 for _ in completions]\n")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    return tmp_path


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Mapping[str, str]]]:
    with head_node(cpus=2, tags={"trainer": 1}) as found:
        yield found


@contextmanager
def head_node(cpus: int, tags: Mapping[str, float]) -> Iterator[tuple[str, Mapping[str, str]]]:
    """A head node with a job server that asks for a token, its address, and the environment of someone who has it."""
    # Ray's sockets do not fit below the long folders that pytest makes.
    port, dashboard = free_port(), free_port()
    folder = Path("/tmp") / f"ray-submit-{port}"
    binaries = Path(sys.executable).parent  # a job's entrypoint is `python` as the head finds it
    path = f"{binaries}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = f"start --head --block --port={port} --dashboard-port={dashboard} --include-dashboard=true"
    # Another Ray on this machine may have the agents' usual port, and then nobody could submit here.
    has = [f"--num-cpus={cpus}", "--resources", json.dumps(dict(tags)), f"--dashboard-agent-listen-port={free_port()}"]
    ports = f"--ray-client-server-port={free_port()} --disable-usage-stats --object-store-memory=200000000"
    head = subprocess.Popen(
        [str(binaries / "ray"), *command.split(), *ports.split(), *has, f"--temp-dir={folder}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(dashboard, head)
        yield f"http://127.0.0.1:{dashboard}", {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        # A head that is asked to end takes half a minute.
        for process in [*psutil.Process(head.pid).children(recursive=True), head] if head.poll() is None else []:
            process.kill()
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(port: int, head: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while True:
        assert head.poll() is None, "the head node ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, "no job server"
        time.sleep(0.5)


def without_address(server: tuple[str, Mapping[str, str]]) -> dict[str, str]:
    """RAY_ADDRESS would override --address, and belongs to the job's side only."""
    return {name: value for name, value in server[1].items() if name != "RAY_ADDRESS"}


def command_of(workplace: Path, server: tuple[str, Mapping[str, str]]) -> list[str]:
    command = [sys.executable, "-m", "rlhf.cli.main", "submit", "run.yaml", "--cluster", "cluster.yaml"]
    return [*command, "--run-dir", str(workplace / "out"), "--address", server[0]]


@contextmanager
def starting(workplace: Path, server: tuple[str, Mapping[str, str]]) -> Iterator["subprocess.Popen[str]"]:
    """A submission that is followed, as a process."""
    process = subprocess.Popen(
        command_of(workplace, server),
        cwd=workplace,
        env=without_address(server),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def heed_ctrl_c() -> None:
    """What a terminal starts does; what a script starts in the background, and all below it, ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(happened: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 200
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)


def submit(
    workplace: Path, server: tuple[str, Mapping[str, str]], *words: str, **environment: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*command_of(workplace, server), *words],
        cwd=workplace,
        env=without_address(server) | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_is_shipped_followed_and_gone_on_with(workplace: Path, server: tuple[str, Mapping[str, str]]) -> None:
    first = submit(workplace, server)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "step 1/1" in first.stdout and "ray job submit" in first.stdout
    assert """--entrypoint-resources '{"trainer": 0.01}'""" in first.stdout
    assert TOKEN not in first.stdout + first.stderr
    again = submit(workplace, server, "loop.num_steps=2")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "goes on from" in again.stdout and "step 2/2" in again.stdout and "step 1/2" not in again.stdout
    refused = submit(workplace, server, "learner.lr=0.5")  # another run in the same directory
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "learner.lr was" in refused.stdout


@pytest.mark.ray
@pytest.mark.soak
def test_a_head_without_work_leaves_the_driver_to_the_node_of_the_buffer(workplace: Path) -> None:
    """As in clusters/ray_up and clusters/kuberay: no CPUs on the head, everything on a node with the tag."""
    with head_node(cpus=0, tags={}) as server:
        ray = str(Path(sys.executable).with_name("ray"))
        address = server[1]["RAY_ADDRESS"]
        words = ["start", "--block", "--address", address, "--num-cpus=4", "--resources", json.dumps({"trainer": 1})]
        words += ["--dashboard-agent-listen-port", str(free_port())]
        node = subprocess.Popen(
            [ray, *words], env=dict(server[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            done, deadline = submit(workplace, server), time.monotonic() + 280
            # The dashboard answers before Ray's agents of the nodes have reported to it.
            while "No available agent" in done.stderr and time.monotonic() < deadline:
                done = submit(workplace, server)
            assert done.returncode == 0, done.stdout + done.stderr
            [job] = [job for job in asked(server, "/api/jobs/") if job["submission_id"]]
            nodes = asked(server, "/nodes?view=summary")["data"]["summary"]
            [head] = [one["raylet"]["nodeId"] for one in nodes if one["raylet"]["isHeadNode"]]
            assert len(nodes) == 2 and job["driver_node_id"] not in (None, head)
        finally:
            end_tree(node)


def asked(server: tuple[str, Mapping[str, str]], path: str) -> Any:
    """What the dashboard answers to someone who has the token."""
    request = urllib.request.Request(server[0] + path, headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.ray
@pytest.mark.soak
def test_a_failing_reward_ends_with_the_code_of_a_failed_run(
    workplace: Path, server: tuple[str, Mapping[str, str]]
) -> None:
    (workplace / "reward.py").write_text("def reward(prompts, completions):\n    raise KeyError('lost')\n")
    failed = submit(workplace, server)
    assert failed.returncode == 4, failed.stdout + failed.stderr
    assert "KeyError" in failed.stdout


@pytest.mark.ray
@pytest.mark.soak
def test_a_run_that_finds_no_room_ends_with_its_code(workplace: Path, server: tuple[str, Mapping[str, str]]) -> None:
    cluster = {**CLUSTER, "placement_timeout_s": 2, "rollout": {"cpus": 1000}}
    (workplace / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    failed = submit(workplace, server)
    assert failed.returncode == 3, failed.stdout + failed.stderr


WAITING_REWARD = """
import time
from pathlib import Path

def reward(prompts, completions):
    Path({asked!r}).touch()
    while not Path({go!r}).exists():
        time.sleep(0.05)
    return [1.0 for _ in completions]
"""


@pytest.mark.ray
@pytest.mark.soak
def test_ctrl_c_leaves_the_run_alone_and_the_line_by_hand_is_the_same_run(
    workplace: Path, server: tuple[str, Mapping[str, str]]
) -> None:
    """Left by Ctrl-C, followed again by the same command, and gone on with by the line that was printed."""
    asked, go = workplace / "asked", workplace / "go"
    (workplace / "reward.py").write_text(WAITING_REWARD.format(asked=str(asked), go=str(go)))
    with starting(workplace, server) as left:
        wait_until(asked.exists, left)
        left.send_signal(signal.SIGINT)
        said, _ = left.communicate(timeout=60)
    assert left.returncode == 130 and "goes on. The same command follows it again" in said, said
    with starting(workplace, server) as again:
        assert again.stdout is not None and "already: following it" in again.stdout.readline()
        go.touch()
        said, _ = again.communicate(timeout=280)
    assert again.returncode == 0 and "step 1/1" in said, said
    packing = submit(workplace, server, "loop.num_steps=2", "--pack", str(workplace / "packed"))
    assert packing.returncode == 0, packing.stderr
    line = shlex.split(packing.stdout.splitlines()[-1])
    by_hand = subprocess.run(
        [str(Path(sys.executable).with_name("ray")), *line[1:]],
        env=without_address(server),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert by_hand.returncode == 0, by_hand.stdout + by_hand.stderr
    assert "goes on from" in by_hand.stdout and "step 2/2" in by_hand.stdout


def test_what_would_be_shipped_can_be_looked_at_without_a_server(workplace: Path) -> None:
    """The folder and the line that submits it, which finds its run again by the same metadata."""
    words = ["submit", "run.yaml", "--cluster", "cluster.yaml", "--run-dir", "/data/my run", "--address", "http://h:1"]
    command = [sys.executable, "-m", "rlhf.cli.main", *words, "--pack", "packed"]
    packing = subprocess.run(command, cwd=workplace, capture_output=True, text=True, check=False)
    assert packing.returncode == 0, packing.stderr
    assert {path.name for path in (workplace / "packed").iterdir()} == {
        "rlhf", "actors", "files", "run.yaml", "cluster.yaml",
    }  # fmt: skip
    line = shlex.split(packing.stdout.splitlines()[-1])
    assert line[:7] == ["ray", "job", "submit", "--address", "http://h:1", "--working-dir", "packed"]
    assert line[7:9] == ["--metadata-json", json.dumps({RUN_DIR_KEY: "/data/my run"})]
    entrypoint = line[line.index("--") + 1 :]
    assert entrypoint[:4] == ["python", "-m", "rlhf.cli.main", "run"] and entrypoint[-1] == "/data/my run"
    again = subprocess.run(command, cwd=workplace, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "exists already" in again.stderr


@pytest.mark.ray
@pytest.mark.parametrize("mine", [{"RAY_AUTH_TOKEN": "f" * 64}, {"RAY_AUTH_MODE": "disabled"}], ids=["wrong", "none"])
def test_who_has_not_the_token_is_refused_with_a_remedy(
    mine: Mapping[str, str], workplace: Path, server: tuple[str, Mapping[str, str]]
) -> None:
    refused = submit(workplace, server, **mine)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "Next: put the cluster's token into RAY_AUTH_TOKEN" in refused.stderr
    assert "f" * 64 not in refused.stderr and TOKEN not in refused.stderr


def test_local_files_travel_and_nothing_else(workplace: Path) -> None:
    settings = {"data": {"path": str(workplace / "prompts.jsonl")}, "model": {"name": "smollm2"}, "seed": 1}
    settings["reward"] = {"function": f"{workplace / 'reward.py'}:reward"}
    (workplace / "junk.bin").write_bytes(b"0" * 1000)
    with packed(settings, Cluster(address="auto"), ship=True) as folder:
        shipped = yaml.safe_load((folder / "run.yaml").read_text())
        assert (folder / shipped["data"]["path"]).read_text() == (workplace / "prompts.jsonl").read_text()
        file, _, name = shipped["reward"]["function"].partition(":")
        assert (folder / file).is_file() and name == "reward" and shipped["model"]["name"] == "smollm2"
        assert not list(folder.rglob("junk.bin")) and not list(folder.rglob("__pycache__"))
        assert {path.name for path in folder.iterdir()} == {"rlhf", "actors", "files", "run.yaml", "cluster.yaml"}
    assert not folder.exists()
    with packed(settings, Cluster(address="auto"), ship=False) as folder:
        assert yaml.safe_load((folder / "run.yaml").read_text()) == settings


def test_a_file_too_large_to_travel_is_refused_by_its_key(workplace: Path) -> None:
    with (workplace / "huge.jsonl").open("wb") as file:
        file.truncate((LARGEST_FILE_MIB + 1) << 20)  # a sparse file
    settings = {"data": {"path": str(workplace / "huge.jsonl")}}
    with (
        pytest.raises(BadInput, match=r"data\.path: .*huge\.jsonl has 65 MiB, more than the 64"),
        packed(settings, Cluster(address="auto"), ship=True),
    ):
        pass


@pytest.mark.parametrize(("resources", "asked"), [(TAG, TAG), ({}, None)])
def test_the_driver_goes_to_the_buffer(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, resources: Mapping[str, float], asked: object
) -> None:
    """The job asks for the buffer's custom resources; a buffer without any leaves the driver on the head.

    Not covered: that Ray then starts it there; the runs above have a head with that resource.
    """
    (workplace / "cluster.yaml").write_text(yaml.safe_dump({**CLUSTER, "buffer": {"resources": dict(resources)}}))
    monkeypatch.setattr(submit_command, "_client", lambda address: Submissions())
    monkeypatch.setattr(Submissions, "seen", [])
    monkeypatch.chdir(workplace)
    words = ["submit", "run.yaml", "--cluster", "cluster.yaml", "--run-dir", "/tmp/out", "--detach"]
    assert main(words) == 0
    assert [job["entrypoint_resources"] for job in Submissions.seen] == [asked]


class Submissions:
    """A job server that takes everything and runs nothing."""

    seen: ClassVar[list[dict[str, object]]] = []

    def list_jobs(self) -> list[object]:
        return []

    def submit_job(self, **job: object) -> str:
        self.seen.append(job)
        return "raysubmit_1"


@pytest.mark.parametrize(
    ("cluster", "run_dir", "said"),
    [({"address": "local"}, "/tmp/out", "address=local"), (CLUSTER, "out", "is relative")],
)
def test_what_cannot_be_submitted_is_refused_without_a_server(
    workplace: Path, cluster: Mapping[str, object], run_dir: str, said: str
) -> None:
    (workplace / "cluster.yaml").write_text(yaml.safe_dump(dict(cluster)))
    words = ["submit", "run.yaml", "--cluster", "cluster.yaml", "--run-dir", run_dir, "--address", "http://127.0.0.1:9"]
    refused = subprocess.run(
        [sys.executable, "-m", "rlhf.cli.main", *words], cwd=workplace, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2 and said in refused.stderr, refused.stderr
