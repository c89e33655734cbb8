"""The rows of a run on preferences or demonstrations as groups of tokens, and the generator that looks them up.

`OfflineSet` is to such a run what `PromptSet` is to one that samples: a prompt id names the same row in every process.
`DatasetGenerator` stands where a rollout engine stands elsewhere, so that offline data enters the buffer through the
same door. It holds no policy; its groups have no version and never age."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rlhf.buffer.offline import Completion, dataset_group
from rlhf.buffer.samplers import order
from rlhf.config import DataConfig, RecordKind, RunConfig
from rlhf.data.comparisons import as_comparison
from rlhf.data.conversations import Content, Message, render, shown
from rlhf.data.examples import CONTRADICTED, EMPTY, EQUAL, Example, UnusableRow, counted, dialogue, read_examples
from rlhf.data.prompts import NAMED_IN_ERRORS, REPEATED, TOO_LONG, cut, encode, key_of
from rlhf.data.records import Record, load_rows
from rlhf.data.turns import AnswerTokens, Segment, answer_tokens, as_messages, ended, segments, spoken_text
from rlhf.errors import BadInput
from rlhf.experience import Group, Ids, Prompt, Sampling
from rlhf.weights import Receipt, Weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER_TOO_LONG = "answer too long"


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """A usable row: what every issue of it holds. key, the hash of its prompt."""

    example: Example
    key: str
    text: str
    token_ids: Ids
    completions: tuple[Completion, ...]

    @property
    def longest(self) -> int:
        return len(self.token_ids) + max(len(completion.token_ids) for completion in self.completions)


class OfflineSet:
    """The preferences or demonstrations of a run. Immutable; `prompt` is a pure function of the id.

    dropped, how many rows were left out, by reason. fingerprint, a hash of rows, settings and token ids: a resumed run
    must find the same. stop_ids, every token that ends a completion of the model; encoder, whether an encoder
    reads the prompts; left_out, hashes of prompts whose rows are not used."""

    def __init__(
        self,
        records: Sequence[Record],
        kind: RecordKind,
        tokenizer: "PreTrainedTokenizerBase",
        stop_ids: Sequence[int],
        config: DataConfig,
        seed: int,
        *,
        encoder: bool,
        left_out: Collection[str],
    ) -> None:
        examples, self.dropped = read_examples(records, config, kind)
        if kind == "comparisons":  # their text is that of a ranker, whatever the model's template
            config = config.model_copy(update={"chat_template": False})
            examples = [as_comparison(example) for example in examples]
        items = _tokenised(examples, tokenizer, stop_ids, config, encoder=encoder)
        idle = {item.example.row: error for item in items if (error := _nothing_to_learn(item, tokenizer, stop_ids))}
        self.dropped += counted(list(idle.values()), len(items), config)
        items = [item for item in items if item.example.row not in idle]
        others = [item for item in items if item.key not in left_out]
        if len(others) < len(items):
            self.dropped[REPEATED] = len(items) - len(others)
        if not others:
            raise BadInput(f"data.path={config.path}: every row has the prompt of a held-out row")
        kept = _within_limits(others, tokenizer.bos_token_id, config, self.dropped)
        self._heldout, self._train = _split(kept, config)
        self._kind, self._seed, self._shuffle = kind, seed, config.shuffle
        self._by_row = {item.example.row: item for item in kept}
        self.fingerprint = _fingerprint(items, config)

    @classmethod
    def load(cls, config: RunConfig) -> "OfflineSet":
        """The rows of a run file; fetches or builds the model for its tokenizer. Raises BadInput."""
        return cls.of(config, config.data, config.records, frozenset())

    @classmethod
    def of(cls, config: RunConfig, data: DataConfig, kind: RecordKind, left_out: Collection[str]) -> "OfflineSet":
        """The same for rows that another section of the run file names."""
        from rlhf.models.load import load_tokenizer, stop_ids
        from rlhf.models.resolve import is_encoder_decoder, resolve

        records = load_rows(data)
        tokenizer = load_tokenizer(config.model.name, trust_remote_code=config.model.trust_remote_code)
        stops = stop_ids(resolve(config.model.name), tokenizer)
        # A reward model reads prompt and answer as one text, in its encoder too.
        encoder = is_encoder_decoder(config.model.name) and config.algorithm.name != "reward_model"
        return cls(records, kind, tokenizer, stops, data, config.seed, encoder=encoder, left_out=left_out)

    def __len__(self) -> int:
        """How many rows are trained on in one epoch."""
        return len(self._train)

    def prompt(self, prompt_id: int) -> Prompt:
        """The prompt with this id: ids count up over epochs, each epoch holds every training row once."""
        epoch, position = order(self._seed, len(self._train), prompt_id, shuffle=self._shuffle)
        return _prompt(self._train[position], prompt_id, epoch)

    def group(self, prompt: Prompt) -> Group:
        """The row of this prompt: answers with ranks, or a demonstration."""
        return dataset_group(prompt, self._by_row[prompt.row].completions)

    def heldout_prompts(self) -> list[Prompt]:
        """The prompts set aside, in the order of their rows. Their ids are -1, -2, ...: they are not in the ledger."""
        return [_prompt(item, -1 - number, 0) for number, item in enumerate(self._heldout)]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its longest answer, held-out ones included."""
        return max(item.longest for item in [*self._train, *self._heldout])

    def describe(self) -> str:
        """One line for a person: how many rows there are, and what became of the others."""
        lengths = [item.longest for item in [*self._train, *self._heldout]]
        parts = [f"{len(self._train)} {self._kind} to train on", f"{len(self._heldout)} held out"]
        parts += [f"{count} dropped ({reason})" for reason, count in self.dropped.items()]
        return ", ".join(parts) + f"; {min(lengths)} to {max(lengths)} tokens"


