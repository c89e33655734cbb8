"""The prompts of a run: rows become token ids, some are set aside, and a prompt id always names the same prompt.

`PromptSet` is built the same way by every process from the same rows, tokenizer and settings; `fingerprint` proves it.
Rows that cannot be used are refused by place, those over the length limit are dropped and counted, refused or cut as
the run file says. Preferences and demonstrations: `offline`."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.buffer.samplers import order
from rlhf.config import DataConfig, RunConfig
from rlhf.data.conversations import Content, content_of, render
from rlhf.data.records import Record, load_rows
from rlhf.errors import BadInput
from rlhf.experience import Ids, Prompt
from rlhf.models.resolve import is_encoder_decoder, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED_IN_ERRORS = 5
TOO_LONG = "prompt too long"
REPEATED = "same prompt as a held-out one"


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """A usable row: its number in the data set (from 0), what it held, and what the policy sees."""

    row: int
    content: Content
    text: str
    token_ids: Ids
    columns: Mapping[str, Any]


class PromptSet:
    """The prompts of a run. Immutable; `prompt` is a pure function of the id. encoder, whether an encoder reads them.

    dropped, how many rows were left out, by reason. fingerprint, a hash of rows, settings and token ids: a resumed run
    must find the same."""

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: "PreTrainedTokenizerBase",
        config: DataConfig,
        seed: int,
        *,
        encoder: bool,
    ) -> None:
        contents = [content_of(record, config.prompt_column) for record in records]
        texts = [render(content, record, tokenizer, config) for content, record in zip(contents, records, strict=True)]
        ids = encode(texts, tokenizer, encoder=encoder)
        self.dropped: dict[str, int] = {}
        kept = _within_limit(ids, records, tokenizer, config)
        if len(kept) < len(records):
            self.dropped[TOO_LONG] = len(records) - len(kept)
        if not kept:
            raise BadInput(
                f"data.path={config.path}: all {len(records)} prompts are over data.max_prompt_tokens="
                f"{config.max_prompt_tokens} (the shortest has {min(map(len, ids))} tokens)"
            )
        items = [
            _item(row, contents[row], texts[row], token_ids, records[row], config, tokenizer)
            for row, token_ids in kept.items()
        ]
        self._heldout, self._train = _split(items, config)
        repeated = len(items) - len(self._heldout) - len(self._train)
        if repeated:
            self.dropped[REPEATED] = repeated
        self._seed, self._shuffle = seed, config.shuffle
        self.fingerprint = _fingerprint(records, ids, config)

    @classmethod
    def load(cls, config: RunConfig) -> "PromptSet":
        """The prompts of a run file; fetches or builds the model for its tokenizer. Raises BadInput."""
        from transformers import AutoTokenizer

        records = load_rows(config.data)
        folder = resolve(config.model.name)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code)
        encoder = is_encoder_decoder(config.model.name)
        return cls(records, tokenizer, config.data, config.seed, encoder=encoder)

    def __len__(self) -> int:
        """How many rows are trained on in one epoch."""
        return len(self._train)

    def prompt(self, prompt_id: int) -> Prompt:
        """The prompt with this id: ids count up over epochs, each epoch holds every training row once."""
        epoch, position = order(self._seed, len(self._train), prompt_id, shuffle=self._shuffle)
        return _prompt(self._train[position], prompt_id, epoch)

    def heldout_prompts(self) -> list[Prompt]:
        """The prompts set aside, in the order of their rows. Their ids are -1, -2, ...: they are not in the ledger."""
        return [_prompt(item, -1 - number, 0) for number, item in enumerate(self._heldout)]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, held-out ones included."""
        return max(len(item.token_ids) for item in [*self._train, *self._heldout])

    def describe(self) -> str:
        """One line for a person: how many prompts there are, and what became of the others."""
        lengths = [len(item.token_ids) for item in [*self._train, *self._heldout]]
        parts = [f"{len(self._train)} prompts to train on", f"{len(self._heldout)} held out"]
        parts += [f"{count} dropped ({reason})" for reason, count in self.dropped.items()]
        return ", ".join(parts) + f"; {min(lengths)} to {max(lengths)} tokens"


def _prompt(item: _Item, prompt_id: int, epoch: int) -> Prompt:
    return Prompt(prompt_id, item.row, epoch, item.content, item.text, item.token_ids, item.columns)


