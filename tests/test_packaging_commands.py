"""Every command in README.md, CONTRIBUTING.md and docs/ can be typed as it stands, and every link leads to a file.

Not covered: that the commands do what the text says; the files that a run writes are not looked for.
"""

import re
import shlex
from pathlib import Path

import pytest

from rlhf.cli.main import _parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
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
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """Relative links name files that exist. Not covered: anchors and web addresses."""
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert missing == []


def test_every_page_is_in_the_index() -> None:
    """docs/README.md leads to each page below docs/, or to the folder that it is in."""
    linked = {(ROOT / "docs" / link).resolve() for link in LINK.findall((ROOT / "docs" / "README.md").read_text())}
    pages = {page for page in (ROOT / "docs").rglob("*.md") if page != ROOT / "docs" / "README.md"}
    assert {page for page in pages if not {page, *page.parents} & (linked - {ROOT, ROOT / "docs"})} == set()
