"""Answers found in the data as tokens: the end-of-sequence token once, and the loss on the assistant's turns only.

A prompt is tokenised by itself, as in a rollout, and an answer by itself: what follows never changes the prompt's
tokens. With a chat template an answer is what the template writes behind the opening of the answer, found by rendering
each turn of the assistant with and without it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rlhf.data.conversations import Content, Message, written_by_template
from rlhf.data.records import Record
from rlhf.errors import BadInput
from rlhf.experience import Ids, Mask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Segment(NamedTuple):
    """A piece of a conversation behind the prompt; `trained` where the assistant says it."""

    text: str
    trained: bool


class AnswerTokens(NamedTuple):
    """token_ids (T,) int32 with the EOS last; loss_mask (T,) bool, true where the assistant speaks, EOS included."""

    token_ids: Ids
    loss_mask: Mask


def segments(
    prompt: Sequence[Message], answer: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", record: Record
) -> list[Segment]:
    """What the template writes behind the rendered prompt, cut at the assistant's turns.

    Raises BadInput when the template writes a turn in another way once more turns follow, or refuses the messages: then
    the tokens of a training row would not be those of a conversation with the policy.
    """
    said = written_by_template(prompt, tokenizer, record.place, opening=True)
    found: list[Segment] = []
    conversation = list(prompt)
    for number, message in enumerate(answer):
        if message["role"] == "assistant":
            opened = said if number == 0 else written_by_template(conversation, tokenizer, record.place, opening=True)
            closed = written_by_template([*conversation, message], tokenizer, record.place, opening=False)
            if not opened.startswith(said) or not closed.startswith(opened):
                raise BadInput(
                    f"{record.place}: the model's chat template writes a turn otherwise when it is followed by others, "
                    "so its loss mask cannot be told; expected a template that only adds. Next: data.chat_template="
                    "false with text, or another model"
                )
            if len(opened) > len(said):
                found.append(Segment(opened[len(said) :], False))
            found.append(Segment(closed[len(opened) :], True))
            said = closed
        conversation.append(message)
    return found


def answer_tokens(
    pieces: Sequence[Segment], tokenizer: "PreTrainedTokenizerBase", stop_ids: Sequence[int]
) -> AnswerTokens:
    """The segments' tokens behind one another, ending in exactly one end-of-sequence token.

    What a template writes behind the end of a turn (a line break) is context for the next turn, is not trained, and is
    left out at the very end: the policy never gets to say it. The last segment must be the assistant's.
    """
    ids: list[int] = []
    mask: list[bool] = []
    for number, piece in enumerate(pieces):
        tokens: list[int] = tokenizer(piece.text, add_special_tokens=False)["input_ids"]
        spoken = _spoken(tokens, tokenizer, stop_ids) if piece.trained else 0
        if number == len(pieces) - 1:
            tokens = ended(tokens[:spoken], tokenizer.eos_token_id, stop_ids)
            spoken = len(tokens)
        ids += tokens
        mask += [position < spoken for position in range(len(tokens))]
    return AnswerTokens(np.array(ids, dtype=np.int32), np.array(mask, dtype=np.bool_))


def ended(tokens: Sequence[int], eos: int, stop_ids: Sequence[int]) -> list[int]:
    """The tokens with one end-of-sequence token behind them, whether they had none, one or several."""
    said, ending = list(tokens), eos
    while said and said[-1] in stop_ids:
        ending = said.pop()
    return [*said, ending]


def as_messages(content: Content, role: str) -> list[Message]:
    """Messages as they are; a text becomes the one message of `role`."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def spoken_text(answer: Content) -> str:
    """What judges and people read of an answer: the assistant's turns."""
    if isinstance(answer, str):
        return answer
    return "\n".join(message["content"] for message in answer if message["role"] == "assistant")


def _spoken(tokens: list[int], tokenizer: "PreTrainedTokenizerBase", stop_ids: Sequence[int]) -> int:
    """How many tokens a turn of the assistant has, its end included; what is blank behind it is the template's."""
    ends = [position for position, token in enumerate(tokens) if token in stop_ids]
    if ends and not str(tokenizer.decode(tokens[ends[-1] + 1 :], skip_special_tokens=True)).strip():
        return ends[-1] + 1
    return len(tokens)