def encode(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, encoder: bool) -> list[list[int]]:
    """Token ids (no padding) with the BOS exactly once at the front, for tokenizers that put one there.

    The template may write a BOS, the tokenizer may add one, or both: only the result is looked at. What an encoder
    reads ends as the tokenizer ends a text (T5's with EOS); a decoder goes on with its prompt, so nothing is put there.
    """
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    if encoder and tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id:
        encoded = [[*ids, tokenizer.eos_token_id] for ids in encoded]
    bos = tokenizer.bos_token_id
    if bos is None:
        return encoded
    adds_bos = tokenizer("a")["input_ids"][0] == bos
    return [_with_one_bos(ids, bos, adds_bos) for ids in encoded]


def _with_one_bos(ids: list[int], bos: int, adds_bos: bool) -> list[int]:
    leading = 0
    while leading < len(ids) and ids[leading] == bos:
        leading += 1
    return [bos, *ids[leading:]] if leading or adds_bos else ids


def _within_limit(
    ids: Sequence[list[int]], records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", config: DataConfig
) -> dict[int, list[int]]:
    """Row number -> token ids of the rows that can be used."""
    limit = config.max_prompt_tokens
    longer = [row for row, tokens in enumerate(ids) if len(tokens) > limit]
    if longer and config.too_long == "refuse":
        named = "; ".join(f"{records[row].place} has {len(ids[row])} tokens" for row in longer[:NAMED_IN_ERRORS])
        more = f"; and {len(longer) - NAMED_IN_ERRORS} more" if len(longer) > NAMED_IN_ERRORS else ""
        raise BadInput(
            f"{len(longer)} of {len(ids)} prompts are longer than data.max_prompt_tokens={limit}: {named}{more}. "
            "Raise the limit, or set data.too_long to drop or truncate"
        )
    bos = tokenizer.bos_token_id
    if config.too_long == "truncate":
        return {row: cut(tokens, limit, bos) for row, tokens in enumerate(ids)}
    return {row: tokens for row, tokens in enumerate(ids) if len(tokens) <= limit}


def cut(tokens: list[int], limit: int, bos: int | None) -> list[int]:
    """The last `limit` tokens; a BOS at the front stays there."""
    if len(tokens) <= limit:
        return tokens
    if tokens[0] == bos and limit > 1:
        return [tokens[0], *tokens[len(tokens) - limit + 1 :]]
    return tokens[len(tokens) - limit :]


def _item(
    row: int,
    content: Content,
    text: str,
    token_ids: list[int],
    record: Record,
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
) -> _Item:
    if not token_ids:
        raise BadInput(f"{record.place}: column '{config.prompt_column}' becomes no tokens: {text!r}")
    columns = {name: value for name, value in record.columns.items() if name != config.prompt_column}
    return _Item(row, content, text, np.array(token_ids, dtype=np.int32), columns)


def _split(items: Sequence[_Item], config: DataConfig) -> tuple[list[_Item], list[_Item]]:
    """Held-out and training rows. Equal prompts fall on one side; the choice depends on nothing but the prompts."""
    keys = [key_of(item.content) for item in items]
    chosen = set(sorted(set(keys))[: config.heldout])
    if len(chosen) == len(set(keys)) or len(chosen) < config.heldout:
        raise BadInput(
            f"data.heldout={config.heldout} leaves nothing to train on: {config.path} has "
            f"{len(set(keys))} distinct usable prompts"
        )
    first: dict[str, _Item] = {}
    for key, item in zip(keys, items, strict=True):
        first.setdefault(key, item)
    heldout = [item for key, item in first.items() if key in chosen]
    return heldout, [item for key, item in zip(keys, items, strict=True) if key not in chosen]


def key_of(content: Content) -> str:
    """A hash of a prompt: equal prompts are kept on one side of every split."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=repr).encode(), digest_size=16).hexdigest()


def _fingerprint(records: Sequence[Record], ids: Sequence[list[int]], config: DataConfig) -> str:
    digest = hashlib.blake2b(digest_size=16)
    settings = config.model_dump(mode="json", exclude={"path", "split"})  # the same rows elsewhere are the same data
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for record, tokens in zip(records, ids, strict=True):
        digest.update(json.dumps([dict(record.columns), tokens], sort_keys=True, default=repr).encode())
    return digest.hexdigest()
