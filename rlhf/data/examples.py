"""Rows of preferences and demonstrations, read and checked without a tokenizer: a prompt and the answers to it.

The column conventions are those of Hugging Face TRL, strings or lists of role/content messages. What the rows are is
settled once for the whole data set. A column that is missing or of another type is a BadInput; a row of the right form
that teaches nothing (equal answers or ranks, an empty answer, two prompts) is refused or dropped and counted, as
`data.bad_rows` says."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.config import DataConfig, RecordKind
from rlhf.data.conversations import Content, Message, checked_messages, refuse_answered, shown
from rlhf.data.records import Record
from rlhf.errors import BadInput

Format = Literal["prompt", "preference", "implicit_preference", "ranked", "prompt_completion", "messages", "text"]

FORMATS: Mapping[RecordKind, tuple[Format, ...]] = {
    "prompts": ("prompt",),
    "preferences": ("preference", "implicit_preference", "ranked"),
    "demonstrations": ("prompt_completion", "messages", "text"),
    "comparisons": ("preference", "implicit_preference"),
}
EMPTY = "empty answer"
EQUAL = "chosen equals rejected"
NO_ORDER = "no answer is ranked above another"
CONTRADICTED = "equal answers of different ranks"
TWO_PROMPTS = "prompts of the two sides differ"
NO_TURN = "no assistant turn to learn from"
PAIR_RANKS = (0.0, 1.0)  # of chosen and rejected
NAMED_IN_ERRORS = 5

# HH-RLHF writes a dialogue as one string; an answer may hold blank lines, so only these two words begin a turn.
ASSISTANT_MARK = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")


class UnusableRow(BadInput):
    """A row of the right form that teaches nothing; `reason` is what it is counted under."""

    def __init__(self, record: Record, reason: str, detail: str) -> None:
        super().__init__(f"{record.place}: {reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A row as read: `answers` are (chosen, rejected), those of a ranking, the one of a demonstration, or none where
    `content` is a text to learn as a whole. An answer is a string or the messages that go on from the prompt. ranks,
    one an answer where they are compared, the smallest is preferred; else none. row counts from 0."""

    record: Record
    row: int
    format: Format
    content: Content
    answers: tuple[Content, ...]
    ranks: tuple[float, ...]
    columns: Mapping[str, Any]


def fitting_formats(columns: Collection[str], config: DataConfig) -> list[Format]:
    """Every format that rows with these columns can be read as, the most telling one first."""
    prompt, completion, there = config.prompt_column, config.completion_column, set(columns)
    needed: list[tuple[Format, set[str]]] = [
        ("preference", {prompt, "chosen", "rejected"}),
        ("implicit_preference", {"chosen", "rejected"}),
        ("ranked", {prompt, "completions", "ranks"}),
        ("prompt_completion", {prompt, completion}),
        ("messages", {"messages"}),
        ("text", {"text"}),
        ("prompt", {prompt}),
    ]
    return [name for name, wanted in needed if wanted <= there]


def format_of(record: Record, config: DataConfig, kind: RecordKind) -> Format:
    """What all rows of the data set are, told from its first one. Raises BadInput when it does not fit `kind`."""
    wanted = FORMATS[kind]
    there = ", ".join(sorted(record.columns)) or "none"
    if config.format != "auto":
        if config.format not in wanted:
            expected = " or ".join(wanted)
            raise BadInput(f"data.format={config.format}: this algorithm learns from {kind}; expected {expected}")
        return config.format
    fitting = [name for name in fitting_formats(record.columns, config) if name in wanted]
    if not fitting:
        columns = {
            "prompts": config.prompt_column,
            "preferences": f"{config.prompt_column}, chosen, rejected; or chosen, rejected with the prompt in both; or "
            f"{config.prompt_column}, completions, ranks",
            "demonstrations": f"{config.prompt_column}, {config.completion_column}; or messages; or text",
            "comparisons": f"{config.prompt_column}, chosen, rejected; or chosen, rejected with the prompt in both",
        }[kind]
        raise BadInput(
            f"{record.place}: this algorithm learns from {kind}, which have the columns {columns}; columns there: "
            f"{there}.{_advice(record, kind)}"
        )
    return fitting[0]


