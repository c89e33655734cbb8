"""Rows of two or more ranked answers: how they are read, what is refused, dropped and counted, what is shown of them.

Not covered: what is learnt from them (test_run_offline), how tokens are made (test_data_offline).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.cli.main import main
from rlhf.config import DataConfig
from rlhf.data.examples import CONTRADICTED, EMPTY, NO_ORDER, NO_TURN, Example, format_of, read_examples
from rlhf.data.offline import OfflineSet
from rlhf.data.records import Record
from rlhf.errors import BadInput
from rlhf.models.load import load_tokenizer

GOOD = {"prompt": "q", "completions": ["a", "b", "c"], "ranks": [2, 0, 2.0], "by": "someone"}
SAID = [{"role": "assistant", "content": "a"}]
ASKED = [{"role": "user", "content": "a"}]


def records(*rows: dict[str, Any]) -> list[Record]:
    return [Record(row, "rows.jsonl", number + 1) for number, row in enumerate(rows)]


def read(*rows: dict[str, Any], **changes: Any) -> list[Example]:
    return read_examples(records(*rows), DataConfig(path="given", **changes), "preferences")[0]


def test_answers_keep_their_order_and_their_ranks() -> None:
    """Ranks may be any numbers, with ties; columns that are not read reach the reward function."""
    (example,) = read(GOOD)
    assert example.format == "ranked" and example.content == "q"
    assert example.answers == ("a", "b", "c") and example.ranks == (2.0, 0.0, 2.0)
    assert dict(example.columns) == {"by": "someone"}


def test_a_pair_is_told_as_a_pair_where_a_row_has_both_forms() -> None:
    """`data.format=ranked` takes the other one."""
    both = {**GOOD, "chosen": "b", "rejected": "a"}
    (record,) = records(both)
    assert format_of(record, DataConfig(path="given"), "preferences") == "preference"
    assert read(both, format="ranked")[0].ranks == (2.0, 0.0, 2.0)


def test_two_ranked_answers_are_the_pair_they_stand_for() -> None:
    """Tokens, masks and ranks, up to the order in which the row names them."""
    sets = []
    for row in ({"prompt": "q", "chosen": "b", "rejected": "a"}, {"prompt": "q", "completions": "ab", "ranks": [1, 0]}):
        row = {**row, **({"completions": ["a", "b"]} if "ranks" in row else {})}
        tokenizer = load_tokenizer("tiny", trust_remote_code=False)
        config = DataConfig(path="given")
        sets.append(OfflineSet(records(row), "preferences", tokenizer, [2], config, 0, encoder=False, left_out=()))
    pair, ranked = (sorted(s.group(s.prompt(0)).samples, key=lambda each: each.scores["rank"] or 0) for s in sets)
    for given, other in zip(pair, ranked, strict=True):
        assert np.array_equal(given.token_ids, other.token_ids) and np.array_equal(given.loss_mask, other.loss_mask)
        assert given.scores == other.scores and given.text == other.text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ranks": [0, 1]}, "3 completions and 2 ranks"),
        ({"ranks": [0, 1, "2"]}, "column 'ranks' holds '2'; expected numbers"),
        ({"ranks": [0, 1, True]}, "column 'ranks' holds True"),
        ({"ranks": [0, 1, None]}, "column 'ranks' holds None"),
        ({"ranks": [0, 1, float("nan")]}, "column 'ranks' holds nan"),
        ({"ranks": 3}, r"column 'ranks' is a int \(3\); expected a list"),
        ({"completions": "abc"}, r"column 'completions' is a str \('abc'\); expected a list"),
        ({"completions": ["a", "b", 3]}, r"column 'completions\[2\]' is a int"),
        ({"completions": ["a", "b", SAID]}, "some of the completions are text, others messages"),
        ({"completions": [SAID, SAID, ASKED]}, r"'completions\[2\]' begins with a message of the user"),
    ],
)
def test_rows_of_another_form_are_refused_whatever_the_settings(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(BadInput, match=rf"rows.jsonl:1: {expected}"):
        read({**GOOD, **changes}, bad_rows="drop")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ranks": [1, 1, 1]}, NO_ORDER),
        ({"completions": ["a"], "ranks": [0]}, NO_ORDER),
        ({"completions": [], "ranks": []}, NO_ORDER),
        ({"completions": ["a", "b", "a"], "ranks": [0, 1, 2]}, CONTRADICTED),
        ({"completions": ["a", " \n", "c"]}, EMPTY),
        ({"completions": ["a", None, "c"]}, EMPTY),
        ({"prompt": " "}, "empty prompt"),
        ({"completions": [SAID, [*SAID, *ASKED], SAID], "ranks": [0, 1, 0]}, NO_TURN),
    ],
)
def test_a_row_that_teaches_nothing_is_refused_or_dropped_and_counted(changes: dict[str, Any], reason: str) -> None:
    rows = records(GOOD, {**GOOD, **changes}, GOOD)
    with pytest.raises(BadInput, match=rf"1 of 3 rows .*rows.jsonl:2: {reason}.*data.bad_rows=drop"):
        read_examples(rows, DataConfig(path="given"), "preferences")
    kept, dropped = read_examples(rows, DataConfig(path="given", bad_rows="drop"), "preferences")
    assert [example.row for example in kept] == [0, 2] and dropped == {reason: 1}


def test_the_same_answer_twice_at_one_rank_stays() -> None:
    (example,) = read({**GOOD, "completions": ["a", "b", "a"]})
    assert example.answers == ("a", "b", "a")


def test_a_pairwise_ranker_takes_pairs_only() -> None:
    with pytest.raises(BadInput, match="learns from comparisons, which have the columns prompt, chosen, rejected"):
        read_examples(records(GOOD), DataConfig(path="given"), "comparisons")


def test_they_are_shown_and_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**GOOD, "prompt": f"q {number}"} for number in range(4)] + [{**GOOD, "ranks": [0, 0, 0]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "show", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["format"] == "ranked" and shown["unusable"] == {NO_ORDER: 1}
    assert shown["lengths"].keys() == {"prompt", "completion"} and shown["lengths"]["completion"]["p99"] == 1
    split = ["data", "split", str(path), "--to", str(tmp_path / "halves"), "--heldout", "1", "--drop-bad-rows"]
    assert main(split) == 0
    halves = [(tmp_path / "halves" / name).read_text().splitlines() for name in ("train.jsonl", "test.jsonl")]
    assert sorted(map(json.loads, halves[0] + halves[1]), key=lambda row: str(row["prompt"])) == rows[:4]
