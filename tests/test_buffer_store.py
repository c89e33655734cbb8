"""The durable buffer on real SQLite files: moves, resume, rewind. Crashes and damage have files of their own."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf.buffer.audit import ExperienceView, verify
from rlhf.buffer.offline import Completion, dataset_group
from rlhf.buffer.store import ExperienceBuffer
from rlhf.errors import BadInput, RunFailed
from rlhf.experience import Columns, Group

REQUIRED = frozenset({"reward", "ref_logprobs"})

REQUESTS = itertools.count()
TICKETS: dict[tuple[Path, int], int] = {}


def lease(buffer: ExperienceBuffer, count: int, owner: str) -> list[int]:
    """The ids alone, as a new request; `add` and `release` then name the ticket of the latest lease."""
    leases = buffer.lease(count, owner, next(REQUESTS))
    TICKETS.update({(buffer.path, each.prompt_id): each.ticket for each in leases})
    return [each.prompt_id for each in leases]


def add(buffer: ExperienceBuffer, prompt_id: int, group: Group) -> bool:
    return buffer.add_group(prompt_id, TICKETS[buffer.path, prompt_id], group)


def release(buffer: ExperienceBuffer, prompt_id: int, reason: str) -> bool:
    return buffer.release(prompt_id, TICKETS[buffer.path, prompt_id], reason, counted=True)


def rewards(group: Group) -> Columns:
    return Columns(group.prompt.id, {"reward": [0.1 + s.index if s.index else None for s in group.samples]}, {})


def references(group: Group) -> Columns:
    arrays = [np.full(len(s.token_ids), -1.5 - s.index, np.float32) for s in group.samples]
    return Columns(group.prompt.id, {}, {"ref_logprobs": arrays})


def with_old(groups: list[Group], value: float) -> list[Group]:
    return [
        g.with_columns(
            Columns(
                g.prompt.id, {}, {"old_logprobs": [np.full(len(s.token_ids), value, np.float32) for s in g.samples]}
            )
        )
        for g in groups
    ]


@pytest.fixture
def make_group(rollout):
    return lambda prompt_id, version, samples=2, length=5: rollout(prompt_id, version, samples, length, {"level": 0.1})


@pytest.fixture
def complete(make_group):
    def fill(buffer: ExperienceBuffer, count: int, version: int) -> list[int]:
        ids = lease(buffer, count, "test")
        for prompt_id in ids:
            group = make_group(prompt_id, version)
            assert add(buffer, prompt_id, group)
            assert buffer.add_columns(prompt_id, rewards(group)) and buffer.add_columns(prompt_id, references(group))
        return ids

    return fill


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "experience.db"


@pytest.fixture
def opened(path: Path):
    buffers = []

    def make(required: frozenset[str] = REQUIRED, total: int | None = None, attempts: int = 3) -> ExperienceBuffer:
        buffer = ExperienceBuffer(path, required, total, attempts)
        buffer.open()
        buffers.append(buffer)
        return buffer

    yield make
    for buffer in buffers:
        buffer.close()


@pytest.mark.parametrize("value", [(1, 2), {1: "a"}, {"a": {2}}, np.float32(1), b"x"])
def test_a_column_that_json_would_change_is_refused_by_name(opened, value, make_group):
    buffer = opened(frozenset())
    (prompt_id,) = lease(buffer, 1, "test")
    group = replace(
        make_group(prompt_id, 0), prompt=replace(make_group(prompt_id, 0).prompt, columns={"good": 1, "when": value})
    )
    with pytest.raises(BadInput, match=r"row 0 \(prompt 0\), column 'when'"):
        add(buffer, prompt_id, group)
    assert buffer.counts().leased == 1


def test_a_prompt_goes_through_all_states(opened, path: Path, make_group, plain):
    buffer = opened()
    assert lease(buffer, 3, "rollout") == [0, 1, 2]
    group = make_group(0, 4)
    assert add(buffer, 0, group) and not add(buffer, 0, make_group(0, 5))
    assert buffer.unjudged() == {0: REQUIRED}
    assert buffer.add_columns(0, rewards(group))
    assert not buffer.add_columns(0, Columns(0, {"reward": [9.0, 9.0]}, {})), "the first answer stays"
    assert buffer.unjudged() == {0: frozenset({"ref_logprobs"})} and buffer.ready(0) == 0
    assert buffer.add_columns(0, references(group))
    assert buffer.ready(4) == 1 and buffer.in_flight() == 3
    expected = group.with_columns(rewards(group)).with_columns(references(group))
    assert plain(buffer.group(0)) == plain(expected)
    taken = buffer.take(7, 1)
    assert [plain(g) for g in taken] == [plain(expected)]
    assert buffer.in_flight() == 2 and buffer.ready(0) == 0 and buffer.assigned(7) and not buffer.assigned(8)
    trained = with_old(taken, -2.0)
    buffer.commit(7, trained, 5, "abc", {"reward/mean": 0.1})
    assert [plain(g) for g in buffer.replay(7)] == [plain(trained[0])]
    (record,) = buffer.history()
    assert (record.step, record.version, record.fingerprint, record.prompt_ids) == (7, 5, "abc", (0,))
    assert record.metrics == {"reward/mean": 0.1} and buffer.last_committed() == 7
    counts = buffer.counts()
    assert (counts.issued, counts.leased, counts.trained, counts.lost, counts.duplicated) == (3, 2, 1, 0, 0)
    assert verify(path).as_json()["problems"] == []


def test_lease_gives_pending_ones_first_and_stops_at_the_end_of_the_data(opened):
    buffer = opened(total=5)
    first = buffer.lease(4, "a", 100)
    assert [each.prompt_id for each in first] == [0, 1, 2, 3]
    for each in first[2:0:-1]:
        assert buffer.release(each.prompt_id, each.ticket, "its node left", counted=False)
    assert lease(buffer, 3, "b") == [1, 2, 4]
    assert lease(buffer, 3, "b") == []
    assert lease(buffer, 0, "b") == []


def test_a_prompt_that_a_worker_died_with_is_leased_alone(opened):
    """So that the next death is that of the prompt which caused it, and the others are done by then."""
    buffer = opened()
    lease(buffer, 4, "a")
    assert release(buffer, 1, "died") and release(buffer, 2, "died")
    assert [lease(buffer, 4, owner) for owner in "bcd"] == [[1], [2], [4, 5, 6, 7]]


def test_the_answer_to_an_old_lease_is_refused_and_that_to_the_new_one_taken(opened, make_group):
    buffer = opened(frozenset())
    (old,) = buffer.lease(1, "slow", 0)
    assert buffer.release(0, old.ticket, "showed no progress", counted=True)
    assert not buffer.add_group(0, old.ticket, make_group(0, 0)), "not leased"
    (new,) = buffer.lease(1, "quick", 1)
    assert new.ticket > old.ticket and new.attempts == 1
    assert not buffer.add_group(0, old.ticket, make_group(0, 0)), "leased to another"
    assert buffer.release(0, old.ticket, "late", counted=True) and buffer.counts().leased == 1, (
        "not the old one's lease"
    )
    assert buffer.add_group(0, new.ticket, make_group(0, 1)) and buffer.group(0).policy_version == 1
    assert not buffer.add_group(0, old.ticket, make_group(0, 1)), "complete, by another lease"


def test_calls_whose_answer_was_lost_can_be_repeated_to_the_next_process(opened, path: Path, make_group):
    """The process that kept the file died after a call and before its answer: `reopen`, then the same call again."""
    first = opened()
    leases = first.lease(3, "a", 7)
    first.add_group(0, leases[0].ticket, make_group(0, 0))
    second = ExperienceBuffer(path, REQUIRED, None, 3)
    second.reopen()
    assert second.lease(3, "a", 7) == leases and second.counts().issued == 3
    assert second.add_group(0, leases[0].ticket, make_group(0, 0)), "stored by the call whose answer was lost"
    assert second.add_group(1, leases[1].ticket, make_group(1, 0)), "the lease outlived the process"
    (more,) = second.lease(1, "a", 8)
    assert more.prompt_id == 3 and more.ticket > leases[2].ticket
    second.close()
    third = opened()
    (again,) = third.lease(1, "new run", 7)
    assert again.prompt_id == 2 and again.ticket > more.ticket, "a new run counts its requests anew, never its tickets"


def test_release_drops_after_max_attempts_and_says_why(opened, path: Path, make_group):
    buffer = opened(attempts=2)
    assert lease(buffer, 1, "a") == [0] and release(buffer, 0, "timeout")
    assert release(buffer, 0, "again") and buffer.counts().pending == 1, "only a lease can come to nothing"
    assert lease(buffer, 1, "a") == [0] and not release(buffer, 0, "timeout") and not release(buffer, 0, "timeout")
    assert lease(buffer, 1, "a") == [1], "a dropped prompt is not issued again"
    assert not add(buffer, 0, make_group(0, 0))
    overview = ExperienceView(path).overview()
    assert overview.drop_reasons == {"timeout": 1} and overview.attempts == {2: 1}
    assert {owner: held.prompt_ids for owner, held in overview.leases.items()} == {"a": (1,)}


def test_a_stored_group_cannot_be_released(opened, make_group):
    """No finished rollout is generated twice: what became of the worker later does not matter."""
    buffer = opened(attempts=1)
    lease(buffer, 1, "a")
    add(buffer, 0, make_group(0, 0))
    assert release(buffer, 0, "worker died") and list(buffer.unjudged()) == [0] and lease(buffer, 1, "a") == [1]


def test_old_groups_are_swept_and_data_never_ages(opened, path: Path, make_group):
    buffer = opened(frozenset())
    lease(buffer, 4, "a")
    for prompt_id, version in ((0, 3), (1, 5), (2, 3)):
        add(buffer, prompt_id, make_group(prompt_id, version))
    ids = np.array([4, 5], np.int32)
    given_ = dataset_group(make_group(3, 0).prompt, [Completion(ids, np.ones(2, np.bool_), "x", None)])
    add(buffer, 3, given_)
    assert buffer.ready(3) == 4
    buffer.take(0, 1)
    assert buffer.ready(5) == 2, "0 is taken, 2 is too old, 3 is data"
    assert lease(buffer, 1, "a") == [2] and ExperienceView(path).overview().discard_reasons == {
        "older than max_staleness": 1
    }
    assert add(buffer, 2, make_group(2, 5)) and buffer.ready(5) == 3
    assert verify(path).ok


def test_a_group_is_as_old_as_its_oldest_token(opened, make_group):
    """Weights that change within a sample: tokens of versions 4,4,5 count as 4."""
    buffer = opened(frozenset())
    lease(buffer, 1, "a")
    group = make_group(0, 5, samples=1, length=3)
    sample = replace(group.samples[0], versions=np.array([4, 4, 5], np.int32))
    add(buffer, 0, replace(group, samples=(sample,)))
    assert buffer.ready(4) == 1 and buffer.ready(5) == 0


def test_take_is_the_same_again_after_a_new_process(opened, path: Path, complete, plain):
    first = opened()
    complete(first, 5, 0)
    before = [plain(g) for g in first.take(0, 3)]
    assert [g["prompt"][0] for g in before] == [0, 1, 2]
    with pytest.raises(RunFailed, match="needs 3 complete groups, 2 are there"):
        first.take(1, 3)
    first.close()
    second = opened()
    assert second.assigned(0) and [plain(g) for g in second.take(0, 5)] == before
    assert second.ready(0) == 2


def test_a_new_process_returns_leases_but_keeps_stored_groups(opened, make_group):
    first = opened()
    lease(first, 3, "gone")
    add(first, 1, make_group(1, 0))
    first.close()
    second = opened()
    counts = second.counts()
    assert (counts.pending, counts.leased, counts.generated) == (2, 1, 1)
    assert list(second.unjudged()) == [1] and lease(second, 3, "new") == [0, 2, 3]


def test_an_earlier_writer_loses_the_right_to_write(opened):
    """A zombie cannot move a prompt after another process has taken over; it can still read."""
    zombie, heir = opened(), opened()
    with pytest.raises(RunFailed, match="opened again by another process"):
        lease(zombie, 1, "zombie")
    assert lease(heir, 1, "heir") == [0] and zombie.counts().leased == 1


def test_commit_again_is_compared_and_changes_nothing(opened, complete, plain):
    buffer = opened()
    complete(buffer, 2, 0)
    taken = with_old(buffer.take(0, 2), -1.0)
    buffer.commit(0, taken, 1, "abc", {"x": 1.0})
    before = [plain(g) for g in buffer.replay(0)]
    buffer.commit(0, with_old(taken, -9.0), 1, "abc", {"x": 2.0})
    assert [plain(g) for g in buffer.replay(0)] == before and buffer.history()[0].metrics == {"x": 1.0}
    with pytest.raises(RunFailed, match="rlhf replay --step 0"):
        buffer.commit(0, taken, 1, "other", {})
    with pytest.raises(RunFailed, match=r"prompts \[0\], but it took \[0, 1\]"):
        buffer.commit(0, taken[:1], 1, "abc", {})
    with pytest.raises(RunFailed, match="step 1 was to be committed"):
        buffer.commit(1, taken, 1, "abc", {})


def test_rewind_trains_the_same_groups_again_from_the_buffer(opened, path: Path, complete, plain):
    """A restart from the checkpoint of step 1: steps 1 and 2 lose what their commits added and keep their samples."""
    buffer = opened()
    complete(buffer, 6, 0)
    taken = []
    for step in range(3):
        taken.append([plain(g) for g in buffer.take(step, 2)])
        buffer.commit(step, with_old(buffer.take(step, 2), -1.0), step + 1, f"f{step}", {})
    buffer.rewind(1)
    buffer.rewind(1)
    counts = buffer.counts()
    assert (counts.trained, counts.complete, counts.leased, counts.lost) == (2, 4, 0, 0)
    assert buffer.last_committed() == 0 and buffer.ready(10) == 0 and buffer.in_flight() == 0 and verify(path).ok
    assert [plain(g) for g in buffer.take(1, 2)] == taken[1]
    with pytest.raises(RunFailed, match="step 1 cannot be replayed"):
        buffer.replay(1)
    buffer.commit(1, with_old(buffer.take(1, 2), -3.0), 2, "other", {})
    record = buffer.history()[1]
    assert (record.fingerprint, record.rewound_fingerprint) == ("other", "f1")
    assert {float(s.tokens["old_logprobs"][0]) for g in buffer.replay(1) for s in g.samples} == {-3.0}


def test_drop_keeps_the_first_reason_and_refuses_a_taken_prompt(opened, path: Path, complete):
    buffer = opened()
    complete(buffer, 2, 0)
    buffer.take(0, 1)
    buffer.drop(1, "incomplete batch")
    buffer.drop(1, "another")
    with pytest.raises(RunFailed, match="belongs to step 0"):
        buffer.drop(0, "x")
    with pytest.raises(RunFailed, match="prompt 9 was never leased; 2 prompts"):
        buffer.drop(9, "x")
    assert ExperienceView(path).overview().drop_reasons == {"incomplete batch": 1} and verify(path).ok


def test_columns_that_do_not_fit_are_refused_by_name(opened, make_group):
    buffer = opened()
    lease(buffer, 1, "a")
    group = make_group(0, 0)
    assert not buffer.add_columns(0, rewards(group)), "no samples yet"
    add(buffer, 0, group)
    with pytest.raises(RunFailed, match="prompt 0: reward does not fit its group"):
        buffer.add_columns(0, Columns(0, {"reward": [1.0]}, {}))
    short = [np.zeros(2, np.float32) for _ in group.samples]
    with pytest.raises(RunFailed, match=r"ref_logprobs must be float32 of shape \(5,\)"):
        buffer.add_columns(0, Columns(0, {}, {"ref_logprobs": short}))
    with pytest.raises(RunFailed, match="columns of prompt 1 were handed in for prompt 0"):
        buffer.add_columns(0, Columns(1, {}, {}))
    with pytest.raises(RunFailed, match="group of prompt 1 was handed in for prompt 0"):
        add(buffer, 0, make_group(1, 0))
    assert buffer.unjudged() == {0: REQUIRED}


def test_what_a_run_is_tied_to_cannot_change(opened, path: Path):
    first = opened()
    first.pin("seed", "1")
    first.pin("seed", "1")
    with pytest.raises(BadInput, match="started with seed '1', now it is '2'"):
        first.pin("seed", "2")
    first.close()
    with pytest.raises(BadInput, match="required columns"):
        opened(frozenset({"reward"}))
    assert ExperienceView(path).overview().pinned == {"required columns": "ref_logprobs reward", "seed": "1"}


def test_files_that_are_no_buffer_are_bad_input(tmp_path: Path):
    import sqlite3

    text, other = tmp_path / "text.db", tmp_path / "other.db"
    text.write_text("not a database at all, but long enough to be looked at" * 20)
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    for path, message in ((text, "not a database"), (other, "'theirs'"), (tmp_path / "no" / "x.db", "unable to open")):
        with pytest.raises(BadInput, match=message):
            ExperienceBuffer(path, REQUIRED, None, 3).open()


def test_a_closed_buffer_says_so(path: Path):
    with pytest.raises(RunFailed, match=r"call open\(\) first"):
        ExperienceBuffer(path, REQUIRED, None, 3).counts()


def test_what_a_step_took_cannot_be_changed_any_more(opened, complete):
    """A late optional column would make the replay differ from what was trained."""
    buffer = opened()
    complete(buffer, 2, 0)
    buffer.take(0, 1)
    late = {"length": [1.0, 2.0]}
    assert not buffer.add_columns(0, Columns(0, late, {})) and buffer.add_columns(1, Columns(1, late, {}))
    assert "length" not in buffer.group(0).samples[0].scores and buffer.group(1).samples[1].scores["length"] == 2.0
