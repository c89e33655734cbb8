"""Where each prompt is, and which step took it: the moves, the counts, the committed steps. Opens no payload.

    pending -> leased -> complete -> trained, or -> dropped

A prompt is leased while it is generated and judged, complete once all required columns are stored, and stays complete
when a step takes it (a row in step_groups) until that step is committed. Functions take an open connection and run
inside the caller's transaction.
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.buffer.schema import read_meta, write_meta
from rlhf.errors import RunFailed
from rlhf.interfaces import Counts, Lease

STATES = ("pending", "leased", "complete", "trained", "dropped")


@dataclass(frozen=True, slots=True)
class CommittedStep:
    """A step of the history.

    `fingerprint` is that of the weights after it, `rewound_fingerprint` the one that the step had before `rewind`
    sent it back to be trained again, None when that never happened. The two are equal when training is repeatable.
    """

    step: int
    version: int
    fingerprint: str
    metrics: Mapping[str, float]
    prompt_ids: tuple[int, ...]
    rewound_fingerprint: str | None


@dataclass(frozen=True, slots=True)
class Place:
    """Where one prompt is: its state, the ticket of its last lease, the failed attempts, whether its group is stored,
    and the step that took it."""

    state: str
    ticket: int
    attempts: int
    stored: bool
    step: int | None


def place(connection: sqlite3.Connection, path: Path, prompt_id: int) -> Place:
    """Raises RunFailed for a prompt that was never issued."""
    query = """SELECT state, ticket, attempts, EXISTS (SELECT 1 FROM groups WHERE prompt_id = prompts.id),
                      (SELECT step FROM step_groups WHERE prompt_id = prompts.id)
               FROM prompts WHERE id = ?"""
    row = connection.execute(query, (prompt_id,)).fetchone()
    if row is None:
        issued = read_meta(connection)["issued"]
        raise RunFailed(
            f"{path}: prompt {prompt_id} was never leased; {issued} prompts have been issued, counting up from 0"
        )
    return Place(row[0], row[1], row[2], bool(row[3]), row[4])


def lease(
    connection: sqlite3.Connection, count: int, owner: str, request: int, prompts_total: int | None
) -> list[Lease]:
    """Leases the lowest pending prompts, then new ones; a prompt that a worker died of or with is leased alone."""
    query = "SELECT id, attempts FROM prompts WHERE state = 'pending' ORDER BY id LIMIT ?"
    pending = connection.execute(query, (count,)).fetchall()
    suspect = next((place for place, (_, attempts) in enumerate(pending) if attempts), None)
    taken = pending if suspect is None else pending[: max(1, suspect)]
    ids = [prompt_id for prompt_id, _ in taken]
    if suspect is None:
        issued = int(read_meta(connection)["issued"])
        end = issued + count - len(ids)
        fresh = range(issued, end if prompts_total is None else max(issued, min(end, prompts_total)))
        connection.executemany("INSERT INTO prompts VALUES (?, 'pending', NULL, 0, NULL, NULL, 0, NULL)", zip(fresh))
        write_meta(connection, "issued", str(issued + len(fresh)))
        ids += fresh
    first = int(read_meta(connection)["ticket"]) + 1
    write_meta(connection, "ticket", str(first + len(ids) - 1))
    now = time.time()
    connection.executemany(
        "UPDATE prompts SET state = 'leased', owner = ?, ticket = ?, request = ?, leased_at = ? WHERE id = ?",
        [(owner, ticket, request, now, prompt_id) for ticket, prompt_id in enumerate(ids, first)],
    )
    return leases_of(connection, request)


def leases_of(connection: sqlite3.Connection, request: int) -> list[Lease]:
    """What a call of `lease` handed out, in the order of the tickets."""
    query = "SELECT id, ticket, attempts FROM prompts WHERE request = ? ORDER BY ticket"
    return [Lease(*row) for row in connection.execute(query, (request,))]


def set_state(connection: sqlite3.Connection, prompt_id: int, state: str) -> None:
    connection.execute("UPDATE prompts SET state = ? WHERE id = ?", (state, prompt_id))


def count_attempt(connection: sqlite3.Connection, prompt_id: int, reason: str) -> None:
    connection.execute("UPDATE prompts SET attempts = attempts + 1, reason = ? WHERE id = ?", (reason, prompt_id))


def set_dropped(connection: sqlite3.Connection, prompt_id: int, reason: str) -> None:
    connection.execute("UPDATE prompts SET state = 'dropped', reason = ? WHERE id = ?", (reason, prompt_id))


def return_leases(connection: sqlite3.Connection) -> None:
    """The leases of a process that is gone: pending again unless the group is stored. No attempt is counted.

    Its requests are forgotten: those of the next process begin anew."""
    connection.execute("UPDATE prompts SET request = NULL WHERE request IS NOT NULL")
    connection.execute(
        """UPDATE prompts SET state = 'pending', owner = NULL, leased_at = NULL
           WHERE state = 'leased' AND NOT EXISTS (SELECT 1 FROM groups WHERE prompt_id = prompts.id)"""
    )


def aged(connection: sqlite3.Connection, oldest_version: int) -> list[int]:
    """Complete prompts that no step has taken, with a sample older than oldest_version."""
    query = """SELECT id FROM prompts JOIN groups ON prompt_id = id
               WHERE state = 'complete' AND policy_version < ?
                     AND NOT EXISTS (SELECT 1 FROM step_groups WHERE step_groups.prompt_id = id) ORDER BY id"""
    return [prompt_id for (prompt_id,) in connection.execute(query, (oldest_version,))]


def discard(connection: sqlite3.Connection, prompt_id: int, reason: str) -> None:
    """Notes that the stored samples of a prompt are thrown away; it becomes pending."""
    connection.execute(
        """INSERT INTO discarded (prompt_id, policy_version, samples, reason)
           SELECT prompt_id, policy_version, samples, ? FROM groups WHERE prompt_id = ?""",
        (reason, prompt_id),
    )
    connection.execute(
        "UPDATE prompts SET state = 'pending', owner = NULL, leased_at = NULL WHERE id = ?", (prompt_id,)
    )


def untaken(connection: sqlite3.Connection, count: int) -> list[int]:
    """The lowest complete prompts that no step has taken."""
    query = """SELECT id FROM prompts WHERE state = 'complete'
               AND NOT EXISTS (SELECT 1 FROM step_groups WHERE prompt_id = id) ORDER BY id LIMIT ?"""
    return [prompt_id for (prompt_id,) in connection.execute(query, (count,))]


def taken_count(connection: sqlite3.Connection) -> int:
    query = "SELECT COUNT(*) FROM step_groups JOIN steps USING (step) WHERE state = 'taken'"
    return int(connection.execute(query).fetchone()[0])


def state_count(connection: sqlite3.Connection, state: str) -> int:
    return int(connection.execute("SELECT COUNT(*) FROM prompts WHERE state = ?", (state,)).fetchone()[0])


def step_state(connection: sqlite3.Connection, step: int) -> str | None:
    row = connection.execute("SELECT state FROM steps WHERE step = ?", (step,)).fetchone()
    return None if row is None else str(row[0])


def step_prompts(connection: sqlite3.Connection, step: int) -> list[int]:
    query = "SELECT prompt_id FROM step_groups WHERE step = ? ORDER BY position"
    return [prompt_id for (prompt_id,) in connection.execute(query, (step,))]


def assign(connection: sqlite3.Connection, step: int, prompt_ids: Sequence[int]) -> None:
    connection.execute("INSERT INTO steps (step, state) VALUES (?, 'taken')", (step,))
    rows = [(step, position, prompt_id) for position, prompt_id in enumerate(prompt_ids)]
    connection.executemany("INSERT INTO step_groups VALUES (?, ?, ?)", rows)


def set_trained(
    connection: sqlite3.Connection, step: int, version: int, fingerprint: str, metrics: Mapping[str, float]
) -> None:
    text = json.dumps({name: float(value) for name, value in metrics.items()})
    digest = step_checksum(step, version, fingerprint, text, step_prompts(connection, step))
    connection.execute(
        "UPDATE steps SET state = 'trained', version = ?, fingerprint = ?, metrics = ?, checksum = ? WHERE step = ?",
        (version, fingerprint, text, digest, step),
    )
    connection.execute(
        "UPDATE prompts SET state = 'trained' WHERE id IN (SELECT prompt_id FROM step_groups WHERE step = ?)", (step,)
    )


def set_rewound(connection: sqlite3.Connection, step: int) -> None:
    """A trained step as before its commit, but for `rewound_fingerprint`; the learner's columns are forgotten."""
    of_step = "(SELECT prompt_id FROM step_groups WHERE step = ?)"
    connection.execute(f"DELETE FROM columns WHERE by_learner = 1 AND prompt_id IN {of_step}", (step,))
    connection.execute(f"UPDATE prompts SET state = 'complete' WHERE id IN {of_step}", (step,))
    connection.execute(
        """UPDATE steps SET state = 'taken', rewound_fingerprint = fingerprint,
                  version = NULL, fingerprint = NULL, metrics = NULL, checksum = NULL WHERE step = ?""",
        (step,),
    )


