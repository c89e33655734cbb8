"""A language model as a judge, behind any OpenAI-compatible address: a number for an answer, or the better of two.

Asked at temperature 0 with a seed. What it said is kept by the content of the question (`AnswerStore`). A text without
a judgement is no judgement: None, counted, never a number, and not asked again, since it would be the same.
"""

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlhf.config import LlmConfig, RewardSource
from rlhf.data.turns import spoken_text
from rlhf.errors import JudgeFailed
from rlhf.evaluation.heldout import prompt_as_text
from rlhf.experience import REWARD, Columns, Group
from rlhf.judges.answers import ANSWERS_FILE, AnswerStore
from rlhf.judges.comparisons import LOSS, TIE, WIN, Outcome, both_orders, every_two, inconsistency, mean_worth
from rlhf.judges.patience import FAULTS, refuse_unscored
from rlhf.judges.post import ServerFailed, check_address, hidden, post_json, read_token

INCONSISTENT = f"{REWARD}/inconsistent"
UNPARSED = f"{FAULTS}judge_unparsed"
POINTWISE = """Rate the answer to the question below: how helpful, correct and clear it is, on a scale from 1 to 10. \
Longer is not better. Explain yourself in one or two sentences, then give the number in double square brackets, like \
this: [[5]]

[Question]
{prompt}

[Answer]
{completion}
[End]"""
PAIRWISE = """Two assistants answered the question below. Which answer is better: more helpful, more correct, clearer? \
Neither the order of the two nor their length matters. Explain yourself in one or two sentences, then give your \
verdict in double square brackets: [[A]] if the first is better, [[B]] if the second is, [[C]] for a tie.

[Question]
{prompt}

[Answer of assistant A]
{first}
[End]

[Answer of assistant B]
{second}
[End]"""
NUMBER_PATTERN = r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]"
VERDICT_PATTERN = r"\[\[\s*([ABCabc])\s*\]\]"
VERDICTS = {"A": WIN, "B": LOSS, "C": TIE}


class LanguageModelJudge:
    """Fills `reward`; the pairwise style also `reward/inconsistent`. Questions of a group are asked side by side.

    Raises JudgeFailed, with address and status, when the server gives no text; what was answered until then is kept.
    """

    def __init__(self, source: RewardSource, key: str, run_dir: Path) -> None:
        if source.llm is None:
            raise ValueError(f"{key}.llm is not set")
        self._settings, self._timeout_s = source.llm, source.timeout_s
        self._variable, self._key, self._file = source.token_env, key, run_dir / ANSWERS_FILE
        self._store: AnswerStore | None = None

    def setup(self) -> None:
        """Reads the token, opens the answers. Raises BadInput when the token's variable is not set, the address is none
        or the answers cannot be read."""
        check_address(self._settings.address, f"{self._key}.llm.address")
        self._token = read_token(self._variable, f"{self._key}.token_env")
        self._store = AnswerStore(self._file)

    def judge(self, group: Group) -> Columns:
        """The reward of each sample of the group."""
        texts = [sample.text for sample in group.samples]
        if self._settings.style == "pointwise":
            columns, unparsed = self._rated(group, texts)
        elif self._settings.against_column is None:
            columns, unparsed = self._compared(group, texts)
        else:
            columns, unparsed = self._against(group, texts, self._settings.against_column)
        refuse_unscored(group, Columns(group.prompt.id, columns, {}), "no text of the judge held a judgement")
        if unparsed:
            columns[UNPARSED] = [float(unparsed), *[0.0] * (len(texts) - 1)]
        return Columns(group.prompt.id, columns, {})

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    def _rated(self, group: Group, texts: Sequence[str]) -> tuple[dict[str, Sequence[float | None]], int]:
        said = self._ask(group, [{"completion": text} for text in texts])
        scores = [rating(text, self._settings) for text in said]
        return {REWARD: scores}, scores.count(None)

    def _compared(self, group: Group, texts: Sequence[str]) -> tuple[dict[str, Sequence[float | None]], int]:
        matches = every_two(texts)
        outcomes, unparsed = self._outcomes(group, [(texts[i], texts[j]) for i, j in matches])
        found = dict(zip(matches, outcomes, strict=True))
        columns = {REWARD: mean_worth(texts, found), INCONSISTENT: inconsistency(len(texts), found)}
        return dict(columns), unparsed

    def _against(
        self, group: Group, texts: Sequence[str], column: str
    ) -> tuple[dict[str, Sequence[float | None]], int]:
        other = group.prompt.columns.get(column)
        if not isinstance(other, str | list):
            raise self._failed(group, f"column {column!r} (llm.against_column) is {other!r}; expected an answer", False)
        opponent = spoken_text(other)
        different = [text for text in texts if text != opponent]
        outcomes, unparsed = self._outcomes(group, [(text, opponent) for text in different])
        left = iter(outcomes)
        found = [Outcome(TIE, False) if text == opponent else next(left) for text in texts]
        columns = {
            REWARD: [None if outcome is None else outcome.worth for outcome in found],
            INCONSISTENT: [None if outcome is None else float(outcome.inconsistent) for outcome in found],
        }
        return dict(columns), unparsed

    def _outcomes(self, group: Group, pairs: Sequence[tuple[str, str]]) -> tuple[list[Outcome | None], int]:
        """Each pair asked in both orders, and how many texts held no verdict."""
        orders = [order for one, two in pairs for order in ((one, two), (two, one))]
        said = self._ask(group, [{"first": first, "second": second} for first, second in orders])
        worths = [verdict(text, self._settings) for text in said]
        outcomes = [both_orders(*both) for both in zip(worths[::2], worths[1::2], strict=True)]
        return outcomes, worths.count(None)

    def _ask(self, group: Group, parts: Sequence[Mapping[str, str]]) -> list[str]:
        prompt = prompt_as_text(group.prompt.content)
        questions = [question(self._settings, {"prompt": prompt, **own}) for own in parts]
        asked = list({json.dumps(body): body for body in questions}.values())
        with ThreadPoolExecutor(self._settings.parallel) as pool:
            try:
                said = list(pool.map(self._answer, asked))
                return [said[asked.index(body)] for body in questions]
            except ServerFailed as error:
                raise self._failed(group, str(error), error.again) from error

    def _answer(self, body: Mapping[str, Any]) -> str:
        if self._store is None:
            raise RuntimeError("the judge is not set up: call setup before judge")
        address = chat_address(self._settings.address)
        asked = {"address": address, **body}
        known = self._store.find(asked)
        if known is not None:
            return known
        said = text_of(post_json(address, body, self._token, self._timeout_s), address)
        self._store.keep(asked, said)
        return said

    def _failed(self, group: Group, what: str, again: bool) -> JudgeFailed:
        what, where = hidden(what, self._token), f"prompt {group.prompt.id} (row {group.prompt.row})"
        return JudgeFailed(f"{self._key}.llm: {what}\n{where}", f"{self._key}.llm: {what}", again=again)


