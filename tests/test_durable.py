"""Small files after a crash in the middle of a write: what was whole stays, what was torn goes, and writing goes on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.cli.run_directory import CONFIG_FILE, check_directory
from rlhf.config import RunConfig
from rlhf.durable import BESIDE, append_durably, read_jsonl
from rlhf.errors import BadInput


@pytest.mark.parametrize("torn", ["", '{"step": 2, "rew', "{" * 9000, '{"step": 2}'])
def test_a_line_after_a_torn_one_is_a_line_of_its_own(tmp_path: Path, torn: str) -> None:
    """A full disk, or a kill, leaves the beginning of a line; the last one here only lacks its end."""
    path = tmp_path / "log.jsonl"
    for step in (0, 1):
        append_durably(path, {"step": step})
    with path.open("a") as file:
        file.write(torn)
    append_durably(path, {"step": 3})
    assert [row["step"] for row in read_jsonl(path)] == [0, 1, 3]


def test_a_torn_first_line_goes_too(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"st')
    append_durably(tmp_path / "log.jsonl", {"step": 0})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 0}\n'


def test_a_run_that_died_before_its_first_file_stood_can_start(
    tmp_path: Path, tiny_run: Callable[..., RunConfig]
) -> None:
    """Else the same command would be refused: the folder is not empty and holds no config.yaml."""
    config = tiny_run({}, {}, {}, {})
    (tmp_path / (CONFIG_FILE + BESIDE)).write_text("seed: ")
    check_directory(tmp_path, config, "training", fresh=False)
    (tmp_path / "letters.txt").write_text("somebody's")
    with pytest.raises(BadInput, match=r"letters\.txt"):
        check_directory(tmp_path, config, "training", fresh=False)
