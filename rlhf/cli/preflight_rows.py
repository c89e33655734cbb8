"""The columns of the rows against those who read them: the buffer that keeps them, the algorithm, and the reward.

Imports neither torch nor ray nor transformers, and takes no tokenizer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.buffer.codec import check_json
from rlhf.config import DataConfig, RewardConfig, RewardModelConfig, RunConfig
from rlhf.config_reward import RewardSource
from rlhf.data.conversations import checked_messages, content_of, shown
from rlhf.data.examples import read_examples
from rlhf.data.records import Record, load_rows
from rlhf.errors import BadInput
from rlhf.judges.post import check_address, read_token
from rlhf.judges.reward_function import RESERVED, check_reward_function
from rlhf.models.score_head import check_reward_model

# A usable row and those of its columns that reach the buffer and the judges.
Row = tuple[Record, Mapping[str, Any]]


def usable_rows(config: RunConfig) -> list[Row]:
    """The rows of `data.path` that can be used. Raises BadInput."""
    records = load_rows(config.data)
    if config.records != "prompts":
        examples, _ = read_examples(records, config.data, config.records)
        return [(example.record, example.columns) for example in examples]
    column = config.data.prompt_column
    for record in records:
        content_of(record, column)
    return [(r, {name: value for name, value in r.columns.items() if name != column}) for r in records]


def check_columns(config: RunConfig, rows: Sequence[Row]) -> None:
    """Raises BadInput for a value that the buffer cannot keep, and for a margin that is no number."""
    for record, columns in rows:
        for name, value in columns.items():
            check_json(value, f"{record.place}: column '{name}'")
    if isinstance(config.algorithm, RewardModelConfig) and config.algorithm.margin_column is not None:
        name = config.algorithm.margin_column
        for record, columns in rows:
            value = _value(record, columns, name, "algorithm.margin_column")
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise BadInput(
                    f"{record.place}: column '{name}' (algorithm.margin_column) is {shown(value)}; expected a number"
                )


def check_reward(reward: RewardConfig, rows: Sequence[Row]) -> None:
    """Functions and the columns that they ask for, the config of reward models, addresses and tokens of servers, and
    the rows of the reference answers."""
    for key, source in reward.sources().items():
        if source.function is not None:
            _check_function(source.function, f"{key}.function", rows)
        if source.model is not None:
            check_reward_model(source.model, f"{key}.model", fetch=False)
        if source.ranker is not None:
            check_reward_model(source.ranker.model, f"{key}.ranker.model", fetch=False)
        if source.server is not None:
            check_address(source.server, f"{key}.server")
        if source.llm is not None:
            check_address(source.llm.address, f"{key}.llm.address")
        read_token(source.token_env, f"{key}.token_env")
        _check_opponents(key, source, rows)
    if reward.reference is not None:
        data = DataConfig(**reward.reference.model_dump(), format="prompt_completion", bad_rows="drop")
        try:
            read_examples(load_rows(data), data, "demonstrations")
        except BadInput as error:
            raise BadInput(f"reward.reference: {error}") from error


def _check_function(function: str, key: str, rows: Sequence[Row]) -> None:
    asked = check_reward_function(function, key)
    for record, columns in rows:
        if taken := sorted(RESERVED & set(columns)):
            raise BadInput(
                f"{record.place}: column '{taken[0]}' has the name of an argument of reward functions; rename it"
            )
        if twice := sorted(asked.by_place & set(columns)):
            raise BadInput(
                f"{key}: the first two arguments of {function} are given the prompts and completions, and one of them "
                f"has the name of a column, '{twice[0]}' of {record.place}; expected f(prompts, completions, **columns)"
            )
        if missing := sorted(asked.needs - set(columns)):
            raise BadInput(
                f"{key}: {function} asks for '{missing[0]}', which is no column of {record.place}; columns there: "
                f"{', '.join(sorted(columns)) or 'none'} (beside the prompt). Give the argument a default, or the row "
                "the column"
            )


def _check_opponents(key: str, source: RewardSource, rows: Sequence[Row]) -> None:
    """The answers of the data that a ranker or a language model compares with."""
    for name, judge in {"ranker": source.ranker, "llm": source.llm}.items():
        if judge is None or judge.against_column is None:
            continue
        where = f"{key}.{name}.against_column"
        for record, columns in rows:
            value = _value(record, columns, judge.against_column, where)
            if isinstance(value, list):
                checked_messages(value, f"{record.place}: column '{judge.against_column}'")
            elif not isinstance(value, str):
                raise BadInput(
                    f"{record.place}: column '{judge.against_column}' ({where}) is {shown(value)}; expected an answer"
                )


def _value(record: Record, columns: Mapping[str, Any], name: str, key: str) -> Any:
    if name not in columns:
        there = ", ".join(sorted(columns)) or "none"
        raise BadInput(f"{record.place}: no column '{name}' ({key}); columns there: {there}")
    return columns[name]
