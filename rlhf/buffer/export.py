"""Experience as a Hugging Face data set: Parquet files that `datasets.load_dataset(folder)` loads, one row a sample.

Reads the buffer read-only, group by group, beside a live run or after it; never holds more than ROWS_PER_BATCH rows.
The folder appears whole or not at all.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Sequence, Value

from rlhf.buffer.audit import ExperienceView
from rlhf.buffer.schema import FILE_NAME
from rlhf.errors import BadInput
from rlhf.experience import OLD_LOGPROBS, RANK, REF_LOGPROBS, REWARD, Group, Sample

ROWS_PER_BATCH = 512
ROWS_PER_FILE = 64 * ROWS_PER_BATCH

SCORES = {REWARD, RANK}
TOKENS = {REF_LOGPROBS, OLD_LOGPROBS}
COLUMNS = {
    "prompt": Value("string"),
    "completion": Value("string"),
    "prompt_ids": Sequence(Value("int32")),
    "completion_ids": Sequence(Value("int32")),
    "loss_mask": Sequence(Value("bool")),
    "behavior_logprobs": Sequence(Value("float32")),
    "versions": Sequence(Value("int32")),
    "group_id": Value("int64"),
    "sample_index": Value("int32"),
    "row": Value("int64"),
    "epoch": Value("int64"),
    "policy_version": Value("int64"),
    "step": Value("int64"),
    "state": Value("string"),
    "source": Value("string"),
    "temperature": Value("float64"),
    "top_p": Value("float64"),
    "top_k": Value("int64"),
    "max_new_tokens": Value("int64"),
    "seed": Value("int64"),
    "finish_reason": Value("string"),
    "prompt_content": Value("string"),
    "prompt_columns": Value("string"),
}


def export_experience(run_dir: Path, to_dir: Path) -> int:
    """Writes every stored sample of a run and returns how many; docs/buffer.md explains each column.

    `step` is null for samples that were not trained, `reward` where no judge could score. Columns of other judges are
    added under their own names. Raises BadInput when the run has no samples or to_dir is a folder with something in
    it.
    """
    if to_dir.exists() and (not to_dir.is_dir() or any(to_dir.iterdir())):
        raise BadInput(f"{to_dir}: exists already, expected a new or empty folder: choose another --to")
    view = ExperienceView(run_dir / FILE_NAME)
    extra = view.column_names()
    scores = sorted(SCORES | {name for name, kind in extra.items() if kind == "score"})
    tokens = sorted(TOKENS | {name for name, kind in extra.items() if kind == "token"})
    taken = sorted(set(COLUMNS) & {*scores, *tokens})
    if taken:
        raise BadInput(f"{run_dir}: judges filled columns called {taken}, which the export uses for something else")
    features = Features(
        COLUMNS | {name: Value("float64") for name in scores} | {name: Sequence(Value("float32")) for name in tokens}
    )
    rows = (
        _row(group, sample, state, step, scores, tokens)
        for group, state, step in view.stored()
        for sample in group.samples
    )
    to_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to_dir.parent, prefix=f".{to_dir.name}-") as scratch:
        whole = Path(scratch) / "whole"
        (whole / "data").mkdir(parents=True)
        count = _write(rows, features.arrow_schema, whole / "data")
        if count == 0:
            raise BadInput(f"{run_dir}: no sample is stored yet, there is nothing to export")
        os.replace(whole, to_dir)
    return count


def _write(rows: Iterator[dict[str, Any]], schema: pa.Schema, folder: Path) -> int:
    """Parquet files of ROWS_PER_FILE rows called train-00000.parquet and so on; returns the number of rows."""
    count = 0
    batch = list(islice(rows, ROWS_PER_BATCH))
    while batch:
        with pq.ParquetWriter(folder / f"train-{count // ROWS_PER_FILE:05d}.parquet", schema) as file:
            end = count + ROWS_PER_FILE
            while batch and count < end:
                file.write_table(pa.Table.from_pylist(batch, schema=schema))
                count += len(batch)
                batch = list(islice(rows, ROWS_PER_BATCH))
    return count


def _row(
    group: Group, sample: Sample, state: str, step: int | None, scores: list[str], tokens: list[str]
) -> dict[str, Any]:
    prompt, sampling = group.prompt, sample.sampling
    row: dict[str, Any] = {
        "prompt": prompt.text,
        "completion": sample.text,
        "prompt_ids": prompt.token_ids,
        "completion_ids": sample.token_ids,
        "loss_mask": sample.loss_mask,
        "behavior_logprobs": sample.behavior_logprobs,
        "versions": sample.versions,
        "group_id": prompt.id,
        "sample_index": sample.index,
        "row": prompt.row,
        "epoch": prompt.epoch,
        "policy_version": sample.policy_version,
        "step": step,
        "state": state,
        "source": group.origin,
        "temperature": None if sampling is None else sampling.temperature,
        "top_p": None if sampling is None else sampling.top_p,
        "top_k": None if sampling is None else sampling.top_k,
        "max_new_tokens": None if sampling is None else sampling.max_new_tokens,
        "seed": sample.seed,
        "finish_reason": sample.finish_reason,
        "prompt_content": json.dumps(prompt.content),
        "prompt_columns": json.dumps(dict(prompt.columns)),
    }
    row.update({name: sample.scores.get(name) for name in scores})
    row.update({name: sample.tokens.get(name) for name in tokens})
    return row