def read_examples(
    records: Sequence[Record], config: DataConfig, kind: RecordKind
) -> tuple[list[Example], Counter[str]]:
    """The usable rows in their order, and how many were dropped, by reason. Raises BadInput, also for no usable row."""
    name = format_of(records[0], config, kind)
    read, unusable = sort_out(records, config, name)
    return read, counted(unusable, len(records), config)


def counted(unusable: Sequence[UnusableRow], rows: int, config: DataConfig) -> Counter[str]:
    """How many are left out, by reason. Raises BadInput where data.bad_rows refuses them, or no row is left."""
    if unusable and (config.bad_rows == "refuse" or len(unusable) == rows):
        named = "; ".join(str(error) for error in unusable[:NAMED_IN_ERRORS])
        more = f"; and {len(unusable) - NAMED_IN_ERRORS} more" if len(unusable) > NAMED_IN_ERRORS else ""
        remedy = "" if config.bad_rows == "drop" else ". Mend them, or set data.bad_rows=drop to leave them out"
        raise BadInput(f"{len(unusable)} of {rows} rows cannot be learnt from: {named}{more}{remedy}")
    return Counter(error.reason for error in unusable)


def sort_out(records: Sequence[Record], config: DataConfig, name: Format) -> tuple[list[Example], list[UnusableRow]]:
    """The rows read as this format, and those that teach nothing. Raises BadInput for a row of another form."""
    read: list[Example] = []
    unusable: list[UnusableRow] = []
    for row, record in enumerate(records):
        try:
            read.append(_READERS[name](record, row, config))
        except UnusableRow as error:
            unusable.append(error)
    return read, unusable


def dialogue(text: str) -> list[Message] | None:
    """The messages of a dialogue written as "\\n\\nHuman: … \\n\\nAssistant: …"; None when it is not one.

    An open "Assistant:" at the end is the answer to come and no message.
    """
    before, *parts = _TURN.split(text)
    if before.strip() or not parts:
        return None
    roles = ["user" if speaker == "Human" else "assistant" for speaker in parts[::2]]
    messages = [{"role": role, "content": said.strip()} for role, said in zip(roles, parts[1::2], strict=True)]
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages


def _preference(record: Record, row: int, config: DataConfig) -> Example:
    """prompt, chosen, rejected. The answers may be whole conversations that begin with the prompt."""
    prompt = _content(record, config.prompt_column)
    chosen, rejected = _content(record, "chosen"), _content(record, "rejected")
    if _whole(chosen) or _whole(rejected):
        shared, chosen, rejected = _divided(record, chosen, rejected)
        told = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        if told not in (shared, shared[-1:]):
            raise UnusableRow(
                record,
                TWO_PROMPTS,
                f"column '{config.prompt_column}' is {shown(prompt)}, the conversations begin with {shown(shared)}",
            )
        prompt = shared
    return _pair(record, row, "preference", prompt, chosen, rejected, config.prompt_column)


def _implicit_preference(record: Record, row: int, config: DataConfig) -> Example:
    """chosen, rejected, each with the prompt in front."""
    prompt, chosen, rejected = _divided(record, _content(record, "chosen"), _content(record, "rejected"))
    return _pair(record, row, "implicit_preference", prompt, chosen, rejected, None)


def _pair(
    record: Record, row: int, name: Format, prompt: Content, chosen: Content, rejected: Content, column: str | None
) -> Example:
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadInput(f"{record.place}: one of chosen and rejected is text, the other messages; expected the same")
    _refuse_blank(record, prompt, "prompt")
    refuse_answered(prompt, f"{record.place}: column '{column or 'chosen'}'")
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        _refuse_blank(record, answer, side)
        _refuse_no_turn(record, answer, side)
    if chosen == rejected:
        raise UnusableRow(record, EQUAL, f"both are {shown(chosen)}")
    columns = _others(record, {column, "chosen", "rejected"})
    return Example(record, row, name, prompt, (chosen, rejected), PAIR_RANKS, columns)


