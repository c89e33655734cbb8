"""Reads the rows of a data set, from wherever it lies, and remembers where each row came from.

JSONL is read here, line by line, so that a broken line is named and values reach the reward function untouched (Arrow
would fill keys that a row lacks and unify types). Parquet, Arrow, CSV, saved data sets and hub names go through
`datasets`. Every fault of the data is a BadInput."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import DataConfig
from rlhf.errors import BadInput

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Table

# Files that describe a data set and hold none of its rows.
ABOUT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
READERS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
}
SPLIT_NAMES = ("train", "test", "validation", "valid", "dev", "eval")


@dataclass(frozen=True, slots=True)
class Record:
    """One row: its columns, and the file with the line (JSONL) or row (elsewhere, counted from 1) that held it."""

    columns: Mapping[str, Any]
    source: str
    number: int

    @property
    def place(self) -> str:
        return f"{self.source}:{self.number}" if self.source.endswith((".jsonl", ".ndjson")) else self._row

    @property
    def _row(self) -> str:
        return f"{self.source}, row {self.number}"


def load_rows(config: DataConfig) -> list[Record]:
    """The rows of `data.path`, at most `data.limit` of them, in their order. Raises BadInput, also for none."""
    path = Path(config.path)
    if path.is_file():
        rows = _file(path)
    elif path.is_dir():
        rows = _folder(path, config.split)
    elif path.exists():
        raise BadInput(f"data.path={path}: neither a file nor a folder, but a device or a pipe; expected a file")
    else:
        rows = _hub(config)
    kept: list[Record] = []
    try:
        for record in rows:
            if len(kept) == config.limit:
                break
            kept.append(record)
    except OSError as error:
        raise BadInput(f"data.path={config.path}: cannot be read: {error}") from error
    if not kept:
        raise BadInput(f"data.path={config.path}: the data set is empty; expected at least one row")
    return kept


def _file(path: Path) -> Iterator[Record]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"data.path={path}: unknown kind of file '{path.suffix}'; expected one of {', '.join(READERS)}")
    if reader == "jsonl":
        return _jsonl(path)
    if reader == "json":
        return _json(path)
    return _from_dataset(_arrow_backed(path, reader), str(path))


def _folder(folder: Path, split: str) -> Iterator[Record]:
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _from_dataset(_saved(folder, split), str(folder))
    try:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in READERS and path.is_file())
    except OSError as error:
        raise BadInput(f"data.path={folder}: cannot be searched for data files: {error}") from error
    if not files:
        raise BadInput(
            f"data.path={folder}: no data files in the folder; expected {', '.join(READERS)}, or a saved data set"
        )
    splits = {path: _split_of(path.relative_to(folder)) for path in files}
    if any(splits.values()):
        lost = [str(path.relative_to(folder)) for path in files if not splits[path] and path.name not in ABOUT_DATA]
        if lost:
            raise BadInput(
                f"data.path={folder}: some files or folders are named after splits, and {', '.join(lost[:5])} "
                f"({len(lost)} in all) after none; expected names that begin with {', '.join(SPLIT_NAMES)}, or none "
                "that does. Next: move the others away, or name one file in data.path"
            )
        wanted = [path for path in files if splits[path] == split]
        if not wanted:
            there = sorted({name for name in splits.values() if name})
            raise BadInput(
                f"data.path={folder}: no file of split '{split}' (data.split); splits there: {', '.join(there)}"
            )
        files = wanted
    return (record for path in files for record in _file(path))


def _split_of(path: Path) -> str | None:
    """The split that a file's name starts with, as in train-00000-of-00002.parquet, or else the nearest folder's."""
    for name in reversed(path.parts):
        for split in SPLIT_NAMES:
            if name.lower() == split or name.lower().startswith((f"{split}-", f"{split}.", f"{split}_")):
                return split
    return None


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                columns = _parsed(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}:{number}: not a JSON object: {error}; found {_start(line)}") from error
            if not isinstance(columns, dict):
                raise BadInput(f"{path}:{number}: found {_start(line)}; expected one JSON object a line")
            yield Record(columns, str(path), number)


def _json(path: Path) -> Iterator[Record]:
    try:
        rows = _parsed(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not valid JSON: {error}; a file with one object a line is called .jsonl") from error
    if not isinstance(rows, list):
        raise BadInput(f"{path}: found a {type(rows).__name__} at the top; expected a list of objects")
    for number, columns in enumerate(rows, start=1):
        if not isinstance(columns, dict):
            raise BadInput(f"{path}, row {number}: found a {type(columns).__name__}; expected an object")
        yield Record(columns, str(path), number)


def _parsed(text: bytes) -> Any:
    """What the JSON holds. Raises ValueError or RecursionError; also for what JSON allows and no row may have: a key
    that stands twice, of which one value would be lost, and half a surrogate pair, which no tokenizer takes."""
    value = json.loads(text, object_pairs_hook=_once)
    if b"\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{error.object[error.start]!r} is half a character (a surrogate without its pair)"
            ) from error
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _arrow_backed(path: Path, reader: str) -> "Dataset":
    import pyarrow
    from datasets import Dataset

    try:
        if reader == "arrow":
            return Dataset.from_file(str(path))
        table = _table(path, reader)
        repeated = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
        if repeated:
            raise BadInput(f"{path}: the column {repeated[0]!r} stands twice; expected names that differ")
        return Dataset(table)
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise BadInput(f"{path}: cannot be read as {reader}: {error}") from error


def _table(path: Path, reader: str) -> "Table":
    import pyarrow.csv
    import pyarrow.parquet

    if reader == "csv":
        return _csv(path)
    with pyarrow.parquet.ParquetFile(path) as file:  # read_table would join columns of one name to others
        return file.read()


def _csv(path: Path) -> "Table":
    """Every value as the text that stands there: no type and no null is guessed from 0012 or NA."""
    import pyarrow.csv

    # One block, since a row may not go over the edge of one; pyarrow takes less than 2 GiB.
    reading = pyarrow.csv.ReadOptions(block_size=min(max(path.stat().st_size, 1 << 20), (1 << 31) - 1))
    parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
    with pyarrow.csv.open_csv(path, read_options=reading, parse_options=parsing) as file:
        names = file.schema.names
    texts = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()), strings_can_be_null=False)
    return pyarrow.csv.read_csv(path, read_options=reading, parse_options=parsing, convert_options=texts)


def _saved(folder: Path, split: str) -> "Dataset":
    from datasets import Dataset, load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise BadInput(f"data.path={folder}: not a readable saved data set: {error}") from error
    if isinstance(loaded, Dataset):
        return loaded
    if split not in loaded:
        raise BadInput(f"data.path={folder}: no split '{split}' (data.split); splits there: {', '.join(loaded)}")
    return loaded[split]


def _hub(config: DataConfig) -> Iterator[Record]:
    """A hub name. What can only be a path is not looked up: the hub's answer would hide the typing error."""
    name = config.path
    looked = f"looked in {Path.cwd()} and beside the run file"
    if Path(name).is_symlink():
        raise BadInput(f"data.path={name}: a link to {Path(name).readlink()}, which is not there")
    looks_like_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).suffix.lower() in READERS
    if looks_like_path:
        raise BadInput(f"data.path={name}: no such file or folder ({looked})")
    from datasets import Dataset, load_dataset
    from huggingface_hub.errors import HfHubHTTPError

    try:
        loaded = load_dataset(name, split=config.split)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(
            f"data.path={name}: no such file or folder ({looked}), nor a data set of the hub: {reason}"
        ) from error
    if not isinstance(loaded, Dataset):
        raise BadInput(f"data.path={name}: data.split={config.split} gave several splits; expected one")
    return _from_dataset(loaded, name)


def _from_dataset(dataset: "Dataset", source: str) -> Iterator[Record]:
    return (Record(dict(columns), source, number) for number, columns in enumerate(dataset, start=1))


def _start(line: bytes) -> str:
    text = line.decode("utf-8", errors="replace").strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")
