"""Hosts on one machine: network namespaces with addresses of their own, joined by a bridge in another one.

Each has its own folder below the path where Ray keeps its sessions, so that no host reads another's files there. The
network of this machine is not touched. Needs root, and a kernel that allows it: `refused` says why not.
"""

import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ray_nodes import ENVIRONMENT, end_tree

PORT = 6379
# A node whose network is gone is told apart from a slow one after some seconds; then a supervisor starts Ray again.
SUPERVISED = 'mount --bind "$1" "$2" && shift 2 && while true; do "$@"; sleep 2; done'


def sh(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


def refused() -> str | None:
    """Why there can be no hosts here; None where there can."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "no iproute2 or util-linux"
    name = f"rlhf-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=60, check=False)
    if tried.returncode != 0:
        return f"no network namespaces: {tried.stderr.strip()}"
    script = "ip link add try-a type veth peer name try-b && mount --bind /tmp /tmp"
    command = ["ip", "netns", "exec", name, "unshare", "--mount", "sh", "-c", script]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    sh("ip", "netns", "delete", name)
    return None if tried.returncode == 0 else f"no links or mounts in a namespace: {tried.stderr.strip()}"


class Hosts:
    """Hosts 0, 1, … at 10.77.0.1, 10.77.0.2, …; `start_ray` on 0 starts the head."""

    def __init__(self, count: int, folder: Path) -> None:
        """folder, a short path for Ray's sessions; it is removed in the end."""
        self._folder, self._count = folder, count
        self._supervisors: list[subprocess.Popen[bytes]] = []
        self._sessions = folder / "ray"
        self._sessions.mkdir()
        self._switch = f"rlhf-{os.getpid()}-sw"
        sh("ip", "netns", "add", self._switch)
        sh("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        sh("ip", "-n", self._switch, "link", "set", "br0", "up")
        for host in range(count):
            name, port = self._name(host), f"port{host}"
            sh("ip", "netns", "add", name)
            ends = ["type", "veth", "peer", "name", "eth0", "netns", name]
            sh("ip", "-n", self._switch, "link", "add", port, *ends)
            sh("ip", "-n", self._switch, "link", "set", port, "master", "br0")
            sh("ip", "-n", self._switch, "link", "set", port, "up")
            sh("ip", "-n", name, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                sh("ip", "-n", name, "link", "set", link, "up")
            # It leads nowhere: Ray asks the system from which address it would call out.
            sh("ip", "-n", name, "route", "add", "default", "dev", "eth0")

    def _name(self, host: int) -> str:
        return f"rlhf-{os.getpid()}-{host}"

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    @property
    def head(self) -> str:
        return f"{self.address(0)}:{PORT}"

    def inside(self, host: int) -> list[str]:
        """Words before a command that runs on a host and sees its files."""
        script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
        words = ["ip", "netns", "exec", self._name(host), "unshare", "--mount", "sh", "-c", script, "sh"]
        return [*words, *self._mounted(host)]

    def _mounted(self, host: int) -> list[str]:
        own = self._folder / f"host{host}"
        own.mkdir(exist_ok=True)
        return [str(own), str(self._sessions)]

    def start_ray(self, host: int, cpus: float, resources: str) -> None:
        """A node of Ray, started again whenever it ends, as a supervisor does."""
        role = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self._sessions}"]
        role = role if host == 0 else [f"--address={self.head}"]
        words = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *role]
        words += [f"--node-ip-address={self.address(host)}", f"--num-cpus={cpus}", f"--resources={resources}"]
        words += ["--object-store-memory=80000000"]
        command = ["ip", "netns", "exec", self._name(host), "unshare", "--mount", "sh", "-c", SUPERVISED, "sh"]
        with (self._folder / f"host{host}.log").open("ab") as log:
            self._supervisors.append(
                subprocess.Popen(
                    [*command, *self._mounted(host), *words],
                    env=ENVIRONMENT,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def wait_for_head(self) -> None:
        deadline = time.monotonic() + 120
        test = f"import socket; socket.create_connection(('{self.address(0)}', {PORT}), 5)"
        while subprocess.run(
            [*self.inside(0), sys.executable, "-c", test], stderr=-3, timeout=60, check=False
        ).returncode:
            assert time.monotonic() < deadline, "the head does not stand"
            time.sleep(1)

    def of(self, title: str) -> list[int]:
        """The hosts, cut off or not, on which there is a process with this title."""
        found = []
        for host in range(self._count):
            pids = sh("ip", "netns", "pids", self._name(host)).split()
            if any(title_of(int(pid)).startswith(title) for pid in pids):
                found.append(host)
        return found

    def cut_off(self, host: int) -> None:
        sh("ip", "-n", self._switch, "link", "set", f"port{host}", "down")

    def join_again(self, host: int) -> None:
        sh("ip", "-n", self._switch, "link", "set", f"port{host}", "up")

    def end(self) -> None:
        for process in self._supervisors:
            end_tree(process)
        names = [self._name(host) for host in range(self._count)]
        for name in [*names, self._switch]:
            sh("ip", "netns", "delete", name)
        shutil.rmtree(self._folder, ignore_errors=True)


def title_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def longest_pause(moments: Sequence[float], since: float) -> float:
    """The longest time without a step after a moment, seconds."""
    later = [since, *(moment for moment in moments if moment > since)]
    return max((after - before for before, after in itertools.pairwise(later)), default=0.0)