def trained_steps(connection: sqlite3.Connection, start: int) -> list[int]:
    """The numbers of the trained steps from `start` on."""
    query = "SELECT step FROM steps WHERE state = 'trained' AND step >= ? ORDER BY step"
    return [step for (step,) in connection.execute(query, (start,))]


def last_committed(connection: sqlite3.Connection) -> int | None:
    step = connection.execute("SELECT MAX(step) FROM steps WHERE state = 'trained'").fetchone()[0]
    return None if step is None else int(step)


def history(connection: sqlite3.Connection) -> list[CommittedStep]:
    query = """SELECT step, version, fingerprint, metrics, rewound_fingerprint FROM steps
               WHERE state = 'trained' ORDER BY step"""
    return [
        CommittedStep(step, version, fingerprint, json.loads(metrics), tuple(step_prompts(connection, step)), rewound)
        for step, version, fingerprint, metrics, rewound in connection.execute(query).fetchall()
    ]


def step_checksum(step: int, version: int, fingerprint: str, metrics: str, prompt_ids: Sequence[int]) -> bytes:
    text = json.dumps(["steps", step, version, fingerprint, metrics, list(prompt_ids)])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def counts(connection: sqlite3.Connection) -> Counts:
    """Counted from the tables, not kept: a row that vanished or came twice shows up in lost and duplicated."""
    by_state: dict[str, int] = dict(connection.execute("SELECT state, COUNT(*) FROM prompts GROUP BY state"))
    generated = connection.execute(
        "SELECT COUNT(*) FROM prompts JOIN groups ON prompt_id = id WHERE state = 'leased'"
    ).fetchone()[0]
    return Counts(
        issued=int(read_meta(connection)["issued"]),
        pending=by_state.get("pending", 0),
        leased=by_state.get("leased", 0),
        generated=int(generated),
        complete=by_state.get("complete", 0),
        trained=by_state.get("trained", 0),
        dropped=by_state.get("dropped", 0),
        lost=len(lost(connection)),
        duplicated=len(duplicated(connection)),
    )


