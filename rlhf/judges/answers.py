"""What a judge that is asked over a network has answered, kept by the content of the question, so that a run that goes
on asks nothing twice."""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.errors import BadInput

ANSWERS_FILE = "judge_answers.db"
BUSY_TIMEOUT_S = 60.0
UNREADABLE = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_CANTOPEN)


class AnswerStore:
    """Questions and answers in one SQLite file; several processes and threads may share it. The first answer stays.

    Raises BadInput for a file that is no whole database."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._connection = _opened(path)
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF not in UNREADABLE:  # the low byte is the kind of error
                raise
            raise BadInput(
                f"{path}: what the judge has answered cannot be read: {error}. Next: move the file away; the questions "
                "are then asked again"
            ) from error

    def find(self, question: Mapping[str, Any]) -> str | None:
        with self._lock:
            row = self._connection.execute("SELECT answer FROM answers WHERE key = ?", (_key(question),)).fetchone()
        return None if row is None else str(row[0])

    def keep(self, question: Mapping[str, Any], answer: str) -> None:
        row = (_key(question), json.dumps(question), answer)
        with self._lock:
            self._connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", row)

    def close(self) -> None:
        with self._lock:
            self._connection.close()


def _opened(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, question TEXT NOT NULL, answer TEXT NOT NULL)"
        )
        connection.execute("SELECT count(question) FROM answers").fetchone()  # reads the table, not its index alone
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _key(question: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(question, sort_keys=True).encode(), digest_size=16).hexdigest()
