"""Damaged, truncated and foreign files: `verify` says what is broken and where, and reading refuses to go on."""

import random
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from rlhf.buffer.audit import ExperienceView, verify
from rlhf.buffer.schema import DamagedExperience
from rlhf.buffer.store import ExperienceBuffer
from rlhf.errors import BadInput
from rlhf.experience import Columns


@pytest.fixture
def path(tmp_path: Path, rollout) -> Path:
    """A closed buffer: prompts 0 to 3 trained in two steps, 4 and 5 complete."""
    path = tmp_path / "experience.db"
    buffer = ExperienceBuffer(path, frozenset({"reward", "ref_logprobs"}), None, 3)
    buffer.open()
    for lease in buffer.lease(6, "test", 0):
        prompt_id, group = lease.prompt_id, rollout(lease.prompt_id, 0, 2, 200, {})
        buffer.add_group(prompt_id, lease.ticket, group)
        arrays = [np.zeros(len(sample.token_ids), np.float32) for sample in group.samples]
        buffer.add_columns(prompt_id, Columns(prompt_id, {"reward": [0.0, None]}, {"ref_logprobs": arrays}))
    for step in range(2):
        buffer.commit(step, buffer.take(step, 2), step + 1, f"f{step}", {"x": 1.0})
    buffer.close()
    return path


def flip_payload(path: Path, table: str, where: str) -> None:
    """One bit of the middle byte of one payload."""
    with sqlite3.connect(path) as connection:
        payload = bytearray(connection.execute(f"SELECT payload FROM {table} WHERE {where}").fetchone()[0])
        payload[len(payload) // 2] ^= 1
        connection.execute(f"UPDATE {table} SET payload = ? WHERE {where}", (bytes(payload),))
    connection.close()


def test_one_flipped_bit_of_a_group_is_found_and_named(path: Path):
    flip_payload(path, "groups", "prompt_id = 3")
    report = verify(path)
    assert len(report.problems) == 1 and not report.ok
    assert report.problems[0].startswith(f"{path}: groups: prompt 3: the checksum does not match")
    assert report.ledger["trained"] == 4 and report.ledger["lost"] == 0
    with pytest.raises(DamagedExperience, match="groups: prompt 3"):
        ExperienceView(path).replay(1)
    assert len(ExperienceView(path).replay(0)) == 2, "the other step is whole"


def test_one_flipped_bit_of_a_column_is_found_and_named(path: Path):
    flip_payload(path, "columns", "prompt_id = 4 AND name = 'reward'")
    assert [p.split(": the checksum")[0] for p in verify(path).problems] == [
        f"{path}: columns: prompt 4, column 'reward'"
    ]
    buffer = ExperienceBuffer(path, frozenset({"reward", "ref_logprobs"}), None, 3)
    buffer.open()
    with pytest.raises(DamagedExperience, match="prompt 4, column 'reward'"):
        buffer.take(2, 2)
    assert not buffer.assigned(2), "the step was not taken"
    buffer.close()


def test_a_whole_payload_in_the_wrong_place_is_found(path: Path):
    """The checksum covers the address: a group that was swapped with another's is not accepted."""
    with sqlite3.connect(path) as connection:
        row = connection.execute("SELECT payload, checksum FROM groups WHERE prompt_id = 1").fetchone()
        connection.execute("UPDATE groups SET payload = ?, checksum = ? WHERE prompt_id = 0", row)
    connection.close()
    assert any("groups: prompt 0: the checksum" in problem for problem in verify(path).problems)


def test_no_damage_to_the_file_makes_verify_raise(path: Path, tmp_path: Path):
    """Truncation at many lengths and random bytes overwritten at 40 seeded places: a report, never a traceback; any
    change of a payload's bytes is found. Not covered: a flip in SQLite's free space, which harms nothing."""
    whole = path.read_bytes()
    broken = tmp_path / "broken.db"
    for length in (0, 1, 16, 100, 4096, len(whole) // 3, len(whole) // 2, len(whole) - 4096):
        broken.write_bytes(whole[:length])
        report = verify(broken)
        assert not report.ok and report.problems, f"cut to {length} bytes"
    places = random.Random(3)
    for _ in range(40):
        start = places.randrange(len(whole) - 64)
        broken.write_bytes(whole[:start] + places.randbytes(64) + whole[start + 64 :])
        verify(broken)
    with sqlite3.connect(path) as connection:
        (payload,) = connection.execute("SELECT payload FROM groups WHERE prompt_id = 0").fetchone()
    connection.close()
    start = whole.find(payload[:200])
    for offset in range(0, 200, 23):
        changed = bytes([whole[start + offset] ^ 0x40])
        broken.write_bytes(whole[: start + offset] + changed + whole[start + offset + 1 :])
        assert any("groups: prompt 0" in problem for problem in verify(broken).problems)


def test_files_that_are_not_there_or_not_ours(tmp_path: Path):
    folder, text, other = tmp_path, tmp_path / "text.db", tmp_path / "other.db"
    text.write_text("hello " * 500)
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    for path, message in (
        (tmp_path / "missing.db", "no such file"),
        (folder, "no such file"),
        (text, "not a database"),
        (other, "no table 'meta'"),
    ):
        report = verify(path)
        assert not report.ok and any(message in problem for problem in report.problems), report.problems
        assert set(report.as_json()) == {"ok", "ledger", "problems"} and set(report.ledger.values()) == {0}
        with pytest.raises(BadInput, match="not readable as an experience buffer"):
            ExperienceView(path).counts()
    assert not (tmp_path / "missing.db").exists(), "looking does not create"


def test_looking_writes_nothing(path: Path):
    before = path.read_bytes()
    assert verify(path).ok
    ExperienceView(path).overview()
    assert path.read_bytes() == before


def test_broken_pages_stop_the_writer_with_the_files_name(path: Path) -> None:
    """What SQLite itself finds while the run writes is named, too. Control: it opens, its first pages are whole."""
    content = bytearray(path.read_bytes())
    for place in range(4096 * 2, len(content), 4096):
        content[place : place + 64] = bytes(64)
    path.write_bytes(content)
    buffer = ExperienceBuffer(path, frozenset({"reward", "ref_logprobs"}), None, 3)
    with pytest.raises(DamagedExperience, match=f"{path}: SQLite finds it damaged"):
        buffer.open()
        buffer.replay(0)
    buffer.close()
