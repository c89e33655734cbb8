"""The tables of `experience.db`, and how a connection to it is opened. Knows nothing of what the payloads mean.

One writer (the run), any number of readers (verify, inspect, export, replay). Each open for writing takes a new
number and thereby ends the right of every earlier writer to write: an actor that was thought dead cannot move a
prompt afterwards.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.chaos.points import point
from rlhf.errors import BadInput, RunFailed

SCHEMA_VERSION = "2"
FILE_NAME = "experience.db"
BUSY_TIMEOUT_S = 60.0

# states: pending -> leased -> complete -> trained, or -> dropped. A complete prompt with a row in step_groups is taken.
# meta.issued is the number of prompt ids ever issued, so that a row that vanished is noticed; meta.ticket the last one.
# request is the call that handed the lease out, so that the same call again finds it; leased_at is for people.
TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE prompts (
    id INTEGER PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('pending', 'leased', 'complete', 'trained', 'dropped')),
    owner TEXT,
    ticket INTEGER NOT NULL,
    request INTEGER,
    leased_at REAL,
    attempts INTEGER NOT NULL,
    reason TEXT
) STRICT;
CREATE INDEX prompts_by_state ON prompts (state, id);
CREATE INDEX prompts_by_request ON prompts (request);
CREATE TABLE groups (
    prompt_id INTEGER PRIMARY KEY REFERENCES prompts (id),
    policy_version INTEGER,
    samples INTEGER NOT NULL,
    carried TEXT NOT NULL,
    payload BLOB NOT NULL,
    checksum BLOB NOT NULL
) STRICT;
CREATE TABLE columns (
    prompt_id INTEGER NOT NULL REFERENCES groups (prompt_id),
    name TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('score', 'token')),
    by_learner INTEGER NOT NULL CHECK (by_learner IN (0, 1)),
    payload BLOB NOT NULL,
    checksum BLOB NOT NULL,
    PRIMARY KEY (prompt_id, name)
) STRICT;
CREATE TABLE steps (
    step INTEGER PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('taken', 'trained')),
    version INTEGER,
    fingerprint TEXT,
    metrics TEXT,
    rewound_fingerprint TEXT,
    checksum BLOB
) STRICT;
CREATE TABLE step_groups (
    step INTEGER NOT NULL REFERENCES steps (step),
    position INTEGER NOT NULL,
    prompt_id INTEGER NOT NULL UNIQUE REFERENCES prompts (id),
    PRIMARY KEY (step, position)
) STRICT;
CREATE TABLE discarded (
    id INTEGER PRIMARY KEY,
    prompt_id INTEGER NOT NULL REFERENCES prompts (id),
    policy_version INTEGER,
    samples INTEGER NOT NULL,
    reason TEXT NOT NULL
) STRICT;
"""


class DamagedExperience(RunFailed):
    """A stored payload is not what was written; the message names the file, the table and the prompt."""


class Writer:
    """The run's own connection: WAL, synchronous=FULL, foreign keys, one transaction a move. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._number = 0
        try:
            self._connection = sqlite3.connect(
                path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                self._connection.execute(f"PRAGMA {pragma}")
            self._claim()
        except sqlite3.DatabaseError as error:
            raise BadInput(
                f"{path}: cannot be opened as an experience buffer: {error}. Expected a file that `rlhf run` wrote, "
                f"or none in an existing folder; `rlhf verify` says what is broken"
            ) from error

    def _claim(self) -> None:
        with self._transaction("IMMEDIATE") as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if tables and "meta" not in tables:
                raise BadInput(
                    f"{self.path}: a database, but not an experience buffer: it has the tables {sorted(tables)}"
                )
            if not tables:
                for statement in TABLES.split(";"):
                    connection.execute(statement)
                rows = [("schema", SCHEMA_VERSION), ("issued", "0"), ("opened", "0"), ("ticket", "0")]
                connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
            meta = read_meta(connection)
            if meta.get("schema") != SCHEMA_VERSION:
                raise BadInput(
                    f"{self.path}: a buffer of schema {meta.get('schema')}, this version reads {SCHEMA_VERSION}: go "
                    f"on with the version that wrote it, or start anew with --fresh"
                )
            self._number = int(meta["opened"]) + 1
            write_meta(connection, "opened", str(self._number))

    @contextmanager
    def moving(self) -> Iterator[sqlite3.Connection]:
        """One move: all of it happens, durably, or none. Raises RunFailed once a later writer has opened the file."""
        with self._transaction("IMMEDIATE") as connection:
            opened = int(read_meta(connection)["opened"])
            if opened != self._number:
                raise RunFailed(
                    f"{self.path}: opened again by another process since (opening {opened}, this one is "
                    f"{self._number}): this process has lost the right to write and must end"
                )
            yield connection
            point("ledger: not committed")
        point("ledger: committed")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A consistent picture: what several queries see is the same moment."""
        with self._transaction("DEFERRED") as connection:
            yield connection

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute(f"BEGIN {kind}")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except sqlite3.DatabaseError as error:
                if type(error) is not sqlite3.DatabaseError:  # its subclasses are faults of a call, not of the file
                    raise
                raise DamagedExperience(
                    f"{self.path}: SQLite finds it damaged: {error}. `rlhf verify` says where; restore the run "
                    "directory from a copy"
                ) from error
            finally:
                if self._connection.in_transaction:
                    self._connection.rollback()

    def close(self) -> None:
        with self._lock:
            self._connection.close()


@contextmanager
def reader(path: Path) -> Iterator[sqlite3.Connection]:
    """A read-only connection that sees one moment of the file, live run or not. Raises sqlite3.Error if it cannot."""
    if not path.is_file():
        raise sqlite3.OperationalError("no such file")
    connection = sqlite3.connect(
        f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None
    )
    try:
        connection.execute("BEGIN")
        yield connection
    finally:
        connection.close()


def read_meta(connection: sqlite3.Connection) -> dict[str, str]:
    return dict(connection.execute("SELECT key, value FROM meta"))


def write_meta(connection: sqlite3.Connection, key: str, value: str) -> None:
    connection.execute(
        "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (key, value)
    )