class Rows(Protocol):
    """Whoever knows the answers to a prompt."""

    def group(self, prompt: Prompt) -> Group: ...


class DatasetGenerator:
    """Looks groups up instead of sampling them: `load` and `sampling` mean nothing to it."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def setup(self) -> None:
        """Nothing to start."""

    def load(self, weights: Weights) -> Receipt:
        """A receipt for what it does not use: no version is stamped on a row of the data."""
        return Receipt("data", weights.version, weights.fingerprint, 0.0, 0.0)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int, purpose: str
    ) -> Iterator[Group]:
        """The group of each prompt, in order; how many samples it has is the data's affair."""
        return (self._rows.group(prompt) for prompt in prompts)

    def close(self) -> None:
        """Nothing to end."""


def _prompt(item: _Item, prompt_id: int, epoch: int) -> Prompt:
    example = item.example
    content = item.text if example.format == "text" else example.content
    return Prompt(prompt_id, example.row, epoch, content, item.text, item.token_ids, example.columns)


def _tokenised(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    stop_ids: Sequence[int],
    config: DataConfig,
    *,
    encoder: bool,
) -> list[_Item]:
    templated = tokenizer.chat_template is not None and config.chat_template
    rendered = [_rendered(example, tokenizer, config, templated) for example in examples]
    ids = encode([text for text, _ in rendered], tokenizer, encoder=encoder)
    items = []
    for example, (text, pieces), tokens in zip(examples, rendered, ids, strict=True):
        if example.format == "text":
            if encoder:
                raise BadInput(
                    f"{example.record.place}: a text to learn as a whole has no prompt for this model's encoder; "
                    "expected prompts with completions"
                )
            answers = [_all_but_the_first(ended(tokens, tokenizer.eos_token_id, stop_ids))]
            tokens = tokens[:1]
            text = str(tokenizer.decode(tokens))
        else:
            answers = [answer_tokens(answer, tokenizer, stop_ids) for answer in pieces]
        if not tokens:
            raise BadInput(f"{example.record.place}: the prompt becomes no tokens: {text!r}")
        said = [spoken_text(answer) for answer in example.answers or (example.content,)]
        ranks = example.ranks or (None,)
        completions = tuple(Completion(*a, t, rank) for a, t, rank in zip(answers, said, ranks, strict=True))
        prompt_ids = np.array(tokens, dtype=np.int32)
        items.append(_Item(example, key_of(example.content), text, prompt_ids, completions))
    return items


def _nothing_to_learn(item: _Item, tokenizer: "PreTrainedTokenizerBase", stop_ids: Sequence[int]) -> UnusableRow | None:
    """What only tokens show: an answer without a word, or answers of different rank that the model cannot tell apart.

    Texts that differ may become the same tokens: blanks that a template strips, an end-of-sequence token in the text.
    """
    example, answers = item.example, item.completions
    silent = {tokenizer.eos_token_id, *stop_ids}
    for answer in answers:
        trained = answer.token_ids[answer.loss_mask].tolist()
        if example.format == "text":  # its first token stands where others have a prompt
            trained = [token for token in (*item.token_ids.tolist(), *trained) if token != tokenizer.bos_token_id]
        if silent.issuperset(trained):
            return UnusableRow(example.record, EMPTY, f"{shown(answer.text)} becomes no token before its end")
    for number, answer in enumerate(answers):
        for other in answers[:number]:
            if answer.rank != other.rank and np.array_equal(answer.token_ids, other.token_ids):
                reason = CONTRADICTED if example.format == "ranked" else EQUAL
                both = f"{shown(other.text)} and {shown(answer.text)} become the same tokens"
                return UnusableRow(example.record, reason, both)
    return None


def _rendered(
    example: Example, tokenizer: "PreTrainedTokenizerBase", config: DataConfig, templated: bool
) -> tuple[str, list[list[Segment]]]:
    """The prompt's text, and for each answer what is behind it. A text to learn as a whole has no answer."""
    if example.format == "text":
        return str(example.content), []
    if not templated or (example.format == "implicit_preference" and isinstance(example.content, str)):
        return _as_it_stands(example, tokenizer, config, templated)
    messages = as_messages(example.content, "user")
    return _through_template(example, messages, example.answers, tokenizer, config)


