"""Prompts: reading every format, refusing rows by place, BOS once, limits, the held-out split, repeatable ids.

Not covered: hub data sets, which need a network.
"""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf.cli.exit_codes import BAD_INPUT
from rlhf.cli.main import main
from rlhf.config import DataConfig
from rlhf.data.prompts import REPEATED, TOO_LONG, PromptSet
from rlhf.data.records import Record, load_rows
from rlhf.errors import BadInput

PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(*, adds_bos: bool, template: str | None) -> PreTrainedTokenizerFast:
    """Words split at spaces; <s> is the BOS, which the tokenizer adds itself or not."""
    words = ["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(200))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def settings(**changes: Any) -> DataConfig:
    return DataConfig(**{"path": "given", "chat_template": False, **changes})


def records(*prompts: object) -> list[Record]:
    return [Record({"prompt": prompt, "answer": n}, "rows.jsonl", n + 1) for n, prompt in enumerate(prompts)]


def words(count: int, first: int = 0) -> str:
    return " ".join(f"w{first + n}" for n in range(count))


ROWS = [{"prompt": "a", "label": [1, 2]}, {"prompt": "b", "label": []}, {"prompt": "c", "label": [3]}]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow", "saved", "saved_dict", "folder", "split_folder"])
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    """The same three rows through each reader; other columns arrive untouched."""
    from datasets import Dataset, DatasetDict

    data, path = Dataset.from_list(ROWS), tmp_path / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "parquet":
        data.to_parquet(path)
    elif kind == "arrow":
        data.save_to_disk(tmp_path / "saved")
        path = next((tmp_path / "saved").glob("*.arrow"))
    elif kind == "saved":
        data.save_to_disk(path)
    elif kind == "saved_dict":
        DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(path)
    else:
        path.mkdir()
        prefix = "train-" if kind == "split_folder" else "part-"
        (path / f"{prefix}0.jsonl").write_text("\n".join(map(json.dumps, ROWS[:2])))
        Dataset.from_list(ROWS[2:]).to_parquet(path / f"{prefix}1.parquet")
        if kind == "split_folder":
            (path / "test-0.jsonl").write_text('{"prompt": "not for training"}\n')
    assert [dict(record.columns) for record in load_rows(settings(path=str(path)))] == ROWS


def test_limit_and_split_errors(tmp_path: Path) -> None:
    (tmp_path / "test-0.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert len(load_rows(settings(path=str(tmp_path), split="test", limit=1))) == 1
    with pytest.raises(BadInput, match=r"no file of split 'train'.*splits there: test"):
        load_rows(settings(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n[1]\n', r"a.jsonl:2: found '\[1\]'; expected one JSON object"),
        ("a.jsonl", b'{"prompt": "x"}\n\xff\n', "a.jsonl:2: not a JSON object"),
        ("a.jsonl", b'{"prompt": "x", "prompt": "y"}\n', "a.jsonl:1: .*the key 'prompt' stands twice"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "\\uD83d"}\n', r"a.jsonl:2: .*'.ud83d' is half a character"),
        ("a.jsonl", b'{"prompt": ' + b"[" * 100_000, "a.jsonl:1: not a JSON object: maximum recursion"),
        ("a.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", "a.jsonl:1: not a JSON object: Exceeds the limit"),
        ("a.json", b'[{"prompt": "x", "prompt": "y"}]', "a.json: .*the key 'prompt' stands twice"),
        ("a.csv", b"prompt,prompt\na,b\n", "a.csv: the column 'prompt' stands twice"),
        ("a.json", b'{"prompt": "x"}', "expected a list of objects"),
        ("a.json", b'{"prompt"', "not valid JSON"),
        ("a.parquet", b"nonsense", "cannot be read as parquet"),
        ("a.arrow", b"nonsense", "cannot be read as arrow"),
        ("a.txt", b"x", "unknown kind of file '.txt'"),
        ("a.jsonl", b"\n\n", "the data set is empty"),
    ],
)
def test_unreadable_files_name_the_place(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=expected):
        load_rows(settings(path=str(tmp_path / name)))


def test_csv_values_are_text_as_they_stand_and_may_hold_line_breaks(tmp_path: Path) -> None:
    """Over 1 MiB, where a reader that looks for rows in parts of the file would tear them; Python's csv wrote it."""
    rows = [{"prompt": f"line\n{number}\n" + "x\n" * 2000, "id": f"00{number}", "was": "NA"} for number in range(400)]
    rows += [
        {"prompt": "long " * 400_000, "id": "1e5", "was": ""},
        {"prompt": "true", "id": "null", "was": "2024-01-01"},
    ]
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "id", "was"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    assert path.stat().st_size > 1 << 20
    assert [dict(record.columns) for record in load_rows(settings(path=str(path)))] == rows


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_not_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.chdir(tmp_path)
    assert main(["data", "show", path]) == BAD_INPUT
    assert "is empty; expected a file, a folder or a hub name" in capsys.readouterr().err
    assert len(load_rows(settings(path="."))) == 1


def test_folders_named_after_splits_choose_as_files_do(tmp_path: Path) -> None:
    for name in (
        "data/train/d.jsonl",
        "data/test/d.jsonl",
        "data/validation/deeper/d.jsonl",
        "data/test/train-1.jsonl",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"prompt": name}) + "\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    for split, expected in [
        ("train", ["data/test/train-1.jsonl", "data/train/d.jsonl"]),
        ("test", ["data/test/d.jsonl"]),
        ("validation", ["data/validation/deeper/d.jsonl"]),
    ]:
        found = load_rows(settings(path=str(tmp_path), split=split))
        assert [record.columns["prompt"] for record in found] == expected
    (tmp_path / "more.jsonl").write_text('{"prompt": "more"}\n')
    with pytest.raises(BadInput, match=r"named after splits, and more.jsonl \(1 in all\) after none"):
        load_rows(settings(path=str(tmp_path)))