def lost(connection: sqlite3.Connection) -> dict[int, str]:
    """Issued prompts that are nowhere, and why: no row, an unknown state, or complete or trained without samples."""
    issued = int(read_meta(connection)["issued"])
    found = {
        prompt_id: f"is in the unknown state '{state}'"
        for prompt_id, state in connection.execute(
            f"SELECT id, state FROM prompts WHERE state NOT IN ({', '.join('?' * len(STATES))})", STATES
        )
    }
    query = """SELECT id, state FROM prompts WHERE state IN ('complete', 'trained')
               AND NOT EXISTS (SELECT 1 FROM groups WHERE prompt_id = id)"""
    found.update({prompt_id: f"is {state}, but its samples are gone" for prompt_id, state in connection.execute(query)})
    present, last = connection.execute("SELECT COUNT(*), MAX(id) FROM prompts").fetchone()
    end = max(issued, 0 if last is None else last + 1)
    if present != end:
        rows = {prompt_id for (prompt_id,) in connection.execute("SELECT id FROM prompts")}
        found.update({prompt_id: "was issued, but has no row" for prompt_id in range(end) if prompt_id not in rows})
    return found


def duplicated(connection: sqlite3.Connection) -> dict[int, str]:
    """Prompts that are in more than one step or have more than one group, whatever the tables' constraints say."""
    found: dict[int, str] = {}
    for table, what in (("step_groups", "was taken by {} steps"), ("groups", "has {} groups")):
        # NOT INDEXED and the unary plus: the count reads the rows themselves, not an index that may be the damaged part
        query = f"SELECT +prompt_id, COUNT(*) FROM {table} NOT INDEXED GROUP BY +prompt_id HAVING COUNT(*) > 1"
        found.update({prompt_id: what.format(count) for prompt_id, count in connection.execute(query)})
    return found
