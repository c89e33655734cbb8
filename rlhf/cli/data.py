"""`rlhf data`: what a data set holds, a split of it in which no prompt stands on both sides, and pairs made anew."""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf.cli import data_pairs
from rlhf.cli.exit_codes import DONE
from rlhf.cli.folders import writing
from rlhf.config import DataConfig
from rlhf.config_section import named_place
from rlhf.credentials import refuse_credentials
from rlhf.data.examples import Example, Format, fitting_formats, sort_out
from rlhf.data.prompts import key_of
from rlhf.data.records import Record, load_rows
from rlhf.data.turns import spoken_text
from rlhf.errors import BadInput
from rlhf.evaluation.heldout import prompt_as_text

PERCENTILES = (50, 95, 99)
TRAIN_FILE, TEST_FILE = "train.jsonl", "test.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="format, rows, lengths, duplicates, shared prompts, rows that teach nothing")
    split = actions.add_parser("split", help="two files, with all rows of a prompt in one of them")
    made = actions.add_parser("pairs", help="preference pairs: a policy answers, a judge scores, answers are compared")
    data_pairs.add_arguments(made)
    for action in (show, split):
        action.add_argument("path", metavar="PATH", help="file, folder, saved data set or hub name")
        action.add_argument("--split", default="train", metavar="NAME", help="split of a hub or saved data set")
        action.add_argument("--prompt-column", default="prompt", metavar="NAME", help="as data.prompt_column")
        action.add_argument(
            "--completion-column", default="completion", metavar="NAME", help="as data.completion_column"
        )
        action.add_argument("--json", action="store_true", help="one JSON object")
    show.add_argument("--model", metavar="NAME", help="count lengths in this model's tokens; without it: in words")
    split.add_argument(
        "--drop-bad-rows", action="store_true", help="leave out rows that teach nothing, instead of refusing them"
    )
    split.add_argument("--to", type=Path, required=True, metavar="DIR", help=f"folder for {TRAIN_FILE} and {TEST_FILE}")
    split.add_argument("--heldout", type=int, required=True, metavar="N", help="how many prompts are set aside")


def run(arguments: argparse.Namespace) -> int:
    if arguments.action == "pairs":
        return data_pairs.run(arguments)
    refuse_credentials(arguments.path, "PATH")
    try:
        named_place(arguments.path)
    except ValueError as error:
        raise BadInput(f"PATH: {error}") from error
    config = DataConfig(
        path=arguments.path,
        split=arguments.split,
        prompt_column=arguments.prompt_column,
        completion_column=arguments.completion_column,
    )
    records = load_rows(config)
    name = format_of_data(records[0], config)
    if arguments.action == "show":
        found = overview(records, config, name, _counter(arguments.model), "tokens" if arguments.model else "words")
    else:
        if arguments.drop_bad_rows:
            config = config.model_copy(update={"bad_rows": "drop"})
        found = split_rows(records, config, name, arguments.to, arguments.heldout)
    print(json.dumps(found) if arguments.json else _in_words(found))
    return DONE


def format_of_data(record: Record, config: DataConfig) -> Format:
    """The most telling format that the first row's columns fit. Raises BadInput when there is none."""
    fitting = fitting_formats(record.columns, config)
    if not fitting:
        raise BadInput(
            f"{record.place}: columns there: {', '.join(sorted(record.columns)) or 'none'}; expected prompt; or "
            "prompt, chosen, rejected; or chosen, rejected; or prompt, completions, ranks; or prompt, completion; or "
            "messages; or text. Other names: --prompt-column, --completion-column"
        )
    return fitting[0]


def overview(
    records: Sequence[Record], config: DataConfig, name: Format, length: Callable[[str], int], unit: str
) -> dict[str, Any]:
    """Everything that `show` tells, as plain values. Lengths are of the plain texts, without a chat template."""
    examples, unusable = sort_out(records, config, name)
    prompts = Counter(key_of(example.content) for example in examples)
    rows = Counter(key_of(json.dumps(dict(record.columns), sort_keys=True, default=repr)) for record in records)
    return {
        "format": name,
        "also": [other for other in fitting_formats(records[0].columns, config) if other != name],
        "columns": sorted(records[0].columns),
        "rows": len(records),
        "unusable": dict(Counter(error.reason for error in unusable)),
        "duplicate_rows": sum(count - 1 for count in rows.values()),
        "distinct_prompts": len(prompts),
        "rows_that_share_a_prompt": sum(count for count in prompts.values() if count > 1),
        "unit": unit,
        "lengths": {part: _percentiles([length(t) for t in texts]) for part, texts in _texts(examples).items()},
    }


