"""Looking at a buffer without touching it: `verify` checks everything, `ExperienceView` answers inspect, replay and
export.

Both open the file read-only and see one moment of it, so they work beside a live run. `verify` never raises for what is
wrong with the file: whatever is wrong is a line of its report.
"""

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.buffer import ledger
from rlhf.buffer.payloads import (
    carried_names,
    load_group,
    load_judged_group,
    read_column,
    read_group,
    stored_names,
    trained_groups,
)
from rlhf.buffer.schema import SCHEMA_VERSION, DamagedExperience, read_meta, reader
from rlhf.errors import BadInput
from rlhf.experience import Group
from rlhf.interfaces import Counts

LEDGER_KEYS = ("issued", "pending", "leased", "complete", "trained", "dropped", "lost", "duplicated")


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found. `ledger` is all zeros where the file cannot be counted; then `problems` says why."""

    ok: bool
    ledger: Mapping[str, int]
    problems: list[str]

    def as_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "ledger": dict(self.ledger), "problems": self.problems}


@dataclass(frozen=True, slots=True)
class Holding:
    """The prompts that one engine holds, and since when the oldest (seconds since 1970; a clock may have been set)."""

    prompt_ids: tuple[int, ...]
    since: float


@dataclass(frozen=True, slots=True)
class Overview:
    """Where a run stands, for `rlhf inspect`.

    drop_reasons and discard_reasons count prompts by reason, attempts counts prompts by their number of failed leases
    (those with none are left out), leases are the prompts that are being generated, by who holds them, pinned holds
    what the run is tied to.
    """

    counts: Counts
    steps_trained: int
    last_step: int | None
    last_version: int | None
    last_fingerprint: str | None
    steps_taken: tuple[int, ...]
    drop_reasons: Mapping[str, int]
    discard_reasons: Mapping[str, int]
    attempts: Mapping[int, int]
    leases: Mapping[str, Holding]
    pinned: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored group by its prompt: how many samples it has, their oldest version (None: data), its checksum."""

    prompt_id: int
    samples: int
    policy_version: int | None
    checksum: str


class ExperienceView:
    """A buffer opened read-only. Every call sees the file as it is at that moment; BadInput where it is unreadable."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def overview(self) -> Overview:
        with self._reading() as connection:
            steps = ledger.history(connection)
            last = steps[-1] if steps else None
            taken = connection.execute("SELECT step FROM steps WHERE state = 'taken' ORDER BY step")
            tally = _tally(connection)
            return Overview(
                counts=ledger.counts(connection),
                steps_trained=len(steps),
                last_step=None if last is None else last.step,
                last_version=None if last is None else last.version,
                last_fingerprint=None if last is None else last.fingerprint,
                steps_taken=tuple(step for (step,) in taken),
                drop_reasons=tally("reason", "prompts WHERE state = 'dropped'"),
                discard_reasons=tally("reason", "discarded"),
                attempts=tally("attempts", "prompts WHERE attempts > 0"),
                leases=_leases(connection),
                pinned={
                    key.removeprefix("pinned: "): value
                    for key, value in read_meta(connection).items()
                    if key.startswith("pinned: ")
                },
            )

    def drop_reasons(self) -> dict[str, int]:
        """Dropped prompts by reason."""
        with self._reading() as connection:
            return _tally(connection)("reason", "prompts WHERE state = 'dropped'")

    def counts(self) -> Counts:
        with self._reading() as connection:
            return ledger.counts(connection)

    def history(self) -> list[ledger.CommittedStep]:
        with self._reading() as connection:
            return ledger.history(connection)

    def replay(self, step: int) -> list[Group]:
        """The groups of a committed step as they were trained. Raises RunFailed for a step that is not committed."""
        with self._reading() as connection:
            return trained_groups(connection, self.path, step)

    def group(self, prompt_id: int) -> Group:
        with self._reading() as connection:
            return load_group(connection, self.path, prompt_id)

    def judged_group(self, prompt_id: int) -> Group:
        """A group as it was before a step trained on it."""
        with self._reading() as connection:
            return load_judged_group(connection, self.path, prompt_id)

    def in_training_order(self) -> list["Stored"]:
        """The groups that were trained or can be: those of steps as the steps had them, then the complete ones by
        prompt id."""
        query = """SELECT id, samples, policy_version, hex(groups.checksum) FROM prompts
                   JOIN groups ON groups.prompt_id = id LEFT JOIN step_groups ON step_groups.prompt_id = id
                   WHERE state IN ('complete', 'trained') ORDER BY step IS NULL, step, position, id"""
        with self._reading() as connection:
            return [Stored(*row) for row in connection.execute(query)]

    def column_names(self) -> dict[str, str]:
        """All columns that any stored group has, and whether each is a "score" or a "token" column."""
        with self._reading() as connection:
            names: dict[str, str] = dict(connection.execute("SELECT DISTINCT name, kind FROM columns"))
            for prompt_id, carried in connection.execute("SELECT MIN(prompt_id), carried FROM groups GROUP BY carried"):
                if carried != "[]":
                    sample = load_group(connection, self.path, prompt_id).samples[0]
                    names.update(dict.fromkeys(sample.scores, "score") | dict.fromkeys(sample.tokens, "token"))
            return names

    def stored(self) -> Iterator[tuple[Group, str, int | None]]:
        """Every stored group by prompt id, one at a time, with its prompt's state and the step that trained it."""
        query = """SELECT id, prompts.state, steps.step FROM prompts JOIN groups ON groups.prompt_id = id
                   LEFT JOIN step_groups ON step_groups.prompt_id = id
                   LEFT JOIN steps ON steps.step = step_groups.step AND steps.state = 'trained' ORDER BY id"""
        with self._reading() as connection:
            for prompt_id, state, step in connection.execute(query):
                yield load_group(connection, self.path, prompt_id), state, step

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        try:
            with reader(self.path) as connection:
                yield connection
        except sqlite3.DatabaseError as error:
            raise BadInput(
                f"{self.path}: not readable as an experience buffer: {error}. `rlhf verify` says more"
            ) from error


