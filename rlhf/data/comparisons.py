"""The text that a pairwise ranker reads: a prompt and two answers to it, of which the first may be the better one.

    [CONTEXT] prompt [RESPONSE A] one answer [RESPONSE B] another

as in SLiC-HF (arXiv 2305.10425) and RSO (arXiv 2309.06657), where a text-to-text model then writes A or B; here the
logit of A is the score at the text's last token. Training and judging build the text here and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rlhf.data.conversations import Content
from rlhf.data.examples import Example
from rlhf.data.prompts import encode
from rlhf.data.turns import Segment, answer_tokens, spoken_text
from rlhf.evaluation.heldout import prompt_as_text
from rlhf.experience import Ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def context_text(content: Content) -> str:
    return f"[CONTEXT] {prompt_as_text(content)}"


def responses_text(first: str, second: str) -> str:
    return f" [RESPONSE A] {first} [RESPONSE B] {second}"


def as_comparison(example: Example) -> Example:
    """A preference as two texts to tell apart: the chosen answer shown first, and shown second."""
    chosen, rejected = (spoken_text(answer) for answer in example.answers)
    texts = (responses_text(chosen, rejected), responses_text(rejected, chosen))
    return replace(example, format="preference", content=context_text(example.content), answers=texts)


def comparison_ids(
    content: Content, first: str, second: str, tokenizer: "PreTrainedTokenizerBase", stop_ids: Sequence[int]
) -> Ids:
    """The tokens (T,) of a comparison as a row of the data has them, its end-of-sequence token last."""
    (context,) = encode([context_text(content)], tokenizer, encoder=False)  # rankers are decoder-only
    responses = answer_tokens([Segment(responses_text(first, second), True)], tokenizer, stop_ids)
    return np.concatenate([np.array(context, dtype=np.int32), responses.token_ids])