def test_whole_characters_beyond_the_basic_plane_are_read(tmp_path: Path) -> None:
    """Both halves of a surrogate pair are one character in JSON; a backslash before "ud" is text."""
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\\ud83d\\ude00"}\n{"prompt": "C:\\\\udder"}\n')
    assert [record.columns["prompt"] for record in load_rows(settings(path=str(tmp_path / "a.jsonl")))] == [
        "\N{GRINNING FACE}",
        "C:\\udder",
    ]


def test_columns_of_one_name_links_to_nothing_and_pipes(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, expected in [
        ("a.parquet", "the column 'prompt' stands twice"),
        ("link.jsonl", "a link to .*nowhere.jsonl, which is not there"),
        ("pipe.jsonl", "a device or a pipe; expected a file"),
    ]:
        with pytest.raises(BadInput, match=expected):
            load_rows(settings(path=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": ""}, "rows.jsonl:1: column 'prompt' is empty"),
        ({"prompt": " \n"}, "is empty"),
        ({"prompt": None}, "is a NoneType"),
        ({"prompt": 3}, r"is a int \(3\); expected text or a list of role"),
        ({"prompt": []}, "empty list"),
        ({"prompt": ["hello"]}, "message 0: found 'hello'"),
        ({"prompt": [{"role": "user"}]}, "message 0: no content"),
        ({"prompt": [{"role": "user", "content": None}]}, "message 0: content is None"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "ends with an assistant message"),
        ({"promt": "x"}, "Did you mean data.prompt_column=promt"),
        ({"text": "x"}, "data.prompt_column=text"),
        ({"messages": []}, "data.prompt_column=messages"),
        ({"chosen": "x", "rejected": "y"}, "preference row without its prompt"),
    ],
)
def test_unusable_rows_name_the_place(columns: dict[str, Any], expected: str) -> None:
    tokenizer = make_tokenizer(adds_bos=False, template=PLAIN)
    with pytest.raises(BadInput, match=expected):
        PromptSet([Record(columns, "rows.jsonl", 1)], tokenizer, settings(chat_template=True), 0, encoder=False)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", [None, PLAIN, "{{ bos_token }} " + PLAIN])
def test_bos_stands_once_and_only_where_it_belongs(adds_bos: bool, template: str | None) -> None:
    """BOS by template, by tokenizer, by both: once. By neither: not at all. No EOS behind the prompt."""
    tokenizer = make_tokenizer(adds_bos=adds_bos, template=template)
    ids = (
        PromptSet(records("w1 w2"), tokenizer, settings(chat_template=True), 0, encoder=False)
        .prompt(0)
        .token_ids.tolist()
    )
    expected = 1 if adds_bos or (template or "").startswith("{{ bos_token }}") else 0
    assert ids.count(1) == expected and ids[:expected] == [1] * expected
    assert 2 not in ids


def test_templates_and_system_prompts() -> None:
    tokenizer = make_tokenizer(adds_bos=False, template=PLAIN)
    asked = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    prompts = PromptSet(records("w9", asked), tokenizer, settings(chat_template=True, shuffle=False), 0, encoder=False)
    assert prompts.prompt(0).text == "[user] w9 [assistant]"
    assert prompts.prompt(1).text == "[user] w1 [assistant] w2 [user] w3 [assistant]"
    assert prompts.prompt(1).content == asked and prompts.prompt(1).columns == {"answer": 1}
    spoken = PromptSet(records("w9"), tokenizer, settings(chat_template=True, system_prompt="w5"), 0, encoder=False)
    assert spoken.prompt(0).text == "[system] w5 [user] w9 [assistant]"
    assert spoken.prompt(0).content == "w9"
    bare = make_tokenizer(adds_bos=False, template=None)
    with pytest.raises(
        BadInput, match=r"rows.jsonl:1: .*holds messages, but this model's tokenizer has no chat template"
    ):
        PromptSet(records(asked), bare, settings(chat_template=True), 0, encoder=False)
    with pytest.raises(BadInput, match=r"data.system_prompt needs a chat template, but data.chat_template is false"):
        PromptSet(records("w1"), tokenizer, settings(system_prompt="w5"), 0, encoder=False)
    for nothing in ("", " {# all of it is a comment #}"):
        with pytest.raises(BadInput, match=r"rows.jsonl:1: the model's chat template writes nothing"):
            PromptSet(
                records("w1"),
                make_tokenizer(adds_bos=True, template=nothing),
                settings(chat_template=True),
                0,
                encoder=False,
            )
    endless = make_tokenizer(adds_bos=False, template="{% for i in range(99999999) %}x{% endfor %}")
    with pytest.raises(BadInput, match=r"rows.jsonl:1: the model's chat template refuses .*Range too big"):
        PromptSet(records("w1"), endless, settings(chat_template=True), 0, encoder=False)
    refusing = make_tokenizer(adds_bos=False, template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadInput, match=r"rows.jsonl:1: .*roles must alternate"):
        PromptSet(records("w1"), refusing, settings(chat_template=True), 0, encoder=False)


def test_too_long_prompts_are_dropped_refused_or_cut() -> None:
    """Ten words against a limit of four; the cut keeps the end, and the BOS at the front."""
    rows, tokenizer = records(words(3), words(10), words(4, 50)), make_tokenizer(adds_bos=False, template=None)
    dropping = PromptSet(rows, tokenizer, settings(max_prompt_tokens=4), 0, encoder=False)
    assert len(dropping) == 2 and dropping.dropped == {TOO_LONG: 1}
    assert {dropping.prompt(n).row for n in range(2)} == {0, 2}
    with pytest.raises(BadInput, match=r"1 of 3 .*data.max_prompt_tokens=4: rows.jsonl:2 has 10 tokens"):
        PromptSet(rows, tokenizer, settings(max_prompt_tokens=4, too_long="refuse"), 0, encoder=False)
    with pytest.raises(BadInput, match=r"all 3 prompts are over .*the shortest has 3 tokens"):
        PromptSet(rows, tokenizer, settings(max_prompt_tokens=2), 0, encoder=False)
    cut = PromptSet(
        rows, tokenizer, settings(max_prompt_tokens=4, too_long="truncate", shuffle=False), 0, encoder=False
    )
    assert cut.prompt(1).token_ids.tolist() == tokenizer("w6 w7 w8 w9")["input_ids"]
    with_bos = make_tokenizer(adds_bos=True, template=None)
    cut = PromptSet(rows, with_bos, settings(max_prompt_tokens=4, too_long="truncate", shuffle=False), 0, encoder=False)
    assert cut.prompt(1).token_ids.tolist() == [1, *tokenizer("w7 w8 w9")["input_ids"]]


def test_each_epoch_visits_each_row_once_and_ids_are_repeatable() -> None:
    rows, tokenizer = records(*(f"w{n}" for n in range(10))), make_tokenizer(adds_bos=False, template=None)
    first, again, other = (PromptSet(rows, tokenizer, settings(), seed, encoder=False) for seed in (0, 0, 1))
    visited = [[first.prompt(epoch * 10 + n).row for n in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in visited)
    assert len({tuple(epoch) for epoch in visited}) == 3
    flat = [row for epoch in visited for row in epoch]
    assert [again.prompt(n).row for n in range(30)] == flat
    assert [other.prompt(n).row for n in range(30)] != flat
    assert (first.prompt(23).id, first.prompt(23).epoch) == (23, 2)
    in_order = PromptSet(rows, tokenizer, settings(shuffle=False), 0, encoder=False)
    assert [in_order.prompt(n).row for n in range(12)] == [*range(10), 0, 1]


def test_heldout_prompts_are_apart_and_stay_the_same() -> None:
    """Equal prompts fall on one side; the choice depends neither on the order of the rows nor on the seed."""
    texts = [f"w{n // 2}" for n in range(40)]  # twenty prompts, each twice
    tokenizer = make_tokenizer(adds_bos=False, template=None)
    prompts = PromptSet(records(*texts), tokenizer, settings(heldout=5), 0, encoder=False)
    heldout = {prompt.text for prompt in prompts.heldout_prompts()}
    trained = {prompts.prompt(n).text for n in range(len(prompts))}
    assert len(prompts.heldout_prompts()) == len(heldout) == 5 and len(prompts) == 30
    assert heldout | trained == set(texts) and not heldout & trained
    assert prompts.dropped == {REPEATED: 5}  # every row is accounted for: 30 + 5 + 5
    turned = PromptSet(records(*reversed(texts)), tokenizer, settings(heldout=5), 9, encoder=False)
    assert {prompt.text for prompt in turned.heldout_prompts()} == heldout
    assert len({prompt.id for prompt in prompts.heldout_prompts()}) == 5
    assert all(prompt.id < 0 for prompt in prompts.heldout_prompts())
    with pytest.raises(BadInput, match=r"data.heldout=20 leaves nothing to train on"):
        PromptSet(records(*texts), tokenizer, settings(heldout=20), 0, encoder=False)


def test_fingerprint_moves_with_rows_and_settings_but_not_with_the_place() -> None:
    tokenizer = make_tokenizer(adds_bos=False, template=None)

    def fingerprint(rows: list[Record], **changes: Any) -> str:
        return PromptSet(rows, tokenizer, settings(**changes), 0, encoder=False).fingerprint

    rows = records("w1", "w2", "w3")
    same = fingerprint(rows)
    assert fingerprint(rows, path="elsewhere") == same
    assert fingerprint([Record(r.columns, "other.jsonl", 7) for r in rows]) == same
    others = [
        fingerprint(records("w1", "w2", "w4")),
        fingerprint(rows[:2]),
        fingerprint([*rows[:2], Record({"prompt": "w3", "answer": 99}, "rows.jsonl", 3)]),
        fingerprint(rows, heldout=1),
        PromptSet(rows, make_tokenizer(adds_bos=True, template=None), settings(), 0, encoder=False).fingerprint,
    ]
    assert len({same, *others}) == 6
