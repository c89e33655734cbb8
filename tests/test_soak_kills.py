"""A hundred seeded SIGKILLs, and stops, over all roles of real runs: RLOO on the tiny model with vLLM and DeepSpeed on
Ray, two rollout engines. `make soak` runs it; SOAK_KILLS=5 makes it short. Writes the tables of docs/reliability.md.

Each run must end with the ledger of an undisturbed one: the same prompts in the same steps, each trained once, nothing
lost. Where rollouts are concerned the ledger is not believed: engines write down each prompt that they start on, the
buffer each group that has become durable, and no prompt may be started on after that. Not covered: several machines,
and faults of Ray's own processes.
"""

import json
import os
import sqlite3
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.chaos.injector import environments
from rlhf.chaos.points import RUN_VARIABLE

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
KILLS = int(os.environ.get("SOAK_KILLS", "100"))
ROLES = ["driver", "trainer", "rollout", "reward", "reference", "buffer"]
SIGKILLED = -9
KILLS_A_RUN = 10
STOP_EVERY = 4  # steps from one stopped role to the next
NUM_STEPS = max(6 + 3 * min(KILLS, KILLS_A_RUN), STOP_EVERY * len(ROLES) + 2)
GROUPS_PER_STEP = 8
MEAN_GAP_S = 1.5  # from the first new step after a fault to the next fault; a step takes about as long
STOPPED_S = 8.0
SETTLE_S = 20.0
LONGEST_RUN_S = 1800.0

RUN = {
    "seed": 3,
    "model": {"name": "tiny"},
    "algorithm": {"name": "rloo", "samples_per_prompt": 2, "kl": {"coef": 0.02}},
    "data": {"path": "prompts.jsonl"},
    "loop": {
        "num_steps": NUM_STEPS,
        "groups_per_step": GROUPS_PER_STEP,
        "checkpoint_every": 4,
        "wait_timeout_s": 600,
    },
    "generation": {"engine": "vllm", "max_new_tokens": 24, "temperature": 0.9, "cache_gib": 0.2},
    "learner": {"engine": "deepspeed", "lr": 1e-3},
    "reward": {"function": "reward.py:reward"},
}
CLUSTER = {"rollout": {"replicas": 2}, "threads_per_role": 1, "object_store_gib": 0.5}
REWARD = "def reward(prompts, completions, **columns):\n    return [float(text.count('e')) for text in completions]\n"
TRACE = ["rollout: group begun", "rollout: group finished", "group: stored"]