def verify(path: Path) -> Verification:
    """Checks the structure of the file, every checksum, every ledger invariant. Never raises for what it finds."""
    problems: list[str] = []
    counted = dict.fromkeys(LEDGER_KEYS, 0)
    try:
        with reader(path) as connection:
            for check in (_structure, _ledger_rows, _steps, _groups, _columns):
                _attempt(check, connection, path, problems)
            _attempt(_count_into(counted), connection, path, problems)
    except sqlite3.Error as error:
        problems.append(f"{path}: cannot be read: {error}")
    return Verification(not problems, counted, problems)


Check = Callable[[sqlite3.Connection, Path, list[str]], None]


def _attempt(check: Check, connection: sqlite3.Connection, path: Path, problems: list[str]) -> None:
    """One check; where the file is too damaged for it, that is its finding, and the next check has its turn."""
    try:
        check(connection, path, problems)
    except (sqlite3.Error, KeyError, ValueError, TypeError, OverflowError) as error:
        what = (check.__doc__ or check.__name__).rstrip(".")
        problems.append(f"{path}: could not be checked ({what}): {type(error).__name__}: {error}")


def _count_into(counted: dict[str, int]) -> Check:
    def count(connection: sqlite3.Connection, path: Path, problems: list[str]) -> None:
        """Counts of the ledger."""
        found = asdict(ledger.counts(connection))
        counted.update({key: found[key] for key in LEDGER_KEYS})
        parts = sum(found[state] for state in ledger.STATES)
        if parts != found["issued"]:
            problems.append(f"{path}: {found['issued']} prompts were issued, but {parts} are in a known state")

    return count


def _structure(connection: sqlite3.Connection, path: Path, problems: list[str]) -> None:
    """SQLite's own integrity, foreign keys and the schema version."""
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "meta" not in tables:
        problems.append(
            f"{path}: not an experience buffer, or one whose set-up was interrupted: it has no table 'meta'"
        )
        return
    for (line,) in connection.execute("PRAGMA integrity_check"):
        if line != "ok":
            problems.append(f"{path}: SQLite integrity: {line}")
    for table, row, parent, _ in connection.execute("PRAGMA foreign_key_check"):
        problems.append(f"{path}: {table}: row {row} points to a row of {parent} that is not there")
    found = read_meta(connection).get("schema")
    if found != SCHEMA_VERSION:
        problems.append(f"{path}: schema {found}, this version reads {SCHEMA_VERSION}")


