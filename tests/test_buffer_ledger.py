"""Any sequence of moves against a model of the ledger that is a dictionary, and counts that find tampering."""

import sqlite3
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rlhf.buffer.audit import verify
from rlhf.buffer.store import ExperienceBuffer
from rlhf.errors import RunFailed
from rlhf.experience import Columns, Group, Prompt, Sample, Sampling

TOTAL, ATTEMPTS = 12, 2
IDS = st.integers(0, TOTAL - 1)
REQUIRED = frozenset({"reward", "rank"})


def small_group(prompt_id: int, version: int) -> Group:
    ids = np.array([1, 2], np.int32)
    versions = np.full(2, version, np.int32)
    mask, logprobs, sampling = np.ones(2, np.bool_), np.zeros(2, np.float32), Sampling(1.0, 1.0, 0, 2)
    sample = Sample(0, ids, mask, f"{version}", "stop", logprobs, versions, sampling, 0, {}, {})
    return Group(Prompt(prompt_id, 0, 0, "", "", ids, {}), (sample,), "policy")


class Moves(RuleBasedStateMachine):
    """The model: per prompt its state, its samples' version, its columns and attempts; per step its prompt ids."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "experience.db"
        self.buffer = ExperienceBuffer(self.path, REQUIRED, TOTAL, ATTEMPTS)
        self.buffer.open()
        self.state: dict[int, str] = {}
        self.version: dict[int, int] = {}
        self.columns: dict[int, set[str]] = {}
        self.attempts: dict[int, int] = {}
        self.steps: dict[int, list[int]] = {}
        self.committed: dict[int, str] = {}
        self.tickets: dict[int, int] = {}
        self.requests = 0

    def untaken(self) -> list[int]:
        taken = {i for ids in self.steps.values() for i in ids}
        return sorted(i for i, state in self.state.items() if state == "complete" and i not in taken)

    @rule(count=st.integers(0, 5))
    def lease(self, count: int) -> None:
        expected: list[int] = []
        for prompt_id in sorted(i for i, state in self.state.items() if state == "pending")[:count]:
            if not (self.attempts.get(prompt_id) and expected):
                expected.append(prompt_id)
            if self.attempts.get(prompt_id):
                break
        else:
            while len(expected) < count and len(self.state) < TOTAL:
                expected.append(len(self.state))
                self.state[len(self.state)] = "new"
        self.requests += 1
        leases = self.buffer.lease(count, "model", self.requests)
        assert [lease.prompt_id for lease in leases] == expected
        assert [lease.attempts for lease in leases] == [self.attempts.get(i, 0) for i in expected]
        assert self.buffer.lease(count, "model", self.requests) == leases or not leases, "the same call again"
        for lease in leases:
            assert lease.ticket > max(self.tickets.values(), default=0), "tickets grow"
            self.tickets[lease.prompt_id] = lease.ticket
            self.state[lease.prompt_id] = "leased"

    @rule(prompt_id=IDS, version=st.integers(0, 3), late=st.booleans())
    def add_group(self, prompt_id: int, version: int, late: bool) -> None:
        if prompt_id not in self.state:
            with pytest.raises(RunFailed):
                self.buffer.add_group(prompt_id, 1, small_group(prompt_id, version))
            return
        ticket = self.tickets[prompt_id] - late
        stored = self.version.get(prompt_id)
        if late or self.state[prompt_id] not in ("leased", "complete"):
            accepted = False
        elif stored is not None:
            accepted = version == stored  # the same answer again
        else:
            accepted = True
            self.version[prompt_id], self.columns[prompt_id] = version, set()
        assert self.buffer.add_group(prompt_id, ticket, small_group(prompt_id, version)) == accepted

    @rule(prompt_id=IDS, name=st.sampled_from(["reward", "rank", "extra"]))
    def add_columns(self, prompt_id: int, name: str) -> None:
        if prompt_id not in self.state:
            return
        taken = any(prompt_id in ids for ids in self.steps.values())
        accepted = (
            prompt_id in self.version
            and self.state[prompt_id] in ("leased", "complete")
            and not taken
            and name not in self.columns[prompt_id]
        )
        if accepted:
            self.columns[prompt_id].add(name)
            if self.columns[prompt_id] >= REQUIRED:
                self.state[prompt_id] = "complete"
        assert self.buffer.add_columns(prompt_id, Columns(prompt_id, {name: [1.0]}, {})) == accepted

    @rule(version=st.integers(0, 3))
    def finish_all_leased(self, version: int) -> None:
        """The usual course of things, which single moves at random rarely get to."""
        for prompt_id in sorted(i for i, state in self.state.items() if state == "leased"):
            self.add_group(prompt_id, version, False)
            for name in sorted(REQUIRED):
                self.add_columns(prompt_id, name)

    @rule(prompt_id=IDS, counted=st.booleans(), late=st.booleans())
    def release(self, prompt_id: int, counted: bool, late: bool) -> None:
        if prompt_id not in self.state:
            return
        if self.state[prompt_id] == "leased" and prompt_id not in self.version and not late:
            self.attempts[prompt_id] = self.attempts.get(prompt_id, 0) + counted
            self.state[prompt_id] = "dropped" if counted and self.attempts[prompt_id] >= ATTEMPTS else "pending"
        released = self.buffer.release(prompt_id, self.tickets[prompt_id] - late, "model", counted=counted)
        assert released == (self.state[prompt_id] != "dropped")

    @rule(oldest=st.integers(0, 3))
    def ready(self, oldest: int) -> None:
        for prompt_id in self.untaken():
            if self.version[prompt_id] < oldest:
                self.state[prompt_id] = "pending"
                del self.version[prompt_id], self.columns[prompt_id]
        assert self.buffer.ready(oldest) == len(self.untaken())

    @rule(step=st.integers(0, 4), count=st.integers(1, 3))
    def take(self, step: int, count: int) -> None:
        if step not in self.steps:
            if len(self.untaken()) < count:
                with pytest.raises(RunFailed):
                    self.buffer.take(step, count)
                return
            self.steps[step] = self.untaken()[:count]
        groups = self.buffer.take(step, count)
        assert [g.prompt.id for g in groups] == self.steps[step]
        assert [g.policy_version for g in groups] == [self.version[i] for i in self.steps[step]]

    @precondition(lambda self: self.steps)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.steps)))
        groups = self.buffer.take(step, 1)
        self.buffer.commit(step, groups, step + 1, self.committed.setdefault(step, f"f{step}"), {})
        for prompt_id in self.steps[step]:
            self.state[prompt_id] = "trained"

    @rule(step=st.integers(0, 4))
    def rewind(self, step: int) -> None:
        back = sorted(number for number in self.committed if number >= step)
        self.buffer.rewind(step)
        for number in back:
            del self.committed[number]
            for prompt_id in self.steps[number]:
                self.state[prompt_id] = "complete"

    @rule()
    def another_process_takes_over(self) -> None:
        """While the run goes on: the leases stay in force."""
        self.buffer.reopen()

    @rule()
    def new_process(self) -> None:
        self.requests = 0
        self.buffer.close()
        self.buffer.open()
        for prompt_id, state in self.state.items():
            if state == "leased" and prompt_id not in self.version:
                self.state[prompt_id] = "pending"

    @invariant()
    def counts_agree(self) -> None:
        counts = self.buffer.counts()
        states = list(self.state.values())
        found = (counts.pending, counts.leased, counts.complete, counts.trained, counts.dropped)
        assert found == tuple(states.count(s) for s in ("pending", "leased", "complete", "trained", "dropped"))
        assert (counts.issued, counts.lost, counts.duplicated) == (len(self.state), 0, 0)
        waiting = {i: REQUIRED - self.columns[i] for i, s in self.state.items() if s == "leased" and i in self.version}
        assert self.buffer.unjudged() == waiting and counts.generated == len(waiting)
        assert self.buffer.in_flight() == states.count("leased") + len(self.untaken())
        assert self.buffer.last_committed() == max(self.committed, default=None)

    def teardown(self) -> None:
        self.buffer.close()
        assert verify(self.path).problems == []
        self.folder.cleanup()


TestMoves = Moves.TestCase
TestMoves.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A buffer of six prompts: 0-3 trained in steps 0 and 1, 4 complete, 5 leased; closed."""
    path = tmp_path / "experience.db"
    buffer = ExperienceBuffer(path, frozenset(), None, 3)
    buffer.open()
    for lease in buffer.lease(6, "a", 0)[:5]:
        buffer.add_group(lease.prompt_id, lease.ticket, small_group(lease.prompt_id, 0))
    for step in range(2):
        buffer.commit(step, buffer.take(step, 2), step + 1, "f", {"x": 0.5})
    buffer.close()
    assert verify(path).ok
    return path


