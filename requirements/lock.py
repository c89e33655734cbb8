"""Writes requirements/cpu.txt or gpu.txt: every package at one version, to be installed with `pip install --no-deps`.

Asks pip to resolve NAME.in without installing anything, then adds NAME-alone.txt as it stands. Run it with the
interpreter that the lock is for (CPython 3.11 on Linux x86-64): `python requirements/lock.py cpu`. A GPU lock needs an
index with the CUDA builds, which is what PyPI has; it needs no GPU.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent


def canonical(name: str) -> str:
    """The name as package indexes compare it: lower case, runs of `-_.` as one dash."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(requirements: Path) -> dict[str, str]:
    """What pip would install for a requirements file in an empty environment: version by name, `+cpu` cut off."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, "--report", str(report), "-r", str(requirements)], check=True)
        packages = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {canonical(package["name"]): package["version"].split("+")[0] for package in packages}


def pins(requirements: Path) -> dict[str, str]:
    """The `name==version` lines of a file."""
    lines = (line.strip() for line in requirements.read_text().splitlines())
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(name): version for name, version in pairs}


def main(name: str) -> None:
    versions = resolve(FOLDER / f"{name}.in") | pins(FOLDER / f"{name}-alone.txt")
    header = f"# Written by lock.py from {name}.in and {name}-alone.txt. To be installed with: pip install --no-deps\n"
    text = header + "".join(f"{package}=={version}\n" for package, version in sorted(versions.items()))
    (FOLDER / f"{name}.txt").write_text(text)
    print(f"{FOLDER / name}.txt: {len(versions)} packages")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("cpu", "gpu"):
        sys.exit("usage: python requirements/lock.py cpu|gpu")
    main(sys.argv[1])
