"""Preferences and demonstrations as tokens: prompts the same whatever follows, BOS and EOS once, the loss mask.

The references are token ids written by hand for a tokenizer of words. Not covered: templates of real chat models beyond
their shapes here, and sentence-piece tokenizers, which write a mark before the first word of an answer.
"""

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf.config import DataConfig, RecordKind
from rlhf.data.examples import CONTRADICTED, EMPTY, EQUAL
from rlhf.data.offline import ANSWER_TOO_LONG, DatasetGenerator, OfflineSet
from rlhf.data.prompts import TOO_LONG, PromptSet
from rlhf.data.records import Record
from rlhf.errors import BadInput
from rlhf.experience import RANK, Sampling

BOS, EOS, TURN, LINE, USER, ASSISTANT = 1, 2, 3, 4, 5, 6
# The shape of ChatML: a line break behind the token that ends a turn.
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <turn> <line> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
FORGETFUL = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] if loop.last else '' }} <turn> {% endfor %}" + (
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def w(number: int) -> int:
    return 7 + number


def make_tokenizer(*, adds_bos: bool, template: str | None) -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", "<turn>", "<line>", "<user>", "<assistant>", *(f"w{n}" for n in range(90))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<turn>", "<line>", "<user>", "<assistant>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def rows(
    kind: RecordKind, *columns: dict[str, Any], adds_bos: bool, template: str | None, stops: list[int], **changes: Any
) -> OfflineSet:
    records = [Record(row, "rows.jsonl", number + 1) for number, row in enumerate(columns)]
    config = DataConfig(**{"path": "given", "shuffle": False, **changes})
    return OfflineSet(
        records,
        kind,
        make_tokenizer(adds_bos=adds_bos, template=template),
        stops,
        config,
        0,
        encoder=False,
        left_out=(),
    )


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


PAIR = {"prompt": "w1 w2", "chosen": " w3", "rejected": " w4 w5 </s>"}


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_pair_has_one_prompt_one_bos_and_one_eos_a_side(adds_bos: bool) -> None:
    """Traps 12 and 20, without a template; the second answer brings its own EOS, which is not doubled."""
    data = rows("preferences", PAIR, adds_bos=adds_bos, template=None, stops=[EOS])
    group = data.group(data.prompt(0))
    assert group.prompt.token_ids.tolist() == [BOS] * adds_bos + [w(1), w(2)]
    assert [sample.token_ids.tolist() for sample in group.samples] == [[w(3), EOS], [w(4), w(5), EOS]]
    assert all(sample.loss_mask.all() for sample in group.samples)
    assert [sample.scores[RANK] for sample in group.samples] == [0.0, 1.0]
    assert group.origin == "dataset" and group.policy_version is None


@pytest.mark.parametrize("template", [None, CHAT, "<s> " + CHAT])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_prompts_are_tokenised_as_in_a_rollout(template: str | None, adds_bos: bool) -> None:
    """Offline and online runs see the same prompt ids, of which at most one is the BOS; answers have none."""
    offline = rows("preferences", PAIR, adds_bos=adds_bos, template=template, stops=[EOS, TURN])
    config = DataConfig(path="given", shuffle=False)
    tokenizer = make_tokenizer(adds_bos=adds_bos, template=template)
    online = PromptSet([Record({"prompt": "w1 w2"}, "rows.jsonl", 1)], tokenizer, config, 0, encoder=False)
    ids = offline.prompt(0).token_ids.tolist()
    assert ids == online.prompt(0).token_ids.tolist() and ids.count(BOS) <= 1
    assert all(BOS not in sample.token_ids for sample in offline.group(offline.prompt(0)).samples)


def test_an_answer_ends_where_the_policy_would_stop() -> None:
    """The template's end of turn is the EOS; the line break behind it, which no policy gets to write, is left out. With
    a model that stops only at </s>, that is added."""
    chat = rows("preferences", PAIR, adds_bos=False, template=CHAT, stops=[EOS, TURN])
    first, second = chat.group(chat.prompt(0)).samples
    assert chat.prompt(0).token_ids.tolist() == [USER, w(1), w(2), TURN, LINE, ASSISTANT]
    assert first.token_ids.tolist() == [w(3), TURN]
    assert second.token_ids.tolist() == [w(4), w(5), EOS]  # the EOS that the row brought is the first end
    other = rows("preferences", PAIR, adds_bos=False, template=CHAT, stops=[EOS])
    assert other.group(other.prompt(0)).samples[0].token_ids.tolist() == [w(3), TURN, LINE, EOS]