@pytest.mark.parametrize(
    ("tampering", "lost", "duplicated", "message"),
    [
        ("DELETE FROM prompts WHERE id = 5", 1, 0, "prompt 5 was issued, but has no row"),
        ("DELETE FROM groups WHERE prompt_id = 2", 1, 0, "prompt 2 is trained, but its samples are gone"),
        ("DELETE FROM groups WHERE prompt_id = 4", 1, 0, "prompt 4 is complete, but its samples are gone"),
        ("UPDATE prompts SET state = 'pending' WHERE id = 4", 0, 0, "prompt 4 is pending, but has a stored group"),
        (
            "UPDATE prompts SET state = 'trained' WHERE id = 4",
            0,
            0,
            "prompt 4 is trained, but no committed step has it",
        ),
        (
            "UPDATE prompts SET state = 'complete' WHERE id = 1",
            0,
            0,
            "prompt 1 belongs to a committed step, but is complete",
        ),
        ("UPDATE prompts SET state = 'taken' WHERE id = 1", 1, 0, "prompt 1 is in the unknown state 'taken'"),
        ("INSERT INTO step_groups VALUES (1, 2, 0)", 0, 1, "prompt 0 was taken by 2 steps"),
        ("INSERT INTO groups SELECT * FROM groups WHERE prompt_id = 3", 0, 1, "prompt 3 has 2 groups"),
        ("UPDATE groups SET policy_version = 9 WHERE prompt_id = 3", 0, 0, "the row says version 9"),
        ("UPDATE steps SET fingerprint = 'g' WHERE step = 1", 0, 0, "step 1: the checksum does not match"),
        ("UPDATE meta SET value = '5' WHERE key = 'issued'", 0, 0, "prompt 5 was issued beyond"),
    ],
)
def test_tampering_is_counted_and_named(trained: Path, tampering: str, lost: int, duplicated: int, message: str):
    """The tables are rebuilt without their constraints first, so that nothing but the counting can notice."""
    with sqlite3.connect(trained) as connection:
        for table in ("prompts", "groups", "step_groups"):
            connection.execute(f"CREATE TABLE free AS SELECT * FROM {table}")
            connection.execute(f"DROP TABLE {table}")
            connection.execute(f"ALTER TABLE free RENAME TO {table}")
        connection.execute(tampering)
    connection.close()
    report = verify(trained)
    assert (report.ledger["lost"], report.ledger["duplicated"]) == (lost, duplicated)
    assert not report.ok and any(message in problem for problem in report.problems), report.problems