def chat_address(address: str) -> str:
    """Where the base address is asked; what stands behind its question mark (a version, on Azure) stays at the end."""
    path, mark, query = address.partition("?")
    return f"{path.rstrip('/')}/chat/completions{mark}{query}"


def question(settings: LlmConfig, parts: Mapping[str, str]) -> dict[str, Any]:
    """The body of a request. What stands in braces is put in once: braces within an answer mean nothing."""
    template = settings.template or (POINTWISE if settings.style == "pointwise" else PAIRWISE)
    text = re.sub(r"\{(prompt|completion|first|second)\}", lambda found: parts.get(found[1], found[0]), template)
    messages = [{"role": "user", "content": text}]
    if settings.system is not None:
        messages = [{"role": "system", "content": settings.system}, *messages]
    return {
        "model": settings.model,
        "messages": messages,
        "temperature": 0,
        "seed": 0,
        "max_tokens": settings.max_tokens,
    }


def text_of(answer: Any, address: str) -> str:
    """What the model said. Raises ServerFailed for an answer of another form."""
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        shown = repr(answer)[:200]
        raise ServerFailed(f"{address} answered without choices[0].message.content: {shown}", again=True) from error
    if not isinstance(text, str):
        raise ServerFailed(f"{address} answered with a content of type {type(text).__name__}", again=True)
    return text


def rating(text: str, settings: LlmConfig) -> float | None:
    """The last number that the pattern finds; None for no number, or one outside the range."""
    found = re.findall(settings.pattern or NUMBER_PATTERN, text)
    try:
        number = float(found[-1])
    except (IndexError, ValueError):
        return None
    low, high = settings.score_range
    return number if low <= number <= high else None


def verdict(text: str, settings: LlmConfig) -> float | None:
    """What the first answer won by the last verdict that the pattern finds: 1, 0, or 0.5; None for no verdict."""
    found = re.findall(settings.pattern or VERDICT_PATTERN, text)
    return VERDICTS.get(found[-1].strip().upper()) if found else None