def _ledger_rows(connection: sqlite3.Connection, path: Path, problems: list[str]) -> None:
    """Prompts lost, duplicated, or with contradicting rows."""
    for found in (ledger.lost(connection), ledger.duplicated(connection)):
        problems.extend(f"{path}: prompts: prompt {prompt_id} {what}" for prompt_id, what in sorted(found.items()))
    contradictions = (
        (
            "is pending, but has a stored group",
            "state = 'pending' AND EXISTS (SELECT 1 FROM groups WHERE prompt_id = id)",
        ),
        ("is trained, but no committed step has it", f"state = 'trained' AND id NOT IN ({_IN_STEP.format('trained')})"),
        ("belongs to a committed step, but is {}", f"state <> 'trained' AND id IN ({_IN_STEP.format('trained')})"),
        ("is taken by a step, but is {}", f"state <> 'complete' AND id IN ({_IN_STEP.format('taken')})"),
        (
            "was issued beyond the number of issued prompts",
            "id >= (SELECT CAST(value AS INTEGER) FROM meta WHERE key = 'issued')",
        ),
    )
    for what, condition in contradictions:
        for prompt_id, state in connection.execute(f"SELECT id, state FROM prompts WHERE {condition} ORDER BY id"):
            problems.append(f"{path}: prompts: prompt {prompt_id} {what.format(state)}")


_IN_STEP = "SELECT prompt_id FROM step_groups JOIN steps USING (step) WHERE steps.state = '{}'"


def _steps(connection: sqlite3.Connection, path: Path, problems: list[str]) -> None:
    """Committed steps: checksum, groups, order of prompt ids."""
    rows = connection.execute("SELECT step, state, version, fingerprint, metrics, checksum FROM steps ORDER BY step")
    for step, state, version, fingerprint, metrics, checksum in rows.fetchall():
        ids = ledger.step_prompts(connection, step)
        if not ids or ids != sorted(ids):
            problems.append(f"{path}: step_groups: step {step} has prompts {ids}, expected some, in ascending order")
        if state == "trained" and checksum != ledger.step_checksum(step, version, fingerprint, metrics, ids):
            problems.append(f"{path}: steps: step {step}: the checksum does not match the record")


def _groups(connection: sqlite3.Connection, path: Path, problems: list[str]) -> None:
    """Checksum and contents of every group."""
    required = _required(connection)
    query = """SELECT prompt_id, policy_version, samples, groups.payload, checksum, prompts.state
               FROM groups LEFT JOIN prompts ON prompts.id = prompt_id ORDER BY prompt_id"""
    for prompt_id, version, samples, payload, checksum, state in connection.execute(query):
        try:
            group = read_group(prompt_id, payload, checksum, path)
        except DamagedExperience as error:
            problems.append(str(error))
            continue
        if (group.policy_version, len(group.samples)) != (version, samples):
            problems.append(
                f"{path}: groups: prompt {prompt_id}: the row says version {version} and {samples} samples, its "
                f"payload {group.policy_version} and {len(group.samples)}"
            )
        missing = required - stored_names(connection, prompt_id)
        if missing and state in ("complete", "trained"):
            problems.append(f"{path}: columns: prompt {prompt_id} is {state}, but lacks {sorted(missing)}")
        if not carried_names(group) <= stored_names(connection, prompt_id):
            problems.append(f"{path}: groups: prompt {prompt_id}: the row does not list all columns of its payload")


def _columns(connection: sqlite3.Connection, path: Path, problems: list[str]) -> None:
    """Checksum and contents of every column."""
    for prompt_id, name, payload, checksum in connection.execute(
        "SELECT prompt_id, name, payload, checksum FROM columns ORDER BY prompt_id, name"
    ):
        try:
            read_column(prompt_id, name, payload, checksum, path)
        except DamagedExperience as error:
            problems.append(str(error))


def _required(connection: sqlite3.Connection) -> frozenset[str]:
    names = read_meta(connection).get("pinned: required columns", "none")
    return frozenset() if names == "none" else frozenset(names.split(" "))


def _leases(connection: sqlite3.Connection) -> dict[str, Holding]:
    query = """SELECT owner, id, leased_at FROM prompts WHERE state = 'leased'
               AND NOT EXISTS (SELECT 1 FROM groups WHERE prompt_id = id) ORDER BY owner, id"""
    rows: dict[str, list[tuple[int, float]]] = {}
    for owner, prompt_id, leased_at in connection.execute(query):
        rows.setdefault(owner, []).append((prompt_id, leased_at))
    return {
        owner: Holding(tuple(prompt_id for prompt_id, _ in held), min(since for _, since in held))
        for owner, held in rows.items()
    }


def _tally(connection: sqlite3.Connection) -> Callable[[str, str], dict[Any, int]]:
    def tally(column: str, source: str) -> dict[Any, int]:
        return dict(connection.execute(f"SELECT {column}, COUNT(*) FROM {source} GROUP BY {column} ORDER BY {column}"))

    return tally
