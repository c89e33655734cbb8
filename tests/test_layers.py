"""The import contracts of pyproject.toml hold, and each of them can fail.

Not covered: imports by name at run time (importlib), which the linter does not see; `sys.modules` is checked for those.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]

# One import a line that a contract forbids: contract, file, import, and what the linter's message must name.
BREACHES = [
    ("ops", "rlhf/ops/kl.py", "import numpy", "numpy"),
    ("ops", "rlhf/ops/__init__.py", "from rlhf.seeding import seed_for", "rlhf.seeding"),
    ("ops", "rlhf/ops/kl.py", "def f():\n    import json", "json"),
    ("algorithms", "rlhf/algorithms/__init__.py", "import rlhf.interfaces", "rlhf.interfaces"),
    ("algorithms", "rlhf/algorithms/__init__.py", "import transformers", "transformers"),
    ("control", "rlhf/loop.py", "import ray", "ray"),
    ("control", "rlhf/config.py", "import torch.nn", "torch"),
    ("control", "rlhf/experience.py", "import rlhf.ops.kl", "torch"),
    ("control", "rlhf/interfaces.py", "import rlhf.weights", "torch"),
    ("control", "rlhf/planning/plan.py", "import rlhf.blueprint", "torch"),
    ("library", "rlhf/weights.py", "import ray", "ray"),
    ("library", "rlhf/weights.py", "import actors", "actors"),
    ("library", "rlhf/cli/ownership.py", "import actors", "actors"),
    ("library", "rlhf/loop.py", "import rlhf.cli.ownership", "rlhf.cli"),
    ("roles", "actors/rollout.py", "import actors.judge", "actors.judge"),
]

# Loaded in a new interpreter, these must leave the heavy packages alone.
LIGHT = [
    "rlhf.cluster",
    "rlhf.config",
    "rlhf.experience",
    "rlhf.interfaces",
    "rlhf.loop",
    "rlhf.metrics",
    "rlhf.planning.plan",
    "rlhf.cli.main",
]
HEAVY = {"torch", "vllm", "ray", "transformers", "deepspeed"}


def lint(folder: Path, contract: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--contract", contract]
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The two packages and the contracts, to be broken."""
    for package in ("rlhf", "actors"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("contract", [contract["id"] for contract in CONTRACTS])
def test_contract_holds(contract: str) -> None:
    """As they stand, the packages keep each contract."""
    result = lint(ROOT, contract)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 kept, 0 broken" in result.stdout


@pytest.mark.parametrize(("contract", "file", "line", "named"), BREACHES)
def test_contract_fails_on_a_forbidden_import(copy: Path, contract: str, file: str, line: str, named: str) -> None:
    """A control for the test above: one bad import, also inside a function or through another module, breaks it."""
    broken = copy / file
    broken.write_text(broken.read_text() + f"\n{line}\n")
    result = lint(copy, contract)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "0 kept, 1 broken" in result.stdout
    assert named in result.stdout


def test_every_contract_has_a_breach() -> None:
    """A new contract needs a line in BREACHES."""
    assert {contract["id"] for contract in CONTRACTS} == {breach[0] for breach in BREACHES}


def test_every_role_file_is_in_the_contract_of_the_roles() -> None:
    """A new role file in actors/ is held to the contract, too; what is shared by the roles is listed here."""
    shared = {
        f"actors.{name}"
        for name in (
            "capacity",
            "heartbeat",
            "joining",
            "keeper",
            "learner",
            "losses",
            "notices",
            "placement",
            "pool",
            "ranks",
            "shortage",
            "team",
            "turn_taking",
            "waiting",
            "worker",
        )
    }
    files = {f"actors.{file.stem}" for file in (ROOT / "actors").glob("*.py") if file.stem != "__init__"}
    roles = next(set(contract["modules"]) for contract in CONTRACTS if contract["id"] == "roles")
    assert files - shared == roles


@pytest.mark.parametrize("module", LIGHT)
def test_import_loads_nothing_heavy(module: str) -> None:
    """A bad run file is refused before torch, vLLM or Ray is loaded. Not covered: how long the import takes."""
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
