"""Columns of the data against those who read them, before anything starts. Not covered: the real command line
(test_cli_bad_input.py)."""

import datetime
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli.preflight_rows import check_columns, check_reward
from rlhf.config import RewardConfig, RunConfig
from rlhf.data.records import Record
from rlhf.errors import BadInput
from rlhf.judges.language_model import LanguageModelJudge
from rlhf.judges.reward_server import RewardServerJudge

FUNCTION = "def score(prompts, completions, answer, weight=1.0):\n    return [0.0] * len(completions)\n"


def run_file(**changes: Any) -> RunConfig:
    sections = {
        "model": {"name": "tiny"},
        "algorithm": {"name": "reward_model", "margin_column": "margin"},
        "data": {"path": "rows.jsonl"},
        "loop": {"num_steps": 1, "groups_per_step": 1},
    }
    return RunConfig.model_validate({**sections, **changes})


def rows(*columns: dict[str, Any]) -> list[tuple[Record, dict[str, Any]]]:
    return [(Record(row, "rows.jsonl", number), row) for number, row in enumerate(columns, start=1)]


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({"margin": 1, "when": datetime.date(2026, 1, 1)}, r"rows.jsonl:2: column 'when': cannot be kept"),
        ({"margin": 1, "deep": [{"x": b"y"}]}, r"rows.jsonl:2: column 'deep'\[0\]\['x'\]: cannot be kept"),
        ({"margin": "1"}, r"rows.jsonl:2: column 'margin' \(algorithm.margin_column\) is '1'; expected a number"),
        ({"margin": None}, "is None; expected a number"),
        ({"margin": float("nan")}, "is nan; expected a number"),
        ({}, r"rows.jsonl:2: no column 'margin' \(algorithm.margin_column\); columns there: none"),
    ],
)
def test_columns_that_cannot_be_kept_or_are_no_margin(second: dict[str, Any], expected: str) -> None:
    check_columns(run_file(), rows({"margin": 0.5, "kind": None}))
    with pytest.raises(BadInput, match=expected):
        check_columns(run_file(), rows({"margin": 0.5}, second))


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({"answer": "x", "completions": "y"}, "rows.jsonl:2: column 'completions' has the name of an argument"),
        ({"reply": "x"}, r"reward.function: .* asks for 'answer', which is no column of rows.jsonl:2; .*there: reply"),
    ],
)
def test_columns_and_arguments_of_a_function(tmp_path: Path, second: dict[str, Any], expected: str) -> None:
    (tmp_path / "reward.py").write_text(FUNCTION)
    reward = RewardConfig(function=f"{tmp_path / 'reward.py'}:score")
    check_reward(reward, rows({"answer": "x"}, {"answer": None, "kind": 1}))
    with pytest.raises(BadInput, match=expected):
        check_reward(reward, rows({"answer": "x"}, second))


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({}, r"rows.jsonl:2: no column 'theirs' \(reward.llm.against_column\)"),
        ({"theirs": 3}, r"rows.jsonl:2: column 'theirs' \(reward.llm.against_column\) is 3; expected an answer"),
        ({"theirs": [{"role": "assistant"}]}, "rows.jsonl:2: column 'theirs', message 0: no content"),
    ],
)
def test_answers_to_compare_with(second: dict[str, Any], expected: str) -> None:
    judge = {"address": "http://127.0.0.1:1/v1", "model": "m", "style": "pairwise", "against_column": "theirs"}
    reward = RewardConfig.model_validate({"llm": judge})
    check_reward(reward, rows({"theirs": "x"}, {"theirs": [{"role": "assistant", "content": "x"}]}))
    with pytest.raises(BadInput, match=expected):
        check_reward(reward, rows({"theirs": "x"}, second))


@pytest.mark.parametrize(
    "address",
    [
        "http://host:99999/",
        "http://host:port/",
        "http://host:0/",
        "http://a..b/",
        "http://host/é",
        "http://host/?q=a b",
    ],
)
@pytest.mark.parametrize("kind", ["server", "llm"])
def test_an_address_that_cannot_be_asked(tmp_path: Path, kind: str, address: str) -> None:
    """Before the run and, for whoever comes another way, at the judge's set-up. A name outside ASCII is fine."""
    for good in ("http://[::1]:8000/v1", "https://bücher.example/%C3%A9?v=1"):
        check_reward(RewardConfig.model_validate({kind: settings(kind, good)}), [])
    source = RewardConfig.model_validate({kind: settings(kind, address)})
    with pytest.raises(BadInput, match=rf"^reward.{kind}.*=.*http://"):
        check_reward(source, [])
    judge = RewardServerJudge(source, "reward") if kind == "server" else LanguageModelJudge(source, "reward", tmp_path)
    with pytest.raises(BadInput, match=rf"^reward.{kind}.*=.*http://"):
        judge.setup()


def settings(kind: str, address: str) -> Any:
    return address if kind == "server" else {"address": address, "model": "m"}


def test_a_column_with_the_name_of_an_argument_by_place(tmp_path: Path) -> None:
    """Python would say so at the first group: multiple values for an argument. By place alone there is no clash."""
    (tmp_path / "reward.py").write_text("def f(questions, answer, **kw): ...\ndef g(questions, answer, /, **kw): ...\n")
    check_reward(RewardConfig(function=f"{tmp_path / 'reward.py'}:g"), rows({"answer": "x"}))
    reward = RewardConfig(function=f"{tmp_path / 'reward.py'}:f")
    check_reward(reward, rows({"reply": "x"}))
    with pytest.raises(BadInput, match=r"reward.function: .*name of a column, 'answer' of rows.jsonl:2; expected f"):
        check_reward(reward, rows({"reply": "x"}, {"answer": "x"}))
