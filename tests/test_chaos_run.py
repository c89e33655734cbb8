"""`rlhf run --chaos`: each kind of fault on whole runs in one process, and what the run directory says afterwards.

A disturbed run, given the same command again where it ended, must end with the parameters and the ledger of an
undisturbed one. Real processes, real signals, a real file system that is full. Roles of their own (Ray) are struck in
tests/test_soak_kills.py. Not covered: a clock that jumps under Ray's own processes; no process here may set the
machine's clock, so time.time is replaced in the run's process.
"""

import ast
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
Forked = Callable[..., tuple[int, str]]
RUN = {
    "seed": 3,
    "model": {"name": "tiny"},
    "algorithm": {"name": "rloo", "samples_per_prompt": 2, "kl": {"coef": 0.0}},
    "data": {"path": "prompts.jsonl"},
    "loop": {"num_steps": 6, "groups_per_step": 2, "checkpoint_every": 2, "wait_timeout_s": 3},
    "generation": {"engine": "transformers", "max_new_tokens": 4, "temperature": 0.9},
    "learner": {"engine": "torch", "lr": 1e-3},
    "reward": {"function": "reward.py:reward", "isolate": False},
}
REWARD = "def reward(prompts, completions, **columns):\n    return [float(text.count('e')) for text in completions]\n"
SIGKILLED = -9


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chaos")
    fill(folder)
    return folder


def fill(folder: Path) -> None:
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"Number {n}."}) for n in range(20)))
    (folder / "reward.py").write_text(REWARD)
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))


@pytest.fixture(scope="module")
def undisturbed(workplace: Path, forked: Forked) -> list[str]:
    code, printed = forked(workplace, "run", "run.yaml", "--in-process", "--run-dir", "straight")
    assert code == 0, printed
    return fingerprints(workplace / "straight", forked)


def fingerprints(run_dir: Path, forked: Forked) -> list[str]:
    """Of the weights after each step, from a ledger in which nothing is lost, duplicated or broken."""
    code, printed = forked(run_dir.parent, "verify", str(run_dir), "--json")
    report = json.loads(printed.splitlines()[-1])
    assert code == 0 and report["ok"], printed
    assert report["ledger"]["trained"] == report["ledger"]["issued"] == 12
    rows = json.loads(history(run_dir))
    assert [step for step, _, _ in rows] == list(range(6))
    return [fingerprint for _, fingerprint, _ in rows]


def history(run_dir: Path) -> str:
    from rlhf.buffer.audit import ExperienceView

    view = ExperienceView(run_dir / "experience.db")
    return json.dumps([(step.step, step.fingerprint, step.prompt_ids) for step in view.history()])


class Disturbed:
    """A run with a chaos file, started once or again."""

    def __init__(self, folder: Path, name: str, forked: Forked, *faults: dict[str, Any], **others: Any) -> None:
        self.run_dir, self._folder, self._forked = folder / name, folder, forked
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"faults": list(faults), **others}))
        self.command = ("run", "run.yaml", "--in-process", "--run-dir", name, "--chaos", f"{name}.yaml")

    def start(self) -> tuple[int, str]:
        return self._forked(self._folder, *self.command)

    def until_done(self) -> int:
        """Starts it as long as it is killed; returns how often."""
        starts = 1
        while (ended := self.start())[0] == SIGKILLED:
            starts += 1
        assert ended[0] == 0, ended[1]
        return starts

    def rows(self, event: str) -> list[dict[str, Any]]:
        lines = (self.run_dir / "chaos.jsonl").read_text().splitlines()
        return [row for line in lines if (row := json.loads(line))["event"] == event]

    def seconds_between(self, first: str, second: str) -> float:
        """From the first time that a traced moment was reached to the next time of another."""
        lines = (self.run_dir / "chaos-trace.jsonl").read_text().splitlines()
        seen = [(row["point"], row["monotonic"]) for row in map(json.loads, lines)]
        start = next(at for point, at in seen if point == first)
        return next(at for point, at in seen if point == second and at >= start) - start