def _ranked(record: Record, row: int, config: DataConfig) -> Example:
    """prompt, completions, ranks: two or more answers and a number for each; the smallest is preferred, and equal ones
    are not compared."""
    prompt = _content(record, config.prompt_column)
    given, numbers = (_listed(record, column) for column in ("completions", "ranks"))
    if len(given) != len(numbers):
        raise BadInput(f"{record.place}: {len(given)} completions and {len(numbers)} ranks; expected one for each")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise BadInput(f"{record.place}: column 'ranks' holds {shown(number)}; expected numbers")
    _refuse_blank(record, prompt, "prompt")
    refuse_answered(prompt, f"{record.place}: column '{config.prompt_column}'")
    answers, ranks = [], tuple(float(number) for number in numbers)
    for index, value in enumerate(given):
        where = f"completions[{index}]"
        answer = _checked(record, value, where)
        if _whole(answer):
            raise BadInput(f"{record.place}: '{where}' begins with a message of the user; expected the assistant's")
        _refuse_blank(record, answer, where)
        _refuse_no_turn(record, answer, where)
        answers.append(answer)
    if len({isinstance(answer, str) for answer in answers}) > 1:
        raise BadInput(f"{record.place}: some of the completions are text, others messages; expected the same")
    if len(set(ranks)) < 2:
        raise UnusableRow(record, NO_ORDER, f"the ranks are {shown(numbers)}")
    for index, answer in enumerate(answers):
        first = answers.index(answer)
        if ranks[first] != ranks[index]:
            detail = (
                f"completions[{first}] and [{index}] are {shown(answer)}, ranked {numbers[first]} and {numbers[index]}"
            )
            raise UnusableRow(record, CONTRADICTED, detail)
    columns = _others(record, {config.prompt_column, "completions", "ranks"})
    return Example(record, row, "ranked", prompt, tuple(answers), ranks, columns)


def _divided(record: Record, chosen: Content, rejected: Content) -> tuple[Content, Content, Content]:
    """The prompt that both sides share, and what is left of each.

    Strings: up to the LAST "Assistant:" of each side, never to the last common character, which would take the words
    with which both answers begin. Messages: the common leading ones.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        if chosen == rejected:
            raise UnusableRow(record, EQUAL, f"both are {shown(chosen)}")
        prompts, answers = zip(*(_split_dialogue(record, side) for side in (chosen, rejected)), strict=True)
        if prompts[0] != prompts[1]:
            ends = " and ".join(repr("…" + prompt[-60:]) for prompt in prompts)
            raise UnusableRow(record, TWO_PROMPTS, f"before the last 'Assistant:' stand {ends}")
        return prompts[0], answers[0], answers[1]
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise BadInput(f"{record.place}: one of chosen and rejected is text, the other messages; expected the same")
    return _divided_messages(record, chosen, rejected)


def _divided_messages(
    record: Record, chosen: list[Message], rejected: list[Message]
) -> tuple[Content, Content, Content]:
    if chosen == rejected:
        raise UnusableRow(record, EQUAL, f"both are {shown(chosen)}")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    prompt, left = chosen[:shared], (chosen[shared:], rejected[shared:])
    if not prompt or any(side and side[0]["role"] != "assistant" for side in left):
        raise UnusableRow(
            record, TWO_PROMPTS, f"{shared} leading messages are the same, and the next is not the assistant's"
        )
    if prompt[-1]["role"] == "assistant" or not all(left):
        raise UnusableRow(record, TWO_PROMPTS, "the sides differ only after an answer that both give")
    return prompt, left[0], left[1]


def _split_dialogue(record: Record, text: str) -> tuple[str, str]:
    at = text.rfind(ASSISTANT_MARK)
    if at < 0:
        raise BadInput(
            f"{record.place}: no {ASSISTANT_MARK!r} in {shown(text)}, so nothing says where the prompt ends; expected "
            "a column with the prompt, dialogues of that form, or messages"
        )
    end = at + len(ASSISTANT_MARK)
    return text[:end], text[end:]


def _prompt_completion(record: Record, row: int, config: DataConfig) -> Example:
    prompt, answer = _content(record, config.prompt_column), _content(record, config.completion_column)
    _refuse_blank(record, prompt, config.prompt_column)
    refuse_answered(prompt, f"{record.place}: column '{config.prompt_column}'")
    _refuse_blank(record, answer, config.completion_column)
    if _whole(answer):
        raise BadInput(
            f"{record.place}: column '{config.completion_column}' begins with a message of the user; expected the "
            "assistant's answer. For whole conversations: data.format=messages"
        )
    _refuse_no_turn(record, answer, config.completion_column)
    columns = _others(record, {config.prompt_column, config.completion_column})
    return Example(record, row, "prompt_completion", prompt, (answer,), (), columns)


def _messages(record: Record, row: int, config: DataConfig) -> Example:
    """A conversation: the prompt is what stands before the assistant's first turn, the rest is the answer."""
    conversation = _content(record, "messages")
    if isinstance(conversation, str):
        raise BadInput(f"{record.place}: column 'messages' is text; expected a list of role/content messages")
    roles = [message["role"] for message in conversation]
    first = roles.index("assistant") if "assistant" in roles else len(roles)
    if first in (0, len(roles)) or roles[-1] != "assistant":
        raise UnusableRow(
            record, NO_TURN, f"roles are {', '.join(roles)}; expected a prompt first and the assistant's turn last"
        )
    _refuse_blank(record, conversation[:first], "messages (before the assistant's first turn)")
    for message in conversation[first:]:
        if message["role"] == "assistant":
            _refuse_blank(record, message["content"], "messages (a turn of the assistant)")
    columns = _others(record, {"messages"})
    return Example(record, row, "messages", conversation[:first], (conversation[first:],), (), columns)