def _as_it_stands(
    example: Example, tokenizer: "PreTrainedTokenizerBase", config: DataConfig, templated: bool
) -> tuple[str, list[list[Segment]]]:
    """Text without a template; a dialogue of one string becomes messages where there is one."""
    spoken = dialogue(str(example.content)) if templated else None
    if spoken:
        answers = [str(answer).strip() for answer in example.answers]
        return _through_template(example, spoken, answers, tokenizer, config)
    plain = config.model_copy(update={"chat_template": False})
    text = render(example.content, example.record, tokenizer, plain)
    if not all(isinstance(answer, str) for answer in example.answers):
        raise BadInput(
            f"{example.record.place}: the answer holds messages, and no chat template is used; expected text"
        )
    return text, [[Segment(str(answer), True)] for answer in example.answers]


def _through_template(
    example: Example,
    messages: list[Message],
    answers: Sequence[Content],
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig,
) -> tuple[str, list[list[Segment]]]:
    text = render(messages, example.record, tokenizer, config)
    if config.system_prompt is not None:
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    return text, [segments(messages, as_messages(a, "assistant"), tokenizer, example.record) for a in answers]


def _all_but_the_first(tokens: Sequence[int]) -> AnswerTokens:
    """The first token of a text has nothing before it to be predicted from."""
    return AnswerTokens(np.array(tokens[1:], dtype=np.int32), np.ones(len(tokens) - 1, dtype=np.bool_))


def _within_limits(items: list[_Item], bos: int | None, config: DataConfig, dropped: Counter[str]) -> list[_Item]:
    """The rows that can be used, counting the others; a prompt is cut once, for all its answers. Raises BadInput."""
    over = {item.example.row: reason for item in items if (reason := _over(item, config))}
    if over and config.too_long == "refuse":
        raise BadInput(_refusal([item for item in items if item.example.row in over], len(items), config))
    kept = []
    for item in items:
        reason = over.get(item.example.row)
        if reason == TOO_LONG and config.too_long == "truncate":
            shorter = cut(item.token_ids.tolist(), config.max_prompt_tokens, bos)
            kept.append(_Item(item.example, item.key, item.text, np.array(shorter, np.int32), item.completions))
        elif reason:
            dropped[reason] += 1
        else:
            kept.append(item)
    if not kept:
        raise BadInput(
            f"data.path={config.path}: all {len(items)} rows are over data.max_prompt_tokens="
            f"{config.max_prompt_tokens} or data.max_completion_tokens={config.max_completion_tokens}"
        )
    return kept


def _over(item: _Item, config: DataConfig) -> str | None:
    if any(len(completion.token_ids) > config.max_completion_tokens for completion in item.completions):
        return ANSWER_TOO_LONG
    return TOO_LONG if len(item.token_ids) > config.max_prompt_tokens else None


def _refusal(over: Sequence[_Item], rows: int, config: DataConfig) -> str:
    named = "; ".join(
        f"{item.example.record.place} has {len(item.token_ids)} tokens and an answer of "
        f"{item.longest - len(item.token_ids)}"
        for item in over[:NAMED_IN_ERRORS]
    )
    more = f"; and {len(over) - NAMED_IN_ERRORS} more" if len(over) > NAMED_IN_ERRORS else ""
    return (
        f"{len(over)} of {rows} rows are over data.max_prompt_tokens={config.max_prompt_tokens} or "
        f"data.max_completion_tokens={config.max_completion_tokens}: {named}{more}. Raise the limit, or set "
        "data.too_long to drop or truncate"
    )


def _split(items: Sequence[_Item], config: DataConfig) -> tuple[list[_Item], list[_Item]]:
    """Held-out and training rows: all rows of a prompt fall on one side."""
    keys = sorted({item.key for item in items})
    if config.heldout >= len(keys):
        raise BadInput(
            f"data.heldout={config.heldout} leaves nothing to train on: {config.path} has {len(keys)} distinct usable "
            "prompts"
        )
    chosen = set(keys[: config.heldout])
    return [item for item in items if item.key in chosen], [item for item in items if item.key not in chosen]


def _fingerprint(items: Sequence[_Item], config: DataConfig) -> str:
    digest = hashlib.blake2b(digest_size=16)
    settings = config.model_dump(mode="json", exclude={"path", "split"})  # the same rows elsewhere are the same data
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for item in items:
        tokens = [item.token_ids.tolist(), *(c.token_ids.tolist() for c in item.completions)]
        columns = dict(item.example.record.columns)
        digest.update(json.dumps([item.example.row, columns, tokens], sort_keys=True, default=repr).encode())
    return digest.hexdigest()
