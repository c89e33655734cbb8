"""A copy of the whole buffer as it is at one moment, taken beside a live run: what goes to remote storage."""

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from rlhf.buffer import ledger
from rlhf.buffer.schema import DamagedExperience, read_meta, reader


@dataclass(frozen=True, slots=True)
class Moment:
    """When a copy was taken: the steps that were committed (all below this number), the prompts that had been issued,
    and how often the buffer had been opened for writing, which only grows."""

    updates: int
    issued: int
    opened: int


def snapshot(path: Path, to: Path) -> Moment:
    """Copies the buffer into a new file with SQLite's backup, which sees one moment of a file that is being written.

    Raises DamagedExperience where SQLite finds the file or the copy broken: a damaged buffer must not take the place of
    a whole one. Checksums of payloads are not read; `rlhf verify` does that.
    """
    try:
        with reader(path) as source:
            copy = sqlite3.connect(to, isolation_level=None)
            try:
                source.backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE")  # one file, nothing beside it
                found = [line for (line,) in copy.execute("PRAGMA quick_check")]
                if found != ["ok"]:
                    raise DamagedExperience(f"{path}: SQLite finds it damaged: {found[0]}")
                return _moment(copy)
            finally:
                copy.close()
    except sqlite3.DatabaseError as error:
        raise DamagedExperience(f"{path}: cannot be copied: {error}. `rlhf verify` says what is broken") from error


def moment_of(path: Path) -> Moment:
    """The same of a buffer as it stands. Raises DamagedExperience for a file that is none."""
    try:
        with reader(path) as connection:
            return _moment(connection)
    except (sqlite3.DatabaseError, KeyError) as error:
        raise DamagedExperience(f"{path}: not readable as an experience buffer: {error}") from error


def _moment(connection: sqlite3.Connection) -> Moment:
    meta, last = read_meta(connection), ledger.last_committed(connection)
    return Moment(0 if last is None else last + 1, int(meta["issued"]), int(meta["opened"]))