def _text(record: Record, row: int, config: DataConfig) -> Example:
    text = _content(record, "text")
    if not isinstance(text, str):
        raise BadInput(f"{record.place}: column 'text' holds messages; expected text, or data.format=messages")
    _refuse_blank(record, text, "text")
    return Example(record, row, "text", text, (), (), _others(record, {"text"}))


def _prompt(record: Record, row: int, config: DataConfig) -> Example:
    prompt = _content(record, config.prompt_column)
    _refuse_blank(record, prompt, config.prompt_column)
    return Example(record, row, "prompt", prompt, (), (), _others(record, {config.prompt_column}))


_READERS: Mapping[Format, Callable[[Record, int, DataConfig], Example]] = {
    "prompt": _prompt,
    "preference": _preference,
    "implicit_preference": _implicit_preference,
    "ranked": _ranked,
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "text": _text,
}


def _content(record: Record, column: str) -> Content:
    """Text or messages. Raises BadInput for a missing column or any other value."""
    return _checked(record, _value(record, column), column)


def _listed(record: Record, column: str) -> list[Any]:
    value = _value(record, column)
    if not isinstance(value, list):
        raise BadInput(
            f"{record.place}: column '{column}' is a {type(value).__name__} ({shown(value)}); expected a list"
        )
    return value


def _value(record: Record, column: str) -> Any:
    if column not in record.columns:
        there = ", ".join(sorted(record.columns)) or "none"
        raise BadInput(f"{record.place}: no column '{column}'; columns there: {there}")
    return record.columns[column]


def _checked(record: Record, value: Any, column: str) -> Content:
    where = f"{record.place}: column '{column}'"
    if value is None or value == []:
        raise UnusableRow(record, EMPTY, f"'{column}' is {value}")
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return checked_messages(value, where)
    raise BadInput(
        f"{where} is a {type(value).__name__} ({shown(value)}); expected text or a list of role/content messages"
    )


def _whole(answer: Content) -> bool:
    """Whether an answer is a conversation from its start on."""
    return isinstance(answer, list) and answer[0]["role"] != "assistant"


def _refuse_blank(record: Record, content: Content, where: str) -> None:
    said = [content] if isinstance(content, str) else [message["content"] for message in content]
    if not any(text.strip() for text in said):
        raise UnusableRow(record, EMPTY if where != "prompt" else "empty prompt", f"'{where}' is {shown(content)}")


def _refuse_no_turn(record: Record, answer: Content, where: str) -> None:
    if isinstance(answer, list) and answer[-1]["role"] != "assistant":
        raise UnusableRow(record, NO_TURN, f"'{where}' ends with a turn of the {answer[-1]['role']}")


def _others(record: Record, used: Collection[str | None]) -> Mapping[str, Any]:
    return {name: value for name, value in record.columns.items() if name not in used}


def _advice(record: Record, kind: RecordKind) -> str:
    there = set(record.columns)
    if kind == "demonstrations" and {"chosen", "rejected"} <= there:
        return " These are preferences; data.completion_column=chosen trains on the chosen answers"
    if kind in ("preferences", "comparisons") and ({"completion"} <= there or {"messages"} <= there):
        return " These are demonstrations, for algorithm.name=sft"
    return " Columns of other names: data.prompt_column, data.completion_column"