def split_rows(
    records: Sequence[Record], config: DataConfig, name: Format, folder: Path, heldout: int
) -> dict[str, Any]:
    """Writes train.jsonl and test.jsonl; the `heldout` prompts with the lowest hashes go to the second, with all their
    rows, the same ones whatever the order of the rows. Rows that teach nothing are refused, or left out and counted."""
    examples, unusable = sort_out(records, config, name)
    if unusable and (config.bad_rows == "refuse" or not examples):
        raise BadInput(
            f"{len(unusable)} of {len(records)} rows cannot be learnt from, the first: {unusable[0]}. Mend them, or "
            "add --drop-bad-rows"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"--to {folder}: exists and is not an empty folder; expected a new one")
    keys = [key_of(example.content) for example in examples]
    distinct = sorted(set(keys))
    if not 0 < heldout < len(distinct):
        raise BadInput(
            f"--heldout {heldout}: {config.path} has {len(distinct)} distinct prompts; expected 1 to one less"
        )
    chosen = set(distinct[:heldout])
    lines: dict[str, list[str]] = {TRAIN_FILE: [], TEST_FILE: []}
    for key, example in zip(keys, examples, strict=True):
        lines[TEST_FILE if key in chosen else TRAIN_FILE].append(_line(example.record))
    with writing("--to", folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file, written in lines.items():
            (folder / file).write_text("".join(written), encoding="utf-8")
    return {
        "format": name,
        "unusable": dict(Counter(error.reason for error in unusable)),
        "train": {"file": str(folder / TRAIN_FILE), "rows": len(lines[TRAIN_FILE]), "prompts": len(distinct) - heldout},
        "test": {"file": str(folder / TEST_FILE), "rows": len(lines[TEST_FILE]), "prompts": heldout},
    }


def _line(record: Record) -> str:
    try:
        return json.dumps(dict(record.columns), ensure_ascii=False) + "\n"
    except TypeError as error:
        raise BadInput(f"{record.place}: a column cannot be written as JSON: {error}") from error


def _texts(examples: Sequence[Example]) -> dict[str, list[str]]:
    """The texts of each part of the rows, by the part's name."""
    parts: dict[str, list[str]] = {}
    for example in examples:
        pair = example.format in ("preference", "implicit_preference")
        names = ("chosen", "rejected") if pair else ("completion",) * len(example.answers)
        parts.setdefault("text" if example.format == "text" else "prompt", []).append(prompt_as_text(example.content))
        for name, answer in zip(names, example.answers, strict=True):
            parts.setdefault(name, []).append(spoken_text(answer))
    return parts


def _percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Nearest-rank percentiles: the smallest length that at least p percent of the rows do not exceed."""
    ranked = sorted(lengths)
    found = {f"p{p}": ranked[math.ceil(p / 100 * len(ranked)) - 1] for p in PERCENTILES}
    return {**found, "max": ranked[-1]}


def _counter(model: str | None) -> Callable[[str], int]:
    if model is None:
        return lambda text: len(text.split())
    from rlhf.models.load import load_tokenizer

    tokenizer = load_tokenizer(model, trust_remote_code=False)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _in_words(found: dict[str, Any]) -> str:
    if "lengths" not in found:
        sides = [found["train"], found["test"]]
        lines = [f"{side['file']}: {side['rows']} rows of {side['prompts']} prompts" for side in sides]
        return "\n".join(lines + [f"left out: {count} ({reason})" for reason, count in found["unusable"].items()])
    also = f" (also readable as {', '.join(found['also'])})" if found["also"] else ""
    lines = [
        f"format: {found['format']}{also}; columns {', '.join(found['columns'])}",
        f"rows: {found['rows']}, of which {found['duplicate_rows']} repeat another row",
        f"prompts: {found['distinct_prompts']} distinct; {found['rows_that_share_a_prompt']} rows share theirs",
    ]
    lines += [f"cannot be learnt from: {count} ({reason})" for reason, count in found["unusable"].items()]
    for part, lengths in found["lengths"].items():
        listed = "  ".join(f"{name} {length}" for name, length in lengths.items())
        lines.append(f"{part} ({found['unit']}): {listed}")
    return "\n".join(lines)
