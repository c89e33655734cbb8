"""Who may use a run directory, and what a second or refused command leaves of it; damaged logs and a closed pipe.

Not covered: Ray, and machines that share a file system, where the kernel's lock depends on that file system.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.cli.main import main
from rlhf.cli.run_directory import held
from rlhf.durable import read_jsonl

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line in this process, in a folder with a run file of prompts; exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(12)))
    (tmp_path / "reward.py").write_text(
        "def score(prompts, completions):\n"
        "    return [None if prompts[0] == 'Say 2.' else float(len(text)) for text in completions]\n"
    )
    content: dict[str, Any] = {
        "model": {"name": "tiny"},
        "algorithm": {"name": "rloo", "samples_per_prompt": 2, "kl": {"coef": 0.0}},
        "data": {"path": "prompts.jsonl", "shuffle": False},
        "loop": {"num_steps": 1, "groups_per_step": 2, "checkpoint_every": 1},
        "generation": {"engine": "transformers", "max_new_tokens": 4},
        "learner": {"engine": "torch"},
        "reward": {"function": "reward.py:score", "isolate": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))

    def call(*words: str) -> tuple[int, str, str]:
        code = main(list(words))
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


@pytest.fixture
def train(command: Command) -> Command:
    return lambda *words: command("run", "run.yaml", "--in-process", *words)


@pytest.fixture
def pairs(command: Command) -> Command:
    return lambda *words: command("data", "pairs", "run.yaml", "--in-process", "--prompts", "3", *words)


def test_pairs_and_training_do_not_go_on_with_each_other(
    tmp_path: Path, command: Command, train: Command, pairs: Command
) -> None:
    """Also of a training run of before the kind was written down; which `rlhf run` goes on with."""
    assert train("--run-dir", "a")[0] == 0
    for _ in range(2):
        code, _, said = pairs("--run-dir", "a", "--to", "o.jsonl")
        assert code == 2 and "a: holds a training run (`rlhf run`)" in said and "another --run-dir" in said
        (tmp_path / "a" / "kind").unlink(missing_ok=True)
    assert command("verify", "a")[0] == 0 and not (tmp_path / "o.jsonl").exists()
    assert train("--run-dir", "a", "loop.num_steps=2")[0] == 0
    assert pairs("--run-dir", "b", "--to", "o.jsonl")[0] == 0
    code, _, said = train("--run-dir", "b")
    assert code == 2 and "b: holds answers and scores of `rlhf data pairs`" in said


@pytest.mark.parametrize("words", [("--fresh",), ("loop.num_steps=7",)])
def test_a_second_command_leaves_a_live_run_as_it_is(tmp_path: Path, train: Command, words: tuple[str, ...]) -> None:
    """Neither moved away nor rewritten. Control: once it is no longer held, --fresh moves it."""
    assert train("--run-dir", "a")[0] == 0
    before = {name: (tmp_path / "a" / name).read_bytes() for name in ("config.yaml", "cluster.yaml")}
    (tmp_path / "other.yaml").write_text("trainer: {cpus: 1}\n")
    with held(tmp_path / "a"):
        code, _, said = train("--run-dir", "a", "--cluster", "other.yaml", *words)
    assert code == 2 and f"a: is being run by process {os.getpid()}" in said
    assert {name: (tmp_path / "a" / name).read_bytes() for name in before} == before
    assert not (tmp_path / "a.old-1").exists()
    if words == ("--fresh",):
        assert train("--run-dir", "a", *words)[0] == 0 and (tmp_path / "a.old-1" / "metrics.jsonl").is_file()


def test_pairs_overwrite_nothing_but_their_own(tmp_path: Path, pairs: Command) -> None:
    """The file that the same run directory wrote is replaced, for more prompts too, until somebody has changed it."""
    (tmp_path / "mine.jsonl").write_text("{}\n")
    (tmp_path / "linked.jsonl").symlink_to("prompts.jsonl")
    (tmp_path / "file").touch()
    before = (tmp_path / "prompts.jsonl").read_bytes()
    for to, said in {
        "mine.jsonl": "mine.jsonl: exists already",
        "prompts.jsonl": "would overwrite or change data.path",
        "linked.jsonl": "would overwrite or change data.path",
        "file/below.jsonl": "--to file/below.jsonl: ",
        "a/o.jsonl": "is inside --run-dir a",
    }.items():
        code, _, errors = pairs("--run-dir", "a", "--to", to)
        assert code == 2 and said in errors
    assert not (tmp_path / "a").exists() and (tmp_path / "prompts.jsonl").read_bytes() == before
    assert (tmp_path / "mine.jsonl").read_text() == "{}\n"
    assert pairs("--run-dir", "a", "--to", "o.jsonl")[0] == 0
    assert pairs("--run-dir", "a", "--to", "o.jsonl", "--prompts", "4")[0] == 0
    with (tmp_path / "o.jsonl").open("a") as file:
        file.write("{}\n")
    code, _, errors = pairs("--run-dir", "a", "--to", "o.jsonl")
    assert code == 2 and "o.jsonl: exists already, and is not as this command wrote it with --run-dir a" in errors


def test_damaged_logs_stop_neither_the_run_nor_inspect(tmp_path: Path, command: Command, train: Command) -> None:
    """The damaged step is missing from the log afterwards, and is told once; the ledger has it."""
    assert train("--run-dir", "a", "data.heldout=2")[0] == 0
    a = tmp_path / "a"
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (a / name).write_bytes(b"\xff{half\n[1]\n" + (a / name).read_bytes())
    (a / "status.json").touch()
    (a / "data.json").write_text("")
    code, shown, _ = command("inspect", "a")
    assert code == 0 and "1 of 1 steps trained" in shown and "metrics.jsonl: damaged at 2 lines, 1, 2" in shown
    found = json.loads(command("inspect", "a", "--json")[1])
    assert [Path(line.split(":")[0]).name for line in found["unreadable"]] == [
        "metrics.jsonl",
        "evaluations.jsonl",
        "status.json",
        "data.json",
    ]
    assert [row["step"] for row in found["evaluations"]] == [0, 1] and found["last_metrics"]["step"] == 0
    code, shown, errors = train("--run-dir", "a", "data.heldout=2", "loop.num_steps=2")
    assert code == 0, errors
    assert sum("metrics.jsonl: damaged at 2 lines, 1, 2, left out" in line for line in shown.splitlines()) == 1
    assert [row["step"] for row in read_jsonl(a / "metrics.jsonl")] == [0, 1]


def test_a_start_that_was_refused_late_does_not_block_the_corrected_one(tmp_path: Path, train: Command) -> None:
    """What it left is moved, not deleted. Control: once prompts were issued, other settings are another run."""
    code, _, said = train("--run-dir", "a", "model.lora={target_modules: [nope]}")
    assert code == 2 and "nope is no layer" in said and (tmp_path / "a" / "config.yaml").is_file()
    code, shown, _ = train("--run-dir", "a")
    assert code == 0 and "a: what it held is moved to a.old-1" in shown
    assert "nope" in (tmp_path / "a.old-1" / "config.yaml").read_text()
    code, _, said = train("--run-dir", "a", "model.lora={target_modules: [q_proj]}")
    assert code == 2 and "a: holds another run" in said and not (tmp_path / "a.old-2").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.yaml.new").write_text("seed: ")  # of a start that was killed
    assert train("--run-dir", "b")[0] == 0 and not (tmp_path / "b.old-1").exists()


def test_with_json_the_output_is_one_object(pairs: Command) -> None:
    """The reward cannot score prompt 2. Control: without --json it is said on standard output."""
    code, shown, said = pairs("--to", "a.jsonl", "--json")
    assert code == 0 and json.loads(shown)["prompts"] == 3 and "prompt 2 is dropped" in said
    assert "prompt 2 is dropped" in pairs("--to", "b.jsonl")[1]


def test_nothing_is_exported_among_checkpoints(tmp_path: Path, command: Command, train: Command) -> None:
    assert train("--run-dir", "a")[0] == 0
    for what in ("policy", "experience"):
        code, _, said = command("export", "a", "--to", "a/checkpoints/step-000009", "--what", what)
        assert code == 2 and "step-000009: is among the checkpoints of the run" in said
    assert [folder.name for folder in (tmp_path / "a" / "checkpoints").iterdir()] == ["step-000001"]
    assert command("export", "a", "--to", "a/policy")[0] == 0


def test_a_run_outlives_the_reader_of_its_output(tmp_path: Path, command: Command) -> None:
    """The pipe's other end is closed before the first line. Not covered: the bar of a terminal, which rich draws."""
    words = ["run", "run.yaml", "--in-process", "--run-dir", "a", "loop.num_steps=2"]
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [sys.executable, "-m", "rlhf.cli.main", *words], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert result.returncode == 0, result.stderr
    assert "Broken pipe" not in result.stderr and "BrokenPipe" not in result.stderr
    assert [row["step"] for row in read_jsonl(tmp_path / "a" / "metrics.jsonl")] == [0, 1]


def test_verify_finds_steps_without_a_line(tmp_path: Path, command: Command, train: Command) -> None:
    """Control: the lines after the newest checkpoint are those of steps that a killed run trains again."""
    assert train("--run-dir", "a", "loop.num_steps=3", "loop.checkpoint_every=2")[0] == 0
    path = tmp_path / "a" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert command("verify", "a")[0] == 0
    path.write_text("".join(lines[:1] + lines[2:]))
    code, shown, _ = command("verify", "a")
    assert code == 1 and "has no line of 1 of the 3 steps before step-000003, the first: [1]" in shown
    path.unlink()
    assert command("verify", "a")[0] == 1
    (tmp_path / "a" / "checkpoints" / "step-000003").rename(tmp_path / "moved")
    path.write_text("".join(lines[:2]))
    assert command("verify", "a")[0] == 0
