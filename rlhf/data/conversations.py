"""What a row asks of the policy: the prompt column checked, and put through the tokenizer's chat template.

The column conventions are those of Hugging Face TRL: a prompt is a string or a list of role/content messages. A row of
another kind (preference, demonstration, plain text) is told so."""

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from rlhf.config import DataConfig
from rlhf.data.records import Record
from rlhf.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Content = str | list[Message]


def content_of(record: Record, column: str) -> Content:
    """The row's prompt: a string that is not blank, or messages that the policy can go on with. Raises BadInput."""
    if column not in record.columns:
        raise BadInput(_missing(record, column))
    value, where = record.columns[column], f"{record.place}: column '{column}'"
    if isinstance(value, str):
        if not value.strip():
            raise BadInput(f"{where} is empty; expected a prompt")
        return value
    if isinstance(value, list):
        return _to_be_answered(checked_messages(value, where), where)
    raise BadInput(
        f"{where} is a {type(value).__name__} ({shown(value)}); expected text or a list of role/content messages"
    )


def render(content: Content, record: Record, tokenizer: "PreTrainedTokenizerBase", config: DataConfig) -> str:
    """What is tokenised: the template's text with the opening of the answer, or the plain prompt.

    A plain prompt goes through the template when data.chat_template is on and the tokenizer has one.
    """
    templated = tokenizer.chat_template is not None and config.chat_template
    if not templated:
        lack = (
            "data.chat_template is false" if tokenizer.chat_template else "this model's tokenizer has no chat template"
        )
        if not isinstance(content, str):
            raise BadInput(f"{record.place}: column '{config.prompt_column}' holds messages, but {lack}; expected text")
        if config.system_prompt is not None:
            raise BadInput(f"data.system_prompt needs a chat template, but {lack}")
        return content
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    if config.system_prompt is not None:
        if messages[0]["role"] == "system":
            raise BadInput(
                f"{record.place}: column '{config.prompt_column}' starts with a system message, and data.system_prompt "
                "is set; expected one of the two"
            )
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    text = written_by_template(messages, tokenizer, record.place, opening=True)
    if not text.strip():
        raise BadInput(
            f"{record.place}: the model's chat template writes nothing for {shown(messages)}; expected one that "
            "holds the prompt, or data.chat_template=false"
        )
    return text


def written_by_template(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", place: str, *, opening: bool
) -> str:
    """The chat template's text of some messages, with the opening of an answer or without. Raises BadInput, with the
    place, where it refuses them: templates are programs of the models' makers, and fail in their own ways."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opening))
    except (TemplateError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise BadInput(f"{place}: the model's chat template refuses these messages: {error}") from error


def checked_messages(value: list[Any], where: str) -> list[Message]:
    """A list of role/content messages with text in both, as plain dictionaries. Raises BadInput, naming the message."""
    if not value:
        raise BadInput(f"{where} is an empty list; expected role/content messages")
    for number, message in enumerate(value):
        if not isinstance(message, Mapping):
            found = shown(message)
            raise BadInput(f"{where}, message {number}: found {found}; expected an object with role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = f"{key} is {shown(message[key])}" if key in message else f"no {key}, only {sorted(message)}"
                raise BadInput(f"{where}, message {number}: {found}; expected text")
    return [dict(message) for message in value]


def refuse_answered(prompt: Content, where: str) -> None:
    """Raises BadInput for messages whose last one is the assistant's: nothing is left to answer."""
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise BadInput(
            f"{where} ends with an assistant message, which is an answer; expected one that the policy is to answer"
        )


def _to_be_answered(messages: list[Message], where: str) -> list[Message]:
    refuse_answered(messages, where)
    if not any(message["content"].strip() for message in messages):
        raise BadInput(f"{where}: all messages are empty; expected a prompt")
    return messages


def _missing(record: Record, column: str) -> str:
    there = sorted(record.columns)
    message = f"{record.place}: no column '{column}' (data.prompt_column); columns there: {', '.join(there) or 'none'}"
    if {"chosen", "rejected"} <= set(there):
        return f"{message}. This is a preference row without its prompt; training on prompts needs them in a column"
    near = difflib.get_close_matches(column, there, n=1)
    if near:
        return f"{message}. Did you mean data.prompt_column={near[0]}?"
    if "messages" in there:
        return f"{message}. Conversations that end with the user's turn can be used with data.prompt_column=messages"
    if "text" in there:
        return f"{message}. If 'text' holds prompts, set data.prompt_column=text"
    return message


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
