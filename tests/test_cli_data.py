"""`rlhf data`: what it counts, and that its split puts no prompt on both sides.

Not covered: data sets of the hub.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli.main import main
from rlhf.models.load import load_tokenizer


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["data", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def pairs() -> list[dict[str, Any]]:
    """Twenty pairs of ten prompts; answers of 1 to 20 words."""
    return [
        {"prompt": f"question {n % 10}", "chosen": " ".join(["yes"] * (n + 1)), "rejected": "no"} for n in range(20)
    ]


def test_show_counts_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One row twice, one with equal answers, one empty: 22 usable of 24, percentiles by nearest rank."""
    rows = [*pairs(), pairs()[0], {"prompt": "alone", "chosen": "a b", "rejected": "c"}]
    bad = [{"prompt": "x", "chosen": "a", "rejected": "a"}, {"prompt": "y", "chosen": "", "rejected": "a"}]
    path = write(tmp_path / "pairs.jsonl", rows + bad)
    found = asked(capsys, "show", path)
    assert (found["format"], found["rows"], found["duplicate_rows"]) == ("preference", 24, 1)
    assert found["unusable"] == {"chosen equals rejected": 1, "empty answer": 1}
    assert (found["distinct_prompts"], found["rows_that_share_a_prompt"]) == (11, 21)
    assert found["lengths"]["chosen"] == {"p50": 9, "p95": 19, "p99": 20, "max": 20}
    assert found["lengths"]["prompt"]["p50"] == 2 and found["unit"] == "words"
    assert main(["data", "show", path]) == 0
    assert "24, of which 1 repeat another row" in capsys.readouterr().out


def test_show_counts_the_tokens_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "the thing and the other thing"}])
    found = asked(capsys, "show", path, "--model", "tiny")
    tokenizer = load_tokenizer("tiny", trust_remote_code=False)
    tokens = len(tokenizer("the thing and the other thing", add_special_tokens=False)["input_ids"])
    assert found["lengths"] == {"text": {"p50": tokens, "p95": tokens, "p99": tokens, "max": tokens}}


def test_split_keeps_prompts_apart_and_loses_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The order of the rows does not matter; what is written reads back as the same rows."""
    one = asked(capsys, "split", write(tmp_path / "a.jsonl", pairs()), "--to", str(tmp_path / "a"), "--heldout", "3")
    backwards = write(tmp_path / "b.jsonl", pairs()[::-1])
    asked(capsys, "split", backwards, "--to", str(tmp_path / "b"), "--heldout", "3")
    sides = {}
    for folder in ("a", "b"):
        for side in ("train", "test"):
            lines = (tmp_path / folder / f"{side}.jsonl").read_text().splitlines()
            sides[folder, side] = [json.loads(line) for line in lines]
    assert one["test"]["rows"] == len(sides["a", "test"]) == 6 and len(sides["a", "train"]) == 14
    assert not {row["prompt"] for row in sides["a", "test"]} & {row["prompt"] for row in sides["a", "train"]}
    assert sorted(map(str, sides["a", "test"])) == sorted(map(str, sides["b", "test"]))
    assert sorted(map(str, sides["a", "test"] + sides["a", "train"])) == sorted(map(str, pairs()))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["show", "nowhere.jsonl"], "data.path=nowhere.jsonl: no such file"),
        (["show", "odd.jsonl"], "odd.jsonl:1: columns there: question; expected prompt"),
        (["split", "pairs.jsonl", "--to", "new", "--heldout", "10"], "--heldout 10: pairs.jsonl has 10 distinct"),
        (["split", "pairs.jsonl", "--to", "full", "--heldout", "2"], "--to full: exists and is not an empty folder"),
        (["split", "bad.jsonl", "--to", "new", "--heldout", "2"], "bad.jsonl:21: empty answer"),
    ],
)
def test_bad_input(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pairs.jsonl", pairs())
    write(tmp_path / "odd.jsonl", [{"question": "a"}])
    write(tmp_path / "bad.jsonl", [*pairs(), {"prompt": "a", "chosen": "", "rejected": "b"}])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["data", *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_split_leaves_bad_rows_out_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "bad.jsonl", [*pairs(), {"prompt": "a", "chosen": "", "rejected": "b"}])
    found = asked(capsys, "split", path, "--to", str(tmp_path / "new"), "--heldout", "2", "--drop-bad-rows")
    assert found["unusable"] == {"empty answer": 1} and found["train"]["rows"] + found["test"]["rows"] == 20