@pytest.mark.slow
def test_kills_at_random_times_go_on_where_the_last_one_struck(
    workplace: Path, forked: Forked, undisturbed: list[str]
) -> None:
    """Three kills, whoever starts the run again: the fourth start is left alone. Steps are slowed, because a quick
    machine is done with six of them before the first kill is due."""
    kill = {"kind": "kill", "roles": ["driver"], "when": {"every_s": 0.2, "count": 3}}
    slow = [
        {"kind": "delay", "for_s": 0.5, "when": {"point": "update: begun", "nth": number}} for number in range(2, 7)
    ]
    run = Disturbed(workplace, "random", forked, kill, *slow, seed=1)
    starts = run.until_done()
    faults = [fault for fault in run.rows("fault") if fault["kind"] == "kill"]
    assert 2 <= starts == len(faults) + 1 <= 4
    assert [fault["occurrence"] for fault in faults] == list(range(len(faults)))
    assert all(later["run_s"] > earlier["run_s"] for earlier, later in pairwise(faults))
    # A fault is over with the end of the first step that began after it: in the last two steps there is none.
    there_is_one = faults[-1]["steps"] + 2 <= RUN["loop"]["num_steps"]
    assert len(run.rows("recovered")) == len(faults) or not there_is_one
    assert fingerprints(run.run_dir, forked) == undisturbed


@pytest.mark.slow
def test_a_stopped_and_a_slowed_process_go_on(workplace: Path, forked: Forked, undisturbed: list[str]) -> None:
    """The bounds are from below: nothing here depends on how fast the machine is."""
    stop = {"kind": "stop", "for_s": 1.0, "when": {"point": "update: done", "nth": 2}}
    delay = {"kind": "delay", "for_s": 1.5, "when": {"point": "commit: begun", "nth": 1}}
    trace = ["commit: begun", "commit: durable", "update: done", "publish: packed"]
    run = Disturbed(workplace, "slow", forked, stop, delay, trace=trace)
    assert run.until_done() == 1
    assert {fault["kind"] for fault in run.rows("fault")} == {"stop", "delay"}
    assert run.seconds_between("commit: begun", "commit: durable") >= 1.5
    lines = (run.run_dir / "chaos-trace.jsonl").read_text().splitlines()
    seen = [(row["point"], row["monotonic"]) for row in map(json.loads, lines)]
    second = [at for point, at in seen if point == "update: done"][1]
    assert next(at for point, at in seen if point == "publish: packed" and at > second) - second >= 1.0
    assert fingerprints(run.run_dir, forked) == undisturbed


@pytest.mark.slow
def test_a_lost_message_loses_no_prompt(workplace: Path, forked: Forked, undisturbed: list[str]) -> None:
    """Where nobody asks again, the deadline says what is missing, and the same command goes on."""
    run = Disturbed(
        workplace, "lossy", forked, {"kind": "drop", "when": {"point": "message: worker's answer", "nth": 3}}
    )
    code, printed = run.start()
    assert code in (0, 4), printed
    if code == 4:
        assert "waited" in printed and "groups of step" in printed, printed
        code, printed = run.start()
    assert code == 0 and len(run.rows("fault")) == 1, printed
    assert fingerprints(run.run_dir, forked) == undisturbed


