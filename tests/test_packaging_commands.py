"""Every command in README.md, CONTRIBUTING.md and docs/ can be typed as it stands.

Not covered: that the commands do what the text says; the files that a run writes are not looked for.
"""

import re
import shlex
from pathlib import Path

import pytest

from rlhf.cli.main import _parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The lines of a page's code blocks that call `rlhf` or `make`, split as a shell splits them."""
    found = []
    for block in BLOCK.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
            if words.startswith(("rlhf ", "make ")):
                found.append(shlex.split(words, comments=True))
    return found


def parse(words: list[str]) -> None:
    parser, _ = _parser(words)
    parser.parse_args(words)


COMMANDS = [pytest.param(words, id=f"{page.name}: {' '.join(words)}") for page in PAGES for words in commands(page)]


@pytest.mark.parametrize("words", COMMANDS)
def test_documented_command_is_accepted(words: list[str]) -> None:
    """`rlhf` lines pass the parser, `make` lines name targets, and the run and cluster files they name exist."""
    if words[0] == "rlhf":
        parse(words[1:])
    else:
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    for word in words:
        if word.startswith(("configs/", "clusters/", "examples/")):
            assert (ROOT / word).exists(), word


def test_a_command_that_does_not_exist_is_refused() -> None:
    """The control for the test above."""
    with pytest.raises(SystemExit):
        parse(["runn", "configs/rloo_tiny.yaml"])


def test_the_pages_hold_commands() -> None:
    """An extraction that finds nothing would pass everything."""
    assert {"rlhf run", "make demo", "make test"} <= {" ".join(words[:2]) for words in commands(ROOT / "README.md")}
