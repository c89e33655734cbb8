"""Rows of preferences and demonstrations: what they are, where a prompt ends, which rows are refused or dropped.

Not covered: hub data sets, which need a network.
"""

from pathlib import Path
from typing import Any

import pytest

from rlhf.config import DataConfig, RecordKind
from rlhf.data.examples import EMPTY, EQUAL, NO_TURN, TWO_PROMPTS, Example, dialogue, format_of, read_examples
from rlhf.data.records import Record, load_rows
from rlhf.errors import BadInput

HH_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "hh_harmless"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def settings(**changes: Any) -> DataConfig:
    return DataConfig(**{"path": "given", **changes})


def read(kind: RecordKind, *columns: dict[str, Any], **changes: Any) -> list[Example]:
    records = [Record(row, "rows.jsonl", number + 1) for number, row in enumerate(columns)]
    return read_examples(records, settings(**changes), kind)[0]


def test_a_dialogue_ends_its_prompt_at_the_last_assistant_and_not_at_the_last_common_letter() -> None:
    """Trap 73: both answers begin with "I can", and an answer may speak of other assistants in its middle."""
    before = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Can you?\n\nAssistant:"
    (example,) = read("preferences", {"chosen": f"{before} I can help", "rejected": f"{before} I cannot"})
    assert example.content == before
    assert example.answers == (" I can help", " I cannot")
    assert dialogue(before) == [said("user", "Hi"), said("assistant", "Hello"), said("user", "Can you?")]


def test_conversations_share_their_leading_messages() -> None:
    """Two answers with the same first words stay whole; other columns stay, the two sides do not."""
    shared = [said("system", "Be kind."), said("user", "Can you?")]
    row = {
        "chosen": [*shared, said("assistant", "I can help")],
        "rejected": [*shared, said("assistant", "I cannot")],
        "score": 3,
    }
    (example,) = read("preferences", row)
    assert example.content == shared and dict(example.columns) == {"score": 3}
    assert example.answers == ([said("assistant", "I can help")], [said("assistant", "I cannot")])


def test_a_prompt_beside_whole_conversations_must_be_theirs() -> None:
    """The form of UltraFeedback: a string, and conversations that begin with it."""
    sides = {name: [said("user", "Q"), said("assistant", name)] for name in ("chosen", "rejected")}
    (example,) = read("preferences", {"prompt": "Q", **sides})
    assert example.content == [said("user", "Q")] and example.answers[0] == [said("assistant", "chosen")]
    with pytest.raises(BadInput, match=rf"rows.jsonl:1: {TWO_PROMPTS}: column 'prompt' is 'Another'"):
        read("preferences", {"prompt": "Another", **sides})


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("preferences", {"prompt": "a", "chosen": "b", "rejected": "c", "messages": []}, "preference"),
        ("preferences", {"chosen": "b", "rejected": "c"}, "implicit_preference"),
        ("demonstrations", {"prompt": "a", "completion": "b", "text": "c"}, "prompt_completion"),
        ("demonstrations", {"messages": [], "chosen": "b", "rejected": "c"}, "messages"),
        ("demonstrations", {"text": "a"}, "text"),
    ],
)
def test_the_format_is_told_from_the_columns_and_the_need(kind: RecordKind, row: dict[str, Any], expected: str) -> None:
    assert format_of(Record(row, "rows.jsonl", 1), settings(), kind) == expected


