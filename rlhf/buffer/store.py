"""`ExperienceBuffer`: the Buffer of rlhf/interfaces.py on one SQLite file. Handles are the values themselves.

Every call is one transaction: it happened, durably, when it returns, or it did not happen. A killed process leaves a
buffer that opens again with nothing lost: prompts that were being generated are pending again, stored groups stay
stored. Imports neither torch nor ray; `actors/` hosts it, the in-process team calls it.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf.buffer import ledger
from rlhf.buffer.payloads import (
    attach,
    carried_columns,
    carried_names,
    delete_group,
    holds_this_group,
    insert_columns,
    insert_group,
    load_group,
    step_groups,
    stored_names,
    trained_groups,
)
from rlhf.buffer.schema import Writer, read_meta, write_meta
from rlhf.chaos.points import point
from rlhf.errors import BadInput, RunFailed
from rlhf.experience import Columns, Group
from rlhf.interfaces import Counts, Lease


class ExperienceBuffer:
    """The prompt ledger and the store of groups of one run.

    Args: path, the database file, created where missing; required_columns, what judges must fill before a group is
    complete (empty: complete when stored); prompts_total, how many prompt ids exist, rows x epochs (None: endless);
    max_attempts, how many leases of a prompt may come to nothing before it is dropped. Does not know epochs, rows,
    algorithms or time limits.
    """

    def __init__(
        self, path: Path, required_columns: frozenset[str], prompts_total: int | None, max_attempts: int
    ) -> None:
        if max_attempts < 1:
            raise ValueError(f"max_attempts is {max_attempts}, expected at least 1")
        self.path = path
        self.required_columns = required_columns
        self.prompts_total = prompts_total
        self.max_attempts = max_attempts
        self._opened: Writer | None = None

    def open(self) -> None:
        """Opens or creates the file and returns the leases of the process that had it before.

        Stored groups that lack columns stay leased and show up in `unjudged`. A process that had the file open loses
        the right to write. Raises BadInput when the file is no buffer or was started with other required columns.
        """
        self.close()
        self._opened = Writer(self.path)
        self.pin("required columns", " ".join(sorted(self.required_columns)) or "none")
        with self._opened.moving() as connection:
            ledger.return_leases(connection)

    def reopen(self) -> None:
        """As `open`, for a process that takes the place of a dead one while the run goes on: its leases stay in force,
        because the engines that hold them are alive, and its calls can be repeated."""
        self.close()
        self._opened = Writer(self.path)

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def pin(self, name: str, value: str) -> None:
        """Ties the run to a fact that must not change (seed, fingerprint of the data). Raises BadInput if it did."""
        key = f"pinned: {name}"
        with self._writer.moving() as connection:
            found = read_meta(connection).get(key)
            if found is None:
                write_meta(connection, key, value)
            elif found != value:
                raise BadInput(
                    f"{self.path}: this run was started with {name} '{found}', now it is '{value}'. Prompt ids and "
                    f"samples of the one have no meaning in the other: restore it, choose another --run-dir, or start "
                    f"anew with --fresh"
                )

    def lease(self, count: int, owner: str, request: int) -> list[Lease]:
        """Up to `count` prompts: pending ones, lowest first, then new ones counting up to prompts_total.

        A prompt with failed attempts is leased alone, so that a further death is its own. The same `request` again, by
        a caller who lost the answer, gets the leases that it got. Tickets never repeat, not even in later processes.
        """
        with self._writer.moving() as connection:
            leases = ledger.leases_of(connection, request)
            leases = leases or ledger.lease(connection, count, owner, request, self.prompts_total)
            point("lease: not committed")
            return leases

    def add_group(self, prompt_id: int, ticket: int, group: Group) -> bool:
        """Stores the samples of a leased prompt; complete at once when the group brings all required columns.

        False, and nothing stored, for a late or second answer: the lease of this ticket has ended, or the prompt has
        other samples. True for the same answer again, by a caller who lost the first reply. Raises BadInput when a
        column of the prompt's row cannot be stored, RunFailed when the group is that of another prompt.
        """
        if group.prompt.id != prompt_id:
            raise RunFailed(f"{self.path}: the group of prompt {group.prompt.id} was handed in for prompt {prompt_id}")
        with self._writer.moving() as connection:
            now = ledger.place(connection, self.path, prompt_id)
            if now.ticket != ticket or now.state not in ("leased", "complete"):
                return False
            if now.stored:
                return holds_this_group(connection, group)
            insert_group(connection, group)
            self._complete_if_whole(connection, prompt_id)
            point("group: not committed", prompt_id)
        point("group: stored", prompt_id)
        return True

    def add_columns(self, prompt_id: int, columns: Columns) -> bool:
        """Stores the columns that the group lacks; those it has stay as they are. False when nothing new was stored.

        Nothing is stored for a prompt without samples or one that a step has taken. Raises RunFailed, naming the
        column, when its length is not that of the samples. Columns carry no version: hand in only what was judged
        from `group`.
        """
        if columns.prompt_id != prompt_id:
            raise RunFailed(f"{self.path}: columns of prompt {columns.prompt_id} were handed in for prompt {prompt_id}")
        with self._writer.moving() as connection:
            now = ledger.place(connection, self.path, prompt_id)
            if not now.stored or now.step is not None or now.state not in ("leased", "complete"):
                return False
            new = columns.names - stored_names(connection, prompt_id)
            if not new:
                return False
            attach(load_group(connection, self.path, prompt_id), columns, "judge's answer")
            insert_columns(connection, columns, sorted(new), by_learner=False)
            if now.state == "leased":
                self._complete_if_whole(connection, prompt_id)
            point("columns: not committed", prompt_id)
            return True

    def release(self, prompt_id: int, ticket: int, reason: str, *, counted: bool) -> bool:
        """Ends a lease that came to nothing: pending again, or dropped at max_attempts. False once dropped.

        `counted`: the prompt may be the cause, so it is an attempt. Nothing happens when the lease has ended already
        or its group is stored.
        """
        with self._writer.moving() as connection:
            now = ledger.place(connection, self.path, prompt_id)
            if now.state != "leased" or now.ticket != ticket or now.stored:
                return now.state != "dropped"
            if counted:
                ledger.count_attempt(connection, prompt_id, reason)
                if now.attempts + 1 >= self.max_attempts:
                    ledger.set_dropped(connection, prompt_id, reason)
                    return False
            ledger.set_state(connection, prompt_id, "pending")
            return True

    def drop(self, prompt_id: int, reason: str) -> None:
        """The prompt will not be trained; its samples stay for the export. The first reason stays.

        Raises RunFailed for a prompt that a step has taken.
        """
        with self._writer.moving() as connection:
            now = ledger.place(connection, self.path, prompt_id)
            if now.step is not None:
                raise RunFailed(
                    f"{self.path}: prompt {prompt_id} cannot be dropped ({reason}): it belongs to step {now.step}"
                )
            if now.state != "dropped":
                ledger.set_dropped(connection, prompt_id, reason)

    def unjudged(self) -> Mapping[int, frozenset[str]]:
        """Stored groups that lack required columns, lowest prompt first, and which they lack."""
        query = "SELECT id FROM prompts JOIN groups ON prompt_id = id WHERE state = 'leased' ORDER BY id"
        with self._writer.reading() as connection:
            ids = [prompt_id for (prompt_id,) in connection.execute(query)]
            return {prompt_id: self.required_columns - stored_names(connection, prompt_id) for prompt_id in ids}

    def group(self, prompt_id: int) -> Group:
        """A stored group with all columns stored so far. Raises DamagedExperience when it is not what was written."""
        with self._writer.reading() as connection:
            return load_group(connection, self.path, prompt_id)

    def ready(self, oldest_version: int) -> int:
        """How many complete groups can be taken now.

        First, those that no step has taken and that hold a sample older than oldest_version lose their samples and are
        pending again. Data that no policy sampled never ages.
        """
        with self._writer.moving() as connection:
            for prompt_id in ledger.aged(connection, oldest_version):
                ledger.discard(connection, prompt_id, "older than max_staleness")
                delete_group(connection, prompt_id)
            return ledger.state_count(connection, "complete") - ledger.taken_count(connection)

    def take(self, step: int, count: int) -> list[Group]:
        """Assigns the `count` lowest complete groups to a step, for good, and returns them in the order of their ids.

        A step that was assigned before, by this process or one that died, gets the same groups whatever `count` is.
        Raises RunFailed when fewer than `count` are complete.
        """
        with self._writer.moving() as connection:
            if ledger.step_state(connection, step) is None:
                ids = ledger.untaken(connection, count)
                if len(ids) < count or not ids:
                    raise RunFailed(
                        f"{self.path}: step {step} needs {max(count, 1)} complete groups, {len(ids)} are there: wait "
                        f"until `ready` says so"
                    )
                ledger.assign(connection, step, ids)
                point("take: not committed")
            groups = step_groups(connection, self.path, step)
        point("take: durable")
        return groups

    def assigned(self, step: int) -> bool:
        with self._writer.reading() as connection:
            return ledger.step_state(connection, step) is not None

    def commit(
        self, step: int, groups: Sequence[Group], version: int, fingerprint: str, metrics: Mapping[str, float]
    ) -> None:
        """Makes a step part of history: its prompts are trained, and columns that only the groups have are stored.

        `version` and `fingerprint` are those of the weights after the step. A second commit of the same step is
        compared with the record and changes nothing; it raises RunFailed where the two differ, as it does for groups
        that are not the step's.
        """
        ids = [group.prompt.id for group in groups]
        point("commit: begun")
        with self._writer.moving() as connection:
            state = ledger.step_state(connection, step)
            expected = ledger.step_prompts(connection, step)
            if state is None or ids != expected:
                raise RunFailed(
                    f"{self.path}: step {step} was to be committed with prompts {ids}, but it took {expected}"
                )
            if state == "trained":
                self._compare(connection, step, version, fingerprint)
                return
            for group in groups:
                new = carried_names(group) - stored_names(connection, group.prompt.id)
                insert_columns(connection, carried_columns(group, new), sorted(new), by_learner=True)
            ledger.set_trained(connection, step, version, fingerprint, metrics)
            point("commit: not committed")
        point("commit: durable")

    def last_committed(self) -> int | None:
        with self._writer.reading() as connection:
            return ledger.last_committed(connection)

    def history(self) -> list[ledger.CommittedStep]:
        with self._writer.reading() as connection:
            return ledger.history(connection)

    def replay(self, step: int) -> list[Group]:
        """The groups of a committed step as they were trained, the learner's columns included."""
        with self._writer.reading() as connection:
            return trained_groups(connection, self.path, step)

    def rewind(self, step: int) -> None:
        """Sends the committed steps from `step` on back to be trained again, for a restart from an older checkpoint.

        They keep their groups, so that `take` returns these and nothing is generated again, and lose what their commit
        added: the learner's columns, version, metrics. Their prompts count as complete until the next commit; the old
        fingerprint stays in the history for comparison. Steps that were only taken stay so.
        """
        with self._writer.moving() as connection:
            for number in ledger.trained_steps(connection, step):
                ledger.set_rewound(connection, number)

    def counts(self) -> Counts:
        with self._writer.reading() as connection:
            return ledger.counts(connection)

    def in_flight(self) -> int:
        """Prompts that are leased, or complete and not yet taken by a step."""
        with self._writer.reading() as connection:
            open_prompts = ledger.state_count(connection, "leased") + ledger.state_count(connection, "complete")
            return open_prompts - ledger.taken_count(connection)

    @property
    def _writer(self) -> Writer:
        if self._opened is None:
            raise RunFailed(f"{self.path}: the buffer is closed: call open() first")
        return self._opened

    def _complete_if_whole(self, connection: sqlite3.Connection, prompt_id: int) -> None:
        if self.required_columns <= stored_names(connection, prompt_id):
            ledger.set_state(connection, prompt_id, "complete")

    def _compare(self, connection: sqlite3.Connection, step: int, version: int, fingerprint: str) -> None:
        query = "SELECT version, fingerprint FROM steps WHERE step = ?"
        recorded = connection.execute(query, (step,)).fetchone()
        if recorded != (version, fingerprint):
            raise RunFailed(
                f"{self.path}: step {step} is committed with version {recorded[0]} and fingerprint {recorded[1]}; "
                f"training it again gave version {version} and fingerprint {fingerprint}. `rlhf replay --step {step}` "
                f"shows where they part; after a restart from an older checkpoint call rewind({step}) first"
            )