def test_a_conversation_trains_on_the_turns_of_the_assistant_only() -> None:
    """Trap 17's mask: the user's words and the template's marks are context, each turn's end is trained."""
    spoken = [said("user", "w1"), said("assistant", "w2 w3"), said("user", "w4"), said("assistant", "w5")]
    data = rows("demonstrations", {"messages": spoken, "id": 7}, adds_bos=False, template=CHAT, stops=[EOS, TURN])
    group = data.group(data.prompt(0))
    (sample,) = group.samples
    assert group.prompt.token_ids.tolist() == [USER, w(1), TURN, LINE, ASSISTANT]
    assert sample.token_ids.tolist() == [w(2), w(3), TURN, LINE, USER, w(4), TURN, LINE, ASSISTANT, w(5), TURN]
    assert sample.loss_mask.astype(int).tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1]
    assert sample.text == "w2 w3\nw5" and dict(group.prompt.columns) == {"id": 7} and sample.scores == {}


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    """Its prompt for the second turn is not what the first turn's row began with."""
    spoken = [said("user", "w1"), said("assistant", "w2"), said("user", "w4"), said("assistant", "w5")]
    with pytest.raises(BadInput, match=r"rows.jsonl:1: the model's chat template writes a turn otherwise"):
        rows("demonstrations", {"messages": spoken}, adds_bos=False, template=FORGETFUL, stops=[TURN])


def test_messages_need_a_template() -> None:
    spoken = [said("user", "w1"), said("assistant", "w2")]
    for template, changes in ((None, {}), (CHAT, {"chat_template": False})):
        with pytest.raises(BadInput, match=r"rows.jsonl:1: .*holds messages, but"):
            rows("demonstrations", {"messages": spoken}, adds_bos=False, template=template, stops=[EOS], **changes)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_text_is_learnt_whole_but_for_its_first_token(adds_bos: bool) -> None:
    """The usual loss of a language model: every token but the first has a prediction."""
    data = rows("demonstrations", {"text": "w1 w2 w3"}, adds_bos=adds_bos, template=CHAT, stops=[EOS])
    group = data.group(data.prompt(0))
    whole = [*group.prompt.token_ids.tolist(), *group.samples[0].token_ids.tolist()]
    assert whole == [BOS] * adds_bos + [w(1), w(2), w(3), EOS] and len(group.prompt.token_ids) == 1
    assert group.samples[0].loss_mask.all()


def test_dialogues_become_messages_where_there_is_a_template() -> None:
    before = "\n\nHuman: w1\n\nAssistant: w2\n\nHuman: w3\n\nAssistant:"
    row = {"chosen": f"{before} w4", "rejected": f"{before} w5"}
    chat = rows("preferences", row, adds_bos=False, template=CHAT, stops=[TURN])
    marks = [USER, w(1), TURN, LINE, ASSISTANT, w(2), TURN, LINE, USER, w(3), TURN, LINE, ASSISTANT]
    assert chat.prompt(0).token_ids.tolist() == marks
    assert chat.group(chat.prompt(0)).samples[0].token_ids.tolist() == [w(4), TURN]
    plain = rows("preferences", row, adds_bos=False, template=None, stops=[EOS])
    assert plain.prompt(0).text == before


def test_over_long_pairs_go_as_a_whole_and_prompts_are_cut_for_both_sides() -> None:
    """Trap 20: limit 4 on prompts and 3 on answers, EOS included; never one side by itself."""

    def words(count: int) -> str:
        return " ".join(f"w{n}" for n in range(count))

    table = [
        {"prompt": words(4), "chosen": "w1 w2", "rejected": "w3"},
        {"prompt": words(4), "chosen": "w1", "rejected": words(3)},
        {"prompt": words(9), "chosen": "w1", "rejected": "w2"},
    ]
    limits: dict[str, Any] = {"max_prompt_tokens": 4, "max_completion_tokens": 3}
    common: dict[str, Any] = {"adds_bos": True, "template": None, "stops": [EOS], **limits, "max_prompt_tokens": 5}
    dropping = rows("preferences", *table, **common)
    assert len(dropping) == 1 and dropping.dropped == {ANSWER_TOO_LONG: 1, TOO_LONG: 1}
    assert "1 dropped (answer too long), 1 dropped (prompt too long)" in dropping.describe()
    with pytest.raises(BadInput, match=r"2 of 3 rows are over .*rows.jsonl:2 has 5 tokens and an answer of 4"):
        rows("preferences", *table, too_long="refuse", **common)
    cutting = rows("preferences", *table, too_long="truncate", **common)
    assert len(cutting) == 2 and cutting.dropped == {ANSWER_TOO_LONG: 1}
    assert cutting.prompt(1).token_ids.tolist() == [BOS, w(5), w(6), w(7), w(8)]


def test_all_rows_of_a_prompt_are_held_out_together() -> None:
    table = [{"prompt": f"w{n % 5}", "chosen": f"w{n}", "rejected": "w80"} for n in range(20)]
    data = rows("preferences", *table, adds_bos=False, template=None, stops=[EOS], heldout=2)
    asked = {str(prompt.content) for prompt in data.heldout_prompts()}
    trained = {str(data.prompt(number).content) for number in range(len(data))}
    assert len(asked) == 2 and len(trained) == 3 and not asked & trained
    assert (len(data.heldout_prompts()), len(data)) == (8, 12)
    assert [prompt.id for prompt in data.heldout_prompts()] == list(range(-1, -9, -1))
    with pytest.raises(BadInput, match=r"data.heldout=5 leaves nothing"):
        rows("preferences", *table, adds_bos=False, template=None, stops=[EOS], heldout=5)