@pytest.mark.parametrize(
    ("kind", "row", "changes", "expected"),
    [
        ("preferences", {"prompt": "a", "completion": "b"}, {}, "rows.jsonl:1: .*chosen, rejected.*algorithm.name=sft"),
        ("preferences", {"prompt": "a", "chosen": "b"}, {}, "columns there: chosen, prompt"),
        ("demonstrations", {"prompt": "a", "chosen": "b", "rejected": "c"}, {}, "data.completion_column=chosen"),
        ("demonstrations", {"text": "a"}, {"format": "preference"}, "data.format=preference: .*demonstrations"),
        ("demonstrations", {"text": "a"}, {"format": "messages"}, "rows.jsonl:1: no column 'messages'"),
        ("preferences", {"prompt": "a", "chosen": "b", "rejected": 3}, {}, r"column 'rejected' is a int \(3\)"),
        ("preferences", {"prompt": "a", "chosen": "b", "rejected": [{"role": "x"}]}, {}, "message 0: no content"),
        ("preferences", {"chosen": "no marks here", "rejected": "none"}, {}, "where the prompt ends"),
        ("preferences", {"chosen": "a", "rejected": [said("user", "b")]}, {}, "one of chosen and rejected is text"),
        (
            "demonstrations",
            {"prompt": "a", "completion": [said("user", "a"), said("assistant", "b")]},
            {},
            "data.format=messages",
        ),
    ],
)
def test_rows_of_another_form_are_refused_whatever_the_settings(
    kind: RecordKind, row: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    """data.bad_rows=drop does not drop them: a missing column is a mistake in the run file."""
    with pytest.raises(BadInput, match=expected):
        read(kind, row, bad_rows="drop", **changes)


GOOD_PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
USER, REPLY = said("user", "q"), said("assistant", "r")


@pytest.mark.parametrize(
    ("kind", "good", "bad", "reason"),
    [
        ("preferences", GOOD_PAIR, {**GOOD_PAIR, "rejected": "b"}, EQUAL),
        ("preferences", GOOD_PAIR, {**GOOD_PAIR, "chosen": " \n"}, EMPTY),
        ("preferences", GOOD_PAIR, {**GOOD_PAIR, "rejected": None}, EMPTY),
        ("preferences", GOOD_PAIR, {**GOOD_PAIR, "rejected": []}, EMPTY),
        (
            "preferences",
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: z\n\nAssistant: c"},
            TWO_PROMPTS,
        ),
        (
            "preferences",
            {"chosen": [USER, REPLY], "rejected": [USER, said("assistant", "s")]},
            {"chosen": [USER, REPLY], "rejected": [said("user", "p"), REPLY]},
            TWO_PROMPTS,
        ),
        (
            "preferences",
            {"chosen": [USER, REPLY], "rejected": [USER, said("assistant", "s")]},
            {"chosen": [USER, REPLY], "rejected": [USER, REPLY, USER, REPLY]},
            TWO_PROMPTS,
        ),
        ("demonstrations", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}, EMPTY),
        ("demonstrations", {"messages": [USER, REPLY]}, {"messages": [USER, said("assistant", " ")]}, EMPTY),
        ("demonstrations", {"messages": [USER, REPLY]}, {"messages": [USER]}, NO_TURN),
        ("demonstrations", {"messages": [USER, REPLY]}, {"messages": [REPLY, USER]}, NO_TURN),
        ("demonstrations", {"text": "a"}, {"text": " "}, EMPTY),
    ],
)
def test_a_row_that_teaches_nothing_is_refused_or_dropped_and_counted(
    kind: RecordKind, good: dict[str, Any], bad: dict[str, Any], reason: str
) -> None:
    records = [Record(row, "rows.jsonl", number + 1) for number, row in enumerate([good, bad, good])]
    with pytest.raises(BadInput, match=rf"1 of 3 rows .*rows.jsonl:2: {reason}.*data.bad_rows=drop"):
        read_examples(records, settings(), kind)
    examples, dropped = read_examples(records, settings(bad_rows="drop"), kind)
    assert [example.row for example in examples] == [0, 2] and dropped == {reason: 1}
    with pytest.raises(BadInput, match="1 of 1 rows"):
        read_examples([Record(bad, "rows.jsonl", 1)], settings(bad_rows="drop", format=examples[0].format), kind)


@pytest.mark.skipif(not HH_FOLDER.is_dir(), reason="the data set of human dialogues is not here")
def test_real_dialogues_are_put_together_again() -> None:
    """Prompt and answer of every row are the row; few rows are unusable, and they are counted."""
    records = load_rows(settings(path=str(HH_FOLDER)))
    examples, dropped = read_examples(records, settings(bad_rows="drop"), "preferences")
    assert len(examples) + dropped.total() == len(records) and dropped.total() < 0.01 * len(records)
    for example in examples:
        columns = example.record.columns
        assert [example.content + answer for answer in example.answers] == [columns["chosen"], columns["rejected"]]