@pytest.mark.slow
def test_a_changed_byte_in_the_newest_checkpoint_is_found_and_an_older_one_used(
    workplace: Path, forked: Forked, undisturbed: list[str]
) -> None:
    corrupt = {"kind": "corrupt", "what": "checkpoint", "when": {"point": "update: begun", "nth": 5}}
    kill = {"kind": "kill", "when": {"point": "update: done", "nth": 5}}
    run = Disturbed(workplace, "corrupt", forked, corrupt, kill)
    assert run.start()[0] == SIGKILLED
    (done,) = run.rows("done")
    damaged = done["what"].split(":")[0]
    assert damaged.startswith("checkpoints/step-000004/")
    code, printed = run.start()
    assert code == 0, printed
    assert "step-000004 is not used" in printed and damaged in printed and "goes on from" in printed
    assert fingerprints(run.run_dir, forked) == undisturbed


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"kind": "kill", "roles": ["driver", "rollout"], "when": {"after_steps": [1]}}, "rollout"),
        ({"kind": "fill_disk", "mib": 1, "for_s": 1.0, "when": {"after_steps": [1]}}, "small file system"),
    ],
)
def test_faults_that_cannot_happen_here_are_refused_before_anything_starts(
    workplace: Path, forked: Forked, fault: dict[str, Any], said: str
) -> None:
    """The disk of the tests has more than one MiB to spare, and a run may not fill a disk that others use."""
    run = Disturbed(workplace, "refused", forked, fault)
    code, printed = run.start()
    assert code == 2 and said in printed and not run.run_dir.exists(), printed


@pytest.mark.slow
def test_the_faults_of_a_run_may_not_change_while_it_goes_on(workplace: Path, forked: Forked) -> None:
    run = Disturbed(workplace, "changed", forked, {"kind": "kill", "when": {"point": "take: durable"}})
    assert run.start()[0] == SIGKILLED
    (workplace / "changed.yaml").write_text(yaml.safe_dump({"faults": []}))
    code, printed = run.start()
    assert code == 2 and "--fresh" in printed, printed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system takes root and the right to mount")
    fill(folder)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", ["commit: begun", "checkpoint: folder made", "update: done", "report: to be written"]
)
def test_a_full_disk_ends_the_run_with_its_name_and_costs_nothing(
    small_disk: Path, forked: Forked, undisturbed: list[str], moment: str
) -> None:
    nth = 1 if moment == "report: to be written" else 2
    fault = {"kind": "fill_disk", "mib": 16, "for_s": 600.0, "when": {"point": moment, "nth": nth}}
    run = Disturbed(small_disk, "full", forked, fault)
    code, printed = run.start()
    assert code == 4 and "no space is left on its disk" in printed and "Traceback" not in printed, printed
    assert not (run.run_dir / "chaos.ballast").exists()
    code, printed = run.start()
    assert code == 0, printed
    assert fingerprints(run.run_dir, forked) == undisturbed


@pytest.mark.slow
def test_a_wall_clock_that_jumps_by_hours_changes_nothing(
    workplace: Path, forked: Forked, undisturbed: list[str]
) -> None:
    """Ten hours forth and back between any two looks: a deadline, lease or age that is taken from it would be off."""
    code, printed = forked(workplace, "run", "run.yaml", "--in-process", "--run-dir", "jumpy", clock_jumps=True)
    assert code == 0, printed
    assert fingerprints(workplace / "jumpy", forked) == undisturbed


# Where the wall clock is read, and why no decision depends on it.
WALL_CLOCK = {
    ("rlhf/buffer/ledger.py", "time.time"): "when a prompt was leased, for people",
    ("rlhf/cli/inspect.py", "time.time"): "how old a file is, for people",
    ("rlhf/watchdog.py", "time.time"): "since when, in status.json, for people and other processes",
    ("actors/waiting.py", "time.time"): "since when something is waited for, in status.json",
}
READS = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "datetime.now", "datetime.utcnow", "date.today"}


def test_decisions_do_not_look_at_the_wall_clock() -> None:
    """Every place that reads it is listed above with its reason; a new one has to be judged."""
    found = set()
    for path in [*ROOT.glob("rlhf/**/*.py"), *ROOT.glob("actors/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                if f"{owner}.{node.attr}" in READS:
                    found.add((path.relative_to(ROOT).as_posix(), f"{owner}.{node.attr}"))
    assert found == set(WALL_CLOCK)
