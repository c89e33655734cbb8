"""`rlhf doctor`: is this installation whole, and can this machine hold a run? A remedy for each fault."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import rlhf
from rlhf.cli.exit_codes import DONE, FAILED
from rlhf.cli.ownership import check_actors_is_ours
from rlhf.errors import BadInput

GIB = 2**30
NEEDED_MEMORY_GIB, NEEDED_DISK_GIB, NEEDED_SHM_GIB = 8, 10, 2
IMPORT_LIMIT_S = 120
PROBES = {
    "torch": "make install",
    "transformers": "make install",
    "ray": "make install",
    "vllm": "make install; a CUDA torchvision beside a CPU torch breaks this import: pip uninstall torchvision",
    "deepspeed": "make install",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; `remedy` is empty where all is well."""

    name: str
    found: str
    remedy: str

    @property
    def ok(self) -> bool:
        return not self.remedy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object: ok, findings")


def run(arguments: argparse.Namespace) -> int:
    findings = []
    for finding in examine(Path.cwd()):
        findings.append(finding)
        if not arguments.json:
            print(f"{'ok   ' if finding.ok else 'FAULT'}  {finding.name}: {finding.found}", flush=True)
            if not finding.ok:
                print(f"       remedy: {finding.remedy}", flush=True)
    ok = all(finding.ok for finding in findings)
    if arguments.json:
        print(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}))
    return DONE if ok else FAILED


def examine(folder: Path) -> Iterator[Finding]:
    """All checks, one after the other; `folder` is where run directories would be written."""
    yield _python()
    yield _packages()
    yield _actors()
    for package, remedy in PROBES.items():
        yield _import(package, remedy)
    yield _compiler()
    yield _cores()
    yield _memory()
    yield _disk(folder)
    yield _shared_memory()
    yield _gpu()


def lock_path(root: Path, *, gpu: bool) -> Path:
    return root / "requirements" / ("gpu.txt" if gpu else "cpu.txt")


def differing_from_lock(lock: str) -> list[str]:
    """`package installed-version (lock: version)` for each line of a lock that this environment does not match."""
    differing = []
    for line in lock.splitlines():
        match = re.match(r"^([A-Za-z0-9_.\-]+)==([^\s;]+)", line)
        if match is None:
            continue
        name, wanted = match.groups()
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            differing.append(f"{name} missing (lock: {wanted})")
            continue
        if found.split("+")[0] != wanted.split("+")[0]:
            differing.append(f"{name} {found} (lock: {wanted})")
    return differing


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", found, "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer")


def _packages() -> Finding:
    lock = lock_path(Path(rlhf.__file__).parent.parent, gpu=_gpu_names() != "")
    if not lock.is_file():
        return Finding("packages", "no lock beside the package; not compared", "")
    differing = differing_from_lock(lock.read_text())
    if not differing:
        return Finding("packages", f"as in {lock.name}", "")
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    return Finding("packages", ", ".join(differing[:5]) + more, "make install")


def _actors() -> Finding:
    try:
        check_actors_is_ours()
    except BadInput as error:
        return Finding("package actors", str(error), "start from another folder, or repair PYTHONPATH as it says")
    return Finding("package actors", "ours", "")


def _import(package: str, remedy: str) -> Finding:
    """In a process of its own: an import can crash, hang, or change this process."""
    if importlib.util.find_spec(package) is None:
        return Finding(package, "not installed", remedy)
    command = [sys.executable, "-c", f"import {package}; print({package}.__version__)"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return Finding(
            package, f"import not done after {IMPORT_LIMIT_S} s", "look for a full disk or a dead network mount"
        )
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        return Finding(package, f"import fails: {last}", remedy)
    return Finding(package, result.stdout.strip().splitlines()[-1], "")


def _compiler() -> Finding:
    missing = [tool for tool in ("g++", "ninja") if _tool(tool) is None]
    found = f"{', '.join(missing)} not found" if missing else "g++, ninja"
    remedy = "apt-get install g++ (ninja comes with make install): DeepSpeed compiles its CPU communication once"
    return Finding("compiler", found, remedy if missing else "")


def _tool(name: str) -> str | None:
    """On the path, or beside the interpreter, where pip puts ninja."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _cores() -> Finding:
    count = len(os.sched_getaffinity(0))
    return Finding("cores", str(count), "" if count >= 2 else "one core works, slowly: use --in-process")


def _memory() -> Finding:
    """Free memory, with the limit of the control group where there is one."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return _amount("free memory", free, NEEDED_MEMORY_GIB, "close other programs, or use a smaller model and cache_gib")


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    return _amount(f"free disk at {folder}", free, NEEDED_DISK_GIB, "free some, or put --run-dir elsewhere")


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("/dev/shm", "not there", "mount a tmpfs at /dev/shm: Ray keeps objects in it")
    free = shutil.disk_usage(path).free
    return _amount(
        "/dev/shm", free, NEEDED_SHM_GIB, "docker run --shm-size=4g, or a lower object_store_gib in the cluster file"
    )


def _amount(name: str, size: int, needed_gib: int, remedy: str) -> Finding:
    found = f"{size / GIB:.1f} GiB"
    if size >= needed_gib * GIB:
        return Finding(name, found, "")
    return Finding(name, f"{found}, less than {needed_gib} GiB", remedy)


def _gpu_names() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    result = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=False)
    return "; ".join(line for line in result.stdout.splitlines() if line.startswith("GPU"))


def _gpu() -> Finding:
    """No GPU is no fault. A GPU beside a torch that was built without CUDA is one."""
    names = _gpu_names()
    if not names:
        return Finding("GPU", "none: runs on the CPU", "")
    version = importlib.metadata.version("torch") if importlib.util.find_spec("torch") else ""
    return Finding("GPU", names, "torch is a CPU build: make install takes the GPU lock" if "+cpu" in version else "")
