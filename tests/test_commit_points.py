"""A kill at every named moment of a run, one by one: the same command goes on and ends as if nothing had happened.

Compared with an undisturbed run, bitwise: the weights of the last checkpoint with their optimizer, the groups of the
buffer and which step trained them, the metrics of each step but its times, and the evaluations. The moments are read
out of the code, so a new one is covered by being there. In one process, float32, transformers and torch. Not covered
here: the same moments inside Ray actors (tests/test_soak_kills.py kills those), and power loss.
"""

import ast
import json
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.chaos.points import MESSAGES, MOMENTS

ROOT = Path(__file__).parents[1]
RUN = {
    "seed": 3,
    "model": {"name": "tiny"},
    "algorithm": {"name": "rloo"},
    "data": {"path": "prompts.jsonl", "heldout": 2},
    "loop": {"num_steps": 3, "groups_per_step": 2, "checkpoint_every": 1, "keep_checkpoints": 1, "eval_every": 1},
    "generation": {"engine": "transformers", "max_new_tokens": 4, "temperature": 0.9},
    "learner": {"engine": "torch", "lr": 1e-3, "minibatches": 2},
    "reward": {"function": "reward.py:reward", "isolate": False},
}
REWARD = "def reward(prompts, completions, **columns):\n    return [float(text.count('e')) for text in completions]\n"
NUM_STEPS = 3
Forked = Callable[..., tuple[int, str]]
SIGKILLED = -signal.SIGKILL


def calls_in_the_code(function: str) -> dict[str, list[str]]:
    """The first argument of every call of `function` in rlhf/ and actors/, and the files in which it stands."""
    found: dict[str, list[str]] = {}
    for path in sorted([*ROOT.glob("rlhf/**/*.py"), *ROOT.glob("actors/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
                assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}: a name that is written out"
                found.setdefault(node.args[0].value, []).append(path.relative_to(ROOT).as_posix())
    return found


POINTS = sorted(calls_in_the_code("point"))
# Which run is killed there: RLOO, which is quicker, or PPO, whose critic reaches moments of its own.
ALGORITHMS = {
    "rloo": "{name: rloo, samples_per_prompt: 2, kl: {coef: 0.02}}",
    "ppo": "{name: ppo, samples_per_prompt: 2, kl: {coef: 0.02}, critic: {lr: 1.0e-3}}",
}
OF_THE_CRITIC = [point for point in POINTS if point.startswith("critic: ")]


def run_at(point: str) -> str:
    return "ppo" if point in OF_THE_CRITIC else "rloo"


def test_every_moment_in_the_code_has_a_meaning_and_every_meaning_a_moment() -> None:
    assert calls_in_the_code("point").keys() == MOMENTS.keys()
    assert calls_in_the_code("is_dropped").keys() == MESSAGES.keys()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("points")
    rows = [json.dumps({"prompt": f"Number {n}."}) for n in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    (folder / "reward.py").write_text(REWARD)
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    return folder


@pytest.fixture(scope="module")
def undisturbed(workplace: Path, forked: Forked) -> dict[str, dict[str, Any]]:
    """How each run ends when nobody disturbs it, and how often it reaches each moment."""
    (workplace / "watch.yaml").write_text(yaml.safe_dump({"faults": [], "trace": POINTS}))
    found = {}
    for name in ALGORITHMS:
        code, printed = forked(workplace, *command_of(name, name), "--chaos", "watch.yaml")
        assert code == 0, printed
        times: dict[str, int] = {}
        for line in (workplace / name / "chaos-trace.jsonl").read_text().splitlines():
            point = json.loads(line)["point"]
            times[point] = times.get(point, 0) + 1
        found[name] = {"state": state_of(workplace / name), "times": times}
    return found


def command_of(algorithm: str, run_dir: str) -> tuple[str, ...]:
    return ("run", "run.yaml", f"algorithm={ALGORITHMS[algorithm]}", "--in-process", "--run-dir", run_dir)


def state_of(run_dir: Path) -> dict[str, Any]:
    """All that a run leaves behind and that must not depend on how often it was killed."""
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    parts = json.loads((checkpoint / "manifest.json").read_text())["files"]
    with sqlite3.connect(run_dir / "experience.db") as connection:
        tables = {
            "prompts": "SELECT id, state, attempts FROM prompts ORDER BY id",
            "groups": "SELECT prompt_id, policy_version, hex(checksum) FROM groups ORDER BY prompt_id",
            "columns": "SELECT prompt_id, name, hex(checksum) FROM columns ORDER BY prompt_id, name",
            "steps": "SELECT step, state, version, fingerprint FROM steps ORDER BY step",
            "step_groups": "SELECT step, position, prompt_id FROM step_groups ORDER BY step, position",
            "discarded": "SELECT prompt_id, reason FROM discarded",
        }
        ledger = {name: connection.execute(query).fetchall() for name, query in tables.items()}
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time/", "tokens/", "sync/seconds", "faults/restarts")
    evaluations = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    return {
        "checkpoint": {name: part["blake2b"] for name, part in parts.items()},
        **ledger,
        "metrics": [{name: row[name] for name in sorted(row) if not name.startswith(clocks)} for row in rows],
        "evaluations": evaluations,
    }


def test_the_undisturbed_runs_reach_every_moment(undisturbed: dict[str, dict[str, Any]]) -> None:
    """Otherwise the kills below would prove nothing of the moments that they do not reach."""
    assert sorted(undisturbed["ppo"]["times"]) == POINTS and len(OF_THE_CRITIC) >= 4
    assert sorted([*undisturbed["rloo"]["times"], *OF_THE_CRITIC]) == POINTS
    for run in undisturbed.values():
        assert [row["step"] for row in run["state"]["metrics"]] == list(range(NUM_STEPS))


def kill_and_go_on(workplace: Path, forked: Forked, point: str, nth: int) -> Path:
    """Kills a run at a moment, then gives the same command again until it ends; returns the run directory."""
    name = f"{point.replace(' ', '-').replace(':', '')}-{nth}"
    plan = {"faults": [{"kind": "kill", "when": {"point": point, "nth": nth}}]}
    (workplace / f"{name}.yaml").write_text(yaml.safe_dump(plan))
    command = (*command_of(run_at(point), name), "--chaos", f"{name}.yaml")
    code, printed = forked(workplace, *command)
    assert code == SIGKILLED, f"{point} ({nth}) was not reached: {printed}"
    code, printed = forked(workplace, *command)
    assert code == 0, printed
    return workplace / name


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_moment_the_run_ends_as_if_nothing_had_happened(
    workplace: Path, forked: Forked, undisturbed: dict[str, dict[str, Any]], point: str
) -> None:
    """At a time in the middle: there is something to lose, and something to come."""
    straight = undisturbed[run_at(point)]
    nth = (straight["times"][point] + 1) // 2
    ended = state_of(kill_and_go_on(workplace, forked, point, nth))
    assert ended == straight["state"]


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_time_that_a_moment_is_reached_the_run_ends_as_if_nothing_had_happened(
    workplace: Path, forked: Forked, undisturbed: dict[str, dict[str, Any]], point: str
) -> None:
    straight = undisturbed[run_at(point)]
    for nth in range(1, straight["times"][point] + 1):
        ended = state_of(kill_and_go_on(workplace, forked, point, nth))
        assert ended == straight["state"], f"killed the {nth}th time"
