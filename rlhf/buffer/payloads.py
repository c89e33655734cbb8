"""Groups and columns as rows of the database. Every read checks the checksum. States are the ledger's.

Functions take an open connection and run inside the caller's transaction.
"""

import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from rlhf.buffer import ledger
from rlhf.buffer.codec import (
    UnreadablePayload,
    checksum,
    decode_column,
    decode_group,
    encode_column,
    encode_group,
)
from rlhf.buffer.schema import DamagedExperience
from rlhf.errors import RunFailed
from rlhf.experience import Columns, Group


def insert_group(connection: sqlite3.Connection, group: Group) -> None:
    payload = encode_group(group)
    prompt_id = group.prompt.id
    row = (
        prompt_id,
        group.policy_version,
        len(group.samples),
        json.dumps(sorted(carried_names(group))),
        payload,
        checksum(group_address(prompt_id), payload),
    )
    connection.execute("INSERT INTO groups VALUES (?, ?, ?, ?, ?, ?)", row)


def holds_this_group(connection: sqlite3.Connection, group: Group) -> bool:
    """Whether the stored group of this prompt is, byte for byte, this one."""
    query = "SELECT checksum FROM groups WHERE prompt_id = ?"
    (stored,) = connection.execute(query, (group.prompt.id,)).fetchone()
    return bool(stored == checksum(group_address(group.prompt.id), encode_group(group)))


def insert_columns(connection: sqlite3.Connection, columns: Columns, names: Iterable[str], *, by_learner: bool) -> None:
    for name in names:
        payload = encode_column(columns, name)
        row = (
            columns.prompt_id,
            name,
            "score" if name in columns.scores else "token",
            int(by_learner),
            payload,
            checksum(column_address(columns.prompt_id, name), payload),
        )
        connection.execute("INSERT INTO columns VALUES (?, ?, ?, ?, ?, ?)", row)


def delete_group(connection: sqlite3.Connection, prompt_id: int) -> None:
    connection.execute("DELETE FROM columns WHERE prompt_id = ?", (prompt_id,))
    connection.execute("DELETE FROM groups WHERE prompt_id = ?", (prompt_id,))


def load_group(connection: sqlite3.Connection, path: Path, prompt_id: int) -> Group:
    """A stored group with all its stored columns. Raises DamagedExperience, and RunFailed where there is none."""
    query = "SELECT name, payload, checksum FROM columns WHERE prompt_id = ? ORDER BY name"
    return _load_group(connection, path, prompt_id, query)


def load_judged_group(connection: sqlite3.Connection, path: Path, prompt_id: int) -> Group:
    """The same without what the learner filled in: as it was before a step trained on it."""
    query = "SELECT name, payload, checksum FROM columns WHERE prompt_id = ? AND by_learner = 0 ORDER BY name"
    return _load_group(connection, path, prompt_id, query)


def _load_group(connection: sqlite3.Connection, path: Path, prompt_id: int, columns: str) -> Group:
    query = "SELECT payload, checksum FROM groups WHERE prompt_id = ?"
    row = connection.execute(query, (prompt_id,)).fetchone()
    if row is None:
        raise RunFailed(f"{path}: no group is stored for prompt {prompt_id}")
    group = read_group(prompt_id, row[0], row[1], path)
    for name, payload, expected in connection.execute(columns, (prompt_id,)):
        group = attach(group, read_column(prompt_id, name, payload, expected, path), f"{path}: columns")
    return group


def step_groups(connection: sqlite3.Connection, path: Path, step: int) -> list[Group]:
    """The groups of a step in the order in which it took them."""
    return [load_group(connection, path, prompt_id) for prompt_id in ledger.step_prompts(connection, step)]


def trained_groups(connection: sqlite3.Connection, path: Path, step: int) -> list[Group]:
    """The groups of a committed step as they were trained. Raises RunFailed for a step that is not committed."""
    if ledger.step_state(connection, step) != "trained":
        last = ledger.last_committed(connection)
        raise RunFailed(f"{path}: step {step} cannot be replayed: it is not committed; the last one that is: {last}")
    return step_groups(connection, path, step)


def attach(group: Group, columns: Columns, where: str) -> Group:
    """`group.with_columns`, with the place, the prompt and the column names in its error."""
    try:
        return group.with_columns(columns)
    except ValueError as error:
        names = ", ".join(sorted(columns.names))
        raise RunFailed(f"{where}: prompt {group.prompt.id}: {names} does not fit its group: {error}") from error


def read_group(prompt_id: int, payload: bytes, expected: bytes, path: Path) -> Group:
    """Decodes a row of `groups`. Raises DamagedExperience when the checksum, the contents or the prompt id is wrong."""
    where = f"{path}: groups: prompt {prompt_id}"
    _check(where, group_address(prompt_id), payload, expected)
    try:
        group = decode_group(payload)
    except UnreadablePayload as error:
        raise DamagedExperience(f"{where}: {error}") from error
    if group.prompt.id != prompt_id:
        raise DamagedExperience(f"{where}: the payload is the group of prompt {group.prompt.id}")
    return group


def read_column(prompt_id: int, name: str, payload: bytes, expected: bytes, path: Path) -> Columns:
    """Decodes a row of `columns`. Raises DamagedExperience when the checksum or the contents are wrong."""
    where = f"{path}: columns: prompt {prompt_id}, column '{name}'"
    _check(where, column_address(prompt_id, name), payload, expected)
    try:
        return decode_column(prompt_id, name, payload)
    except UnreadablePayload as error:
        raise DamagedExperience(f"{where}: {error}") from error


def carried_names(group: Group) -> frozenset[str]:
    """The columns that a group brings along: those that every sample has."""
    return frozenset.intersection(*(frozenset(sample.scores) | frozenset(sample.tokens) for sample in group.samples))


def carried_columns(group: Group, names: Iterable[str]) -> Columns:
    """Some of the columns that a group brings along, as a judge would hand them in."""
    wanted = sorted(names)
    scores = {n: [s.scores[n] for s in group.samples] for n in wanted if n in group.samples[0].scores}
    tokens = {n: [s.tokens[n] for s in group.samples] for n in wanted if n in group.samples[0].tokens}
    return Columns(group.prompt.id, scores, tokens)


def stored_names(connection: sqlite3.Connection, prompt_id: int) -> frozenset[str]:
    """The columns that a stored group has: those that came with it and those that were added."""
    row = connection.execute("SELECT carried FROM groups WHERE prompt_id = ?", (prompt_id,)).fetchone()
    carried = [] if row is None else json.loads(row[0])
    added = connection.execute("SELECT name FROM columns WHERE prompt_id = ?", (prompt_id,))
    return frozenset(carried) | frozenset(name for (name,) in added)


def group_address(prompt_id: int) -> str:
    return f"groups/{prompt_id}"


def column_address(prompt_id: int, name: str) -> str:
    return f"columns/{prompt_id}/{name}"


def _check(where: str, address: str, payload: bytes, expected: bytes) -> None:
    if not isinstance(payload, bytes) or checksum(address, payload) != expected:
        raise DamagedExperience(
            f"{where}: the checksum does not match the {len(payload)} bytes stored: the file was damaged after it was "
            f"written. `rlhf verify` lists everything that is damaged; restore the run directory from a copy"
        )