@dataclass
class Run:
    """One run, started as often as its driver was killed."""

    folder: Path
    seconds: float
    starts: int
    printed: str
    faults: list[dict[str, Any]] = field(default_factory=list)
    recovered: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps_per_s(self) -> float:
        return NUM_STEPS / self.seconds


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("soak")
    rows = [json.dumps({"prompt": f"Tell me about number {n}."}) for n in range(2 * NUM_STEPS * GROUPS_PER_STEP)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    (folder / "reward.py").write_text(REWARD)
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    (folder / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    return folder


@pytest.fixture(scope="module")
def undisturbed(workplace: Path) -> Run:
    return carry_through(workplace, "undisturbed", {"faults": [], "trace": TRACE})


def carry_through(workplace: Path, name: str, plan: Mapping[str, Any]) -> Run:
    """The same command again and again, as long as its driver is killed; fails when it ends in any other way."""
    (workplace / f"{name}.yaml").write_text(yaml.safe_dump(dict(plan)))
    command = [sys.executable, "-m", "rlhf.cli.main", "run", "run.yaml", "--cluster", "cluster.yaml"]
    command += ["--run-dir", name, "--chaos", f"{name}.yaml"]
    folder, log = workplace / name, workplace / f"{name}.log"
    began, starts = time.monotonic(), 0
    while True:
        starts += 1
        with log.open("ab") as printed:
            code = subprocess.run(
                command, cwd=workplace, stdout=printed, stderr=printed, timeout=LONGEST_RUN_S, check=False
            ).returncode
        if code != SIGKILLED:
            break
    assert code == 0, f"start {starts} of {name} ended with {code}:\n{log.read_text()[-4000:]}"
    events = rows(folder / "chaos.jsonl")
    return Run(
        folder,
        time.monotonic() - began,
        starts,
        log.read_text(),
        [row for row in events if row["event"] == "fault"],
        [row for row in events if row["event"] == "recovered"],
    )


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps_of(run_dir: Path) -> list[tuple[int, int, int]]:
    """(step, position, prompt) of every committed step."""
    query = """SELECT step, position, prompt_id FROM step_groups JOIN steps USING (step)
               WHERE state = 'trained' ORDER BY step, position"""
    with sqlite3.connect(run_dir / "experience.db") as connection:
        return connection.execute(query).fetchall()


def assert_like(run: Run, undisturbed: Run) -> None:
    """Everything that a fault must not change."""
    name = run.folder.name
    answer = subprocess.run(
        [sys.executable, "-m", "rlhf.cli.main", "verify", str(run.folder), "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    report = json.loads(answer.stdout)
    assert report["ok"], f"{name}: {report['problems'][:5]}"
    ledger = report["ledger"]
    assert ledger["lost"] == ledger["duplicated"] == ledger["dropped"] == 0, f"{name}: {ledger}"
    steps = steps_of(run.folder)
    assert steps == steps_of(undisturbed.folder), f"{name}: other prompts, or the same ones in other steps"
    trained = Counter(prompt for _, _, prompt in steps)
    assert set(trained.values()) == {1} and len(trained) == NUM_STEPS * GROUPS_PER_STEP
    assert [row["step"] for row in rows(run.folder / "metrics.jsonl")] == list(range(NUM_STEPS))
    again = generated_again(run.folder)
    assert not again, f"{name}: generated again although they were stored: {again}"
    left = still_there(run.folder)
    assert not left, f"{name}: left behind: {left}"


def generated_again(run_dir: Path) -> dict[int, int]:
    """How often engines started on a prompt after its group had become durable, by prompt; swept groups are none here,
    because nothing ages with max_staleness 0."""
    stored: dict[int, float] = {}
    again: Counter[int] = Counter()
    for row in sorted(rows(run_dir / "chaos-trace.jsonl"), key=lambda row: row["monotonic"]):
        if row["point"] == "group: stored":
            stored.setdefault(row["subject"], row["monotonic"])
        if row["point"] == "rollout: group begun" and row["subject"] in stored:
            again[row["subject"]] += 1
    return dict(again)


def begun(run_dir: Path) -> int:
    return sum(row["point"] == "rollout: group begun" for row in rows(run_dir / "chaos-trace.jsonl"))


def still_there(run_dir: Path) -> list[str]:
    """The processes of a run that is over, once they had some time to end."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        left = [
            f"{process.pid} {process.name()}"
            for process, environment in environments()
            if environment.get(RUN_VARIABLE) == str(run_dir)
        ]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_seeded_kills_over_all_roles_change_nothing(workplace: Path, undisturbed: Run) -> None:
    """As many runs as it takes, each with up to ten kills; who is killed and when is drawn from the run's number."""
    runs: list[Run] = []
    while (left := KILLS - sum(len(struck(run)) for run in runs)) > 0:
        when = {"every_s": MEAN_GAP_S, "count": min(left, KILLS_A_RUN)}
        plan = {
            "seed": len(runs),
            "faults": [{"kind": "kill", "roles": ROLES, "when": when}],
            "trace": TRACE,
        }
        runs.append(carry_through(workplace, f"kills-{len(runs)}", plan))
        assert struck(runs[-1]), "a run without a fault shows nothing"
        assert_like(runs[-1], undisturbed)
        write_table("kills", kills_table(runs, undisturbed))
    assert sum(len(struck(run)) for run in runs) >= KILLS


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_stopped_processes_of_every_role_change_nothing(workplace: Path, undisturbed: Run) -> None:
    """Each role in turn is stopped for some seconds: it holds what it holds, and answers nobody."""
    faults = [
        {"kind": "stop", "roles": [role], "for_s": STOPPED_S, "when": {"after_steps": [STOP_EVERY * number + 2]}}
        for number, role in enumerate(ROLES)
    ]
    run = carry_through(workplace, "stops", {"faults": faults, "trace": TRACE})
    assert {fault["role"] for fault in struck(run)} == set(ROLES)
    assert_like(run, undisturbed)
    write_table("stops", stops_table(run))


def struck(run: Run) -> list[dict[str, Any]]:
    """The faults that had somebody to strike."""
    return [fault for fault in run.faults if "skipped" not in fault]


def kills_table(runs: Sequence[Run], undisturbed: Run) -> str:
    """By role: faults, survived, time to recover; then goodput. A fault counts as survived with the run that it hit,
    which has passed every check above by now."""
    lines = by_role([fault for run in runs for fault in struck(run)], [row for run in runs for row in run.recovered])
    steps, seconds = NUM_STEPS * len(runs), sum(run.seconds for run in runs)
    made, needed = sum(begun(run.folder) for run in runs), len(runs) * begun(undisturbed.folder)
    killed = sum(len(struck(run)) for run in runs)
    lines += [
        "",
        f"{killed} SIGKILLs in {len(runs)} runs of {NUM_STEPS} steps ({sum(run.starts for run in runs)} starts of the "
        f"driver), {seconds:.0f} s. Prompts lost 0, trained twice 0, finished rollouts generated again 0, processes "
        f"left behind 0. Engines started on {made} groups where undisturbed runs need {needed}: the {made - needed} "
        "others were unfinished when their engine, the buffer or the driver died. Goodput "
        f"{steps / seconds:.3f} steps/s, undisturbed {undisturbed.steps_per_s:.3f} steps/s, starts included.",
    ]
    return "\n".join(lines)


def stops_table(run: Run) -> str:
    lines = by_role(struck(run), run.recovered)
    return "\n".join([*lines, "", f"Each stopped for {STOPPED_S:g} s; the time to recover includes that."])


def by_role(faults: Sequence[Mapping[str, Any]], recovered: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| role | faults | survived | s to recover, median | max |", "|---|---|---|---|---|"]
    for role in [*ROLES, "all"]:
        hit = sum(role in (fault["role"], "all") for fault in faults)
        seconds = [row["after_s"] for row in recovered if role in (row["role"], "all")]
        if hit:
            times = f"{statistics.median(seconds):.1f} | {max(seconds):.1f}" if seconds else "- | -"
            lines.append(f"| {role} | {hit} | {hit} | {times} |")
    return lines


def write_table(name: str, table: str) -> None:
    """Into docs/reliability.md, between the lines that frame it."""
    begin, end = f"<!-- soak: {name} -->\n", "\n<!-- end -->"
    before, _, rest = PAGE.read_text().partition(begin)
    assert rest, f"{PAGE} has no line {begin!r}"
    PAGE.write_text(before + begin + table + rest[rest.index(end) :])
