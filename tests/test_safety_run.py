"""One real run on Ray, looked at from inside while it works: who listens where, and whether a secret that it was given
stands anywhere but in environments.

Two trainer ranks, so that they meet over a network. Not covered: vLLM (its engine opens sockets of its own), NCCL,
a Ray that is joined, memory and swap, the environments of the run's own processes.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[1]
# Where a secret can be given to a run, each with one of its own. Ray's token has to be hexadecimal.
SECRETS = {
    "SCORE_TOKEN": "c4nary-of-the-reward-server",
    "HF_TOKEN": "hf_c4naryofthehub",
    "AWS_SECRET_ACCESS_KEY": "c4nary/of/the/storage",
    "RAY_AUTH_TOKEN": "ca7a41" * 10 + "beef",
}
RUN = {
    "seed": 3,
    "model": {"name": "tiny"},
    "algorithm": {"name": "rloo", "samples_per_prompt": 2, "kl": {"coef": 0.02}},
    "data": {"path": "prompts.jsonl", "heldout": 1},
    "loop": {"num_steps": 2, "groups_per_step": 4, "checkpoint_every": 1},
    "generation": {"engine": "transformers", "max_new_tokens": 4},
    "learner": {"engine": "deepspeed"},
    "reward": {"token_env": "SCORE_TOKEN", "retries": 1, "backoff_s": 0.01, "max_dropped_fraction": 1.0},
}
CLUSTER = {"trainer": {"replicas": 2, "cpus": 1}, "threads_per_role": 1}


def listening(process: psutil.Process) -> Iterator[tuple[str, str]]:
    """The addresses at which a process listens, or can receive without a connection, with its name."""
    try:
        name = " ".join(process.cmdline()) or process.name()
        for found in process.net_connections(kind="inet"):
            if found.status == psutil.CONN_LISTEN or (found.type.name == "SOCK_DGRAM" and not found.raddr):
                yield found.laddr.ip, name
    except psutil.NoSuchProcess:
        return


def is_loopback(address: str) -> bool:
    place = ip_address(address)
    return (place.ipv4_mapped or place).is_loopback if place.version == 6 else place.is_loopback


class Server(ThreadingHTTPServer):
    """A reward server that asks for a token, and looks at the run that asks it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.run: subprocess.Popen[str] | None = None
        self.run_dir = Path()
        self.sockets: set[tuple[str, str]] = set()
        self.command_lines: set[str] = set()
        self.status: set[str] = set()
        self.refused = self.failed = 0
        self.looking = threading.Lock()

    def look(self) -> None:
        assert self.run is not None
        with self.looking:
            if not self.sockets:
                processes = [psutil.Process(self.run.pid), *psutil.Process(self.run.pid).children(recursive=True)]
                self.sockets = {place for process in processes for place in listening(process)}
            for process in psutil.process_iter(["cmdline"]):  # the whole machine's process list
                self.command_lines.add(" ".join(process.info["cmdline"] or []))
            if (self.run_dir / "status.json").exists():
                self.status.add((self.run_dir / "status.json").read_text())


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.look()
        code, answer = 200, json.dumps({"rewards": [float(len(text)) for text in body["completions"]]})
        if self.headers["Authorization"] != f"Bearer {SECRETS['SCORE_TOKEN']}":
            self.server.refused += 1
            code, answer = 401, "who are you?"
        elif body["columns"]["bad"][0]:
            self.server.failed += 1
            code, answer = 500, f"cannot score for {self.headers['Authorization']}"  # an echo, as some servers do
        self.send_response(code)
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path, str]]:
    """The server after the run, the folder of the run, and what it printed."""
    folder = tmp_path_factory.mktemp("safety")
    rows = [json.dumps({"prompt": f"Say {n}.", "bad": n == 3}) for n in range(8)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    (folder / "cluster.yaml").write_text(yaml.safe_dump({**CLUSTER, "storage": {"address": str(folder / "stored")}}))
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.run_dir = folder / "run"
    address = f"http://127.0.0.1:{server.server_address[1]}/score"
    (folder / "run.yaml").write_text(yaml.safe_dump({**RUN, "reward": {**RUN["reward"], "server": address}}))
    words = ["run", "run.yaml", "--cluster", "cluster.yaml", "--run-dir", "run"]
    server.run = subprocess.Popen(
        [sys.executable, "-m", "rlhf.cli.main", *words],
        cwd=folder,
        env={**os.environ, **SECRETS, "RAY_AUTH_MODE": "token"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed, _ = server.run.communicate(timeout=800)
        assert server.run.returncode == 0, printed
        yield server, folder, printed
    finally:
        server.run.kill()
        server.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_nothing_listens_beyond_loopback(looked_at: tuple[Server, Path, str]) -> None:
    server, _, _ = looked_at
    names = {name for _, name in server.sockets}
    for part in ("gcs_server", "raylet", "ray::PolicyRank", "ray::Rollout", "DashboardAgent", "rlhf.cli.main"):
        assert any(part in name for name in names), f"{part} was not seen, so it was not checked"
    assert not {place for place in server.sockets if not is_loopback(place[0])}


@pytest.mark.ray
@pytest.mark.slow
def test_no_secret_leaves_the_environments(looked_at: tuple[Server, Path, str]) -> None:
    """Not in the run directory, its stored copy, Ray's session, what was printed, or any process's command line; and
    the secrets were used: the server let nobody else in, and sent the token back in its errors."""
    server, folder, printed = looked_at
    assert server.refused == 0 and server.failed >= 2
    gcs = next(name for _, name in server.sockets if "gcs_server" in name)
    (session,) = {Path(word.partition("=")[2]).parent for word in gcs.split() if word.startswith("--log_dir=")}
    assert list(session.rglob("gcs_server.out"))
    assert any("was set aside" in path.read_text() for path in folder.rglob("report.html"))
    files = [path for root in (folder, session) for path in root.rglob("*") if path.is_file()]
    assert {"experience.db", "config.yaml", "cluster.yaml", "metrics.jsonl", "report.html", "data.json"} <= {
        path.name for path in files
    }
    for name, secret in SECRETS.items():
        found = [str(path) for path in files if secret.encode() in path.read_bytes()]
        assert not found, f"{name} is in {found}"
        assert secret not in printed and not [line for line in server.command_lines | server.status if secret in line]


def test_a_socket_at_all_addresses_would_be_seen() -> None:
    """A control for the first test, on a process that opens one of each kind."""
    code = (
        "import socket, sys\n"
        "open_ = [socket.create_server(('', 0)), socket.create_server(('127.0.0.1', 0))]\n"
        "open_.append(socket.create_server(('::', 0), family=socket.AF_INET6, dualstack_ipv6=True))\n"
        "print('open', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        found = [address for address, _ in listening(psutil.Process(process.pid))]
        process.communicate()
    assert sorted(is_loopback(address) for address in found) == [False, False, True]
    assert is_loopback("::1") and is_loopback("::ffff:127.0.0.1") and not is_loopback("::ffff:10.0.0.1")