def test_epochs_visit_every_row_once_and_the_fingerprint_knows_the_rows() -> None:
    table = [{"prompt": "w1", "completion": f"w{n}"} for n in range(6)]

    def build(*, seed_rows: list[dict[str, str]]) -> OfflineSet:
        return rows("demonstrations", *seed_rows, adds_bos=False, template=None, stops=[EOS], shuffle=True)

    data = build(seed_rows=table)
    epochs = [[data.prompt(number).row for number in range(start, start + 6)] for start in (0, 6)]
    assert epochs[0] != epochs[1] and all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert data.fingerprint == build(seed_rows=table).fingerprint != build(seed_rows=table[:5]).fingerprint


def test_the_generator_looks_up_whatever_it_is_asked_for() -> None:
    """Held-out rows too; the sampling settings change nothing, and no version is stamped on."""
    table = [{"prompt": f"w{n}", "completion": f"w{n + 10}"} for n in range(4)]
    data = rows("demonstrations", *table, adds_bos=False, template=None, stops=[EOS], heldout=1)
    prompts = [data.prompt(5), *data.heldout_prompts()]
    found = list(DatasetGenerator(data).generate(prompts, Sampling(0.5, 1.0, 0, 1), 4, "sample"))
    assert [group.prompt for group in found] == prompts
    for group in found:
        (sample,) = group.samples
        assert sample.token_ids.tolist() == [group.prompt.token_ids[0] + 10, EOS]
        assert sample.versions is None and sample.sampling is None and sample.finish_reason == "given"
        assert sample.token_ids.dtype == np.int32


SIDES = {"prompt": "w1", "chosen": "w2", "rejected": "w3"}
RANKING = {"prompt": "w1", "completions": ["w2", "w3", "w4"], "ranks": [0, 1, 2]}
SILENT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] if m['role'] == 'user' else '' }} <turn> {% endfor %}"
    + ("{% if add_generation_prompt %}<assistant> {% endif %}")
)


@pytest.mark.parametrize(
    ("kind", "good", "changes", "template", "reason"),
    [
        ("preferences", SIDES, {"rejected": "w2 "}, None, EQUAL),
        ("preferences", SIDES, {"rejected": "w2 </s>"}, None, EQUAL),
        ("preferences", SIDES, {"rejected": " w2"}, CHAT, EQUAL),
        ("preferences", SIDES, {"chosen": "</s>"}, None, EMPTY),
        ("preferences", RANKING, {"completions": ["w2", "w3", "w2  "]}, None, CONTRADICTED),
        ("preferences", RANKING, {"completions": ["w2", "</s> </s>", "w3"]}, None, EMPTY),
        ("demonstrations", {"prompt": "w1", "completion": "w2"}, {"completion": "</s>"}, None, EMPTY),
        ("demonstrations", {"text": "w1"}, {"text": "</s>"}, None, EMPTY),
    ],
)
def test_tokens_that_teach_nothing_are_refused_or_dropped_and_counted(
    kind: RecordKind, good: dict[str, Any], changes: dict[str, Any], template: str | None, reason: str
) -> None:
    """Texts that differ and tokens that do not, and answers of which only the end is left."""
    given = (good, {**good, **changes}, good)
    with pytest.raises(BadInput, match=f"1 of 3 rows .*rows.jsonl:2: {reason}.*data.bad_rows=drop"):
        rows(kind, *given, adds_bos=True, template=template, stops=[EOS])
    data = rows(kind, *given, adds_bos=True, template=template, stops=[EOS], bad_rows="drop")
    assert len(data) == 2 and data.dropped == {reason: 1}


def test_a_template_that_does_not_write_the_answer_teaches_nothing() -> None:
    with pytest.raises(BadInput, match=f"1 of 1 rows .*{EMPTY}: 'w2' becomes no token before its end"):
        rows("preferences", SIDES, adds_bos=False, template=SILENT, stops=[EOS, TURN], bad_rows="drop")


def test_the_same_tokens_at_one_rank_stay() -> None:
    data = rows(
        "preferences", {**RANKING, "completions": ["w2", "w3", "w3 "], "ranks": [0, 1, 1]}, adds_bos=False,
        template=None, stops=[EOS],
    )  # fmt: skip
    assert len(data.group(data.prompt(0)).samples) == 3


@pytest.mark.parametrize(
    ("kind", "row"), [("preferences", SIDES), ("preferences", RANKING), ("demonstrations", {"completion": "w2"})]
)
def test_prompts_that_end_with_the_answer_are_refused(kind: RecordKind, row: dict[str, Any]) -> None:
    """As for runs that sample, whatever data.bad_rows says."""
    prompt = [said("user", "w1"), said("assistant", "w5")]
    with pytest.raises(BadInput, match=r"rows.jsonl:1: column 'prompt' ends with an assistant message"):
        rows(kind, {**row, "prompt": prompt}, adds_bos=False, template=CHAT, stops=[EOS, TURN], bad_rows="drop")
