"""Small files that a crash leaves whole: JSON lines that are appended, and files that are replaced."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from rlhf.chaos.points import point

BESIDE = ".new"  # ends the name of a file that is being replaced


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that is only appended to; a torn last line is left out, a missing file is empty.

    Raises ValueError when any other line is not an object: then something else wrote into the file.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not a JSON object: {error}") from error
        rows.append(row)
    return rows


def read_steps(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a log with one object a step, and the numbers of the lines that are none, which are passed over: for
    readers who do well with what is left. A torn last line counts as not written yet."""
    rows, damaged = [], []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number < len(lines):
                damaged.append(number)
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            damaged.append(number)
    return rows, damaged


def append_durably(path: Path, row: Mapping[str, object]) -> None:
    """Appends one JSON line and waits until it is on the disk; a torn last line, the mark of a crash, goes."""
    with path.open("a+b") as file:
        file.truncate(_whole_lines(file))
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, text: str) -> None:
    """Writes a whole file so that a reader, or a crash, sees the old one or the new one."""
    fresh = path.with_name(path.name + BESIDE)
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    point("file: written beside")
    os.replace(fresh, path)


def _whole_lines(file: BinaryIO) -> int:
    """Bytes up to the end of the last whole line."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        file.seek(start := max(0, end - 4096))
        place = file.read(end - start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0
