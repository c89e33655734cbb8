"""A run under a real debugger, on a terminal: a breakpoint in an algorithm, and post-mortem.

Not covered: editors, which use debugpy in place of pdb, and debuggers in actors.
"""

import ast
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import rlhf.algorithms.rloo

RLOO = Path(rlhf.algorithms.rloo.__file__)
TIMEOUT_S = 250.0
RUN = {
    "seed": 3,
    "model": {"name": "tiny"},
    "algorithm": {"name": "rloo", "samples_per_prompt": 2},
    "data": {"path": "prompts.jsonl"},
    "loop": {"num_steps": 1, "groups_per_step": 2},
    "generation": {"engine": "transformers", "max_new_tokens": 4},
    "learner": {"engine": "torch"},
    "reward": {"function": "reward.py:reward", "isolate": False},
}
REWARD = """
def reward(prompts, completions):
    limit = {limit}
    return [1.0 / limit for _ in completions]
"""


class Terminal:
    """A program on a pseudo-terminal, spoken to as a person would."""

    def __init__(self, folder: Path, *words: str) -> None:
        self._end, theirs = pty.openpty()
        command = [sys.executable, "-m", *words]
        self.process = subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self._said = ""

    def until(self, text: str) -> str:
        """What was said up to and with a text, since the last call."""
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self._said:
            assert select.select([self._end], [], [], deadline - time.monotonic())[0], f"no {text!r}: {self._said}"
            try:
                self._said += os.read(self._end, 1 << 16).decode(errors="replace")
            except OSError as error:  # the other end is closed
                raise AssertionError(f"it ended without {text!r}: {self._said}") from error
        said, _, self._said = self._said.partition(text)
        return said + text

    def answer(self, line: str) -> str:
        """Types a line at pdb's prompt; gives what is said up to the next prompt."""
        os.write(self._end, f"{line}\n".encode())
        return self.until("(Pdb) ")

    def leave(self, line: str) -> int:
        os.write(self._end, f"{line}\n".encode())
        return self.process.wait(TIMEOUT_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(8)))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    return tmp_path


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def first_line_of(function: str) -> int:
    """The first statement of a function of rloo.py."""
    tree = ast.parse(RLOO.read_text())
    return next(
        (node.body[1] if isinstance(node.body[0], ast.Expr) else node.body[0]).lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == function
    )


@pytest.mark.slow
def test_pdb_stops_in_an_algorithm(workplace: Path, terminals: list[Terminal]) -> None:
    """The groups of the step are there to look at, with their rewards; then the run ends as ever."""
    (workplace / "reward.py").write_text(REWARD.format(limit=4))
    words = ["pdb", "-m", "rlhf.cli.main", "run", "run.yaml", "--in-process", "--run-dir", "out"]
    terminals.append(terminal := Terminal(workplace, *words))
    terminal.until("(Pdb) ")
    assert "Breakpoint 1" in terminal.answer(f"b {RLOO}:{first_line_of('prepare')}")
    stopped = terminal.answer("c")
    assert "rloo.py" in stopped and "prepare" in stopped, stopped
    assert "[2, 2]" in terminal.answer("p [len(group.samples) for group in groups]")
    assert "0.25" in terminal.answer("p groups[0].samples[0].scores['reward']")
    assert "launch.py" in terminal.answer("w"), "the loop is not on the stack"
    ended = terminal.answer("c")
    assert "step 1/1" in ended and "Exit status: 0" in ended, ended
    assert (workplace / "out" / "checkpoints" / "step-000001" / "manifest.json").is_file()


@pytest.mark.slow
def test_post_mortem_is_where_the_error_was_raised(workplace: Path, terminals: list[Terminal]) -> None:
    """In the reward function of the user, and not where the run gave up; the exit code stays."""
    (workplace / "reward.py").write_text(REWARD.format(limit=0))
    words = ["rlhf.cli.main", "run", "run.yaml", "--in-process", "--pdb", "--run-dir", "out"]
    terminals.append(terminal := Terminal(workplace, *words))
    opened = terminal.until("(Pdb) ")
    *_, place, _, _ = opened.splitlines()
    assert "ZeroDivisionError" in opened and place.startswith("> ") and "reward.py" in place, opened
    terminal.answer("u")  # out of the list comprehension
    assert "0" in terminal.answer("p limit")
    assert terminal.leave("q") == 4
    assert (workplace / "out" / "report.html").is_file()


def test_a_debugger_without_a_process_to_look_into_is_refused(workplace: Path) -> None:
    from rlhf.cli.main import main

    assert main(["run", str(workplace / "run.yaml"), "--pdb", "--run-dir", str(workplace / "out")]) == 2
