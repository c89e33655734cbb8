"""A run's copy at an fsspec address: half an upload is none, damage is refused by name, one run owns the address.

Real SQLite and real fsspec file systems (memory and local files); the checkpoints are small stand-ins. Whole runs that
move to a new machine are in test_resume.py. Not covered: object stores themselves, two runs that upload at one moment.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rlhf import checkpoint
from rlhf.buffer.audit import verify
from rlhf.buffer.schema import FILE_NAME, DamagedExperience
from rlhf.buffer.snapshot import moment_of
from rlhf.buffer.store import ExperienceBuffer
from rlhf.errors import BadInput, RunFailed
from rlhf.storage import BUFFER, Archive, Storage, restore

LOG = "metrics.jsonl"


class Run:
    """A run directory whose steps are told one by one; a step takes two prompts."""

    def __init__(self, folder: Path, rollout: Callable[..., Any]) -> None:
        self.folder, self._rollout = folder, rollout
        folder.mkdir(exist_ok=True)
        self.buffer = ExperienceBuffer(folder / FILE_NAME, frozenset(), None, 3)
        self.buffer.open()

    def step(self, number: int) -> None:
        for lease in self.buffer.lease(2, "test", number):
            self.buffer.add_group(lease.prompt_id, lease.ticket, self._rollout(lease.prompt_id, 0, 2, 20, {}))
        self.buffer.commit(number, self.buffer.take(number, 2), number + 1, f"f{number}", {})
        (self.folder / LOG).write_text("".join(f'{{"step": {n}}}\n' for n in range(number + 1)))

    def save(self, updates: int) -> Path:
        def fill(folder: Path) -> None:
            (folder / "policy").mkdir()
            (folder / "policy" / "model.safetensors").write_bytes(bytes([updates]) * 500)
            (folder / "trainer.bin").write_bytes(bytes([updates + 100]) * 300)

        return checkpoint.write(self.folder, updates, {}, fill).folder


@pytest.fixture
def run(tmp_path: Path, rollout: Callable[..., Any]) -> Iterator[Run]:
    made = Run(tmp_path / "run", rollout)
    yield made
    made.buffer.close()


@pytest.fixture(params=["memory", "file"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    address = "memory://bucket/run" if request.param == "memory" else f"file://{tmp_path}/stored"
    yield Storage(address)
    if request.param == "memory":
        files = fsspec.filesystem("memory")
        if files.exists("/bucket"):
            files.rm("/bucket", recursive=True)


def archive_of(run: Run, storage: Storage, told: list[str], buffer_every: int = 0) -> Archive:
    return Archive(storage, run.folder, buffer_every, (LOG,), told.append)


def harm(storage: Storage, place: str, how: str) -> None:
    path = f"{storage._root}/{place}"
    content = bytearray(storage._files.cat_file(path))
    if how == "remove":
        storage._files.rm_file(path)
        return
    if how == "truncate":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    storage._files.pipe_file(path, bytes(content))


def accept(folder: Path) -> None:
    assert (folder / FILE_NAME).is_file()


def restored(storage: Storage, to: Path) -> list[str]:
    """Restores and returns what was told; the result is whole by `verify`."""
    told: list[str] = []
    assert restore(storage, to, accept, told.append)
    assert verify(to / FILE_NAME).ok
    assert all(not checkpoint.problems(folder) for folder in checkpoint.folders(to))
    return told


def test_a_run_directory_comes_back_whole(run: Run, storage: Storage, tmp_path: Path) -> None:
    """Buffer, logs, every kept checkpoint; what the run removed is removed there too."""
    archive = archive_of(run, storage, [])
    for number in range(3):
        run.step(number)
        run.save(number + 1)
        checkpoint.prune(run.folder, 2, [])
        archive.checkpoint_saved()
    restored(storage, tmp_path / "new")
    assert checkpoint.committed(tmp_path / "new") == checkpoint.committed(run.folder) == [2, 3]
    assert storage.complete(checkpoint.FOLDER) == [3, 2] and storage.complete(BUFFER) == [3, 2]
    assert (tmp_path / "new" / LOG).read_text() == (run.folder / LOG).read_text()
    assert moment_of(tmp_path / "new" / FILE_NAME) == moment_of(run.folder / FILE_NAME)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["checkpoints", FILE_NAME, LOG]
    assert storage.problems() == []


def test_an_empty_address_restores_nothing(storage: Storage, tmp_path: Path) -> None:
    assert not restore(storage, tmp_path / "new", accept, print)
    assert not (tmp_path / "new").exists()


class Cut(OSError):
    """The network is gone."""


def test_an_upload_cut_at_any_point_leaves_the_last_state(
    run: Run, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that changes what is stored fails once, one after the other; what is restored then is the state before
    or the state after, and the next upload makes up for it. A control: the last cut point lies behind the manifest."""
    files, left = storage._files, [0]
    for name in ("put_file", "pipe_file", "rm_file", "rm"):
        plain = getattr(type(files), name)

        def cut(self: Any, *arguments: Any, plain: Any = plain, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Cut("cut")
            return plain(self, *arguments, **options)

        monkeypatch.setattr(type(files), name, cut)
    told: list[str] = []
    archive = archive_of(run, storage, told)
    run.step(0)
    run.save(1)
    archive.checkpoint_saved()
    seen = set()
    for point in range(1, 30):
        run.step(point)
        run.save(point + 1)
        checkpoint.prune(run.folder, 1, [])
        left[0] = point
        archive.checkpoint_saved()
        was_cut = archive.failed == point
        left[0] = 0
        new = tmp_path / f"new-{point}"
        restored(storage, new)
        ledger, kept = moment_of(new / FILE_NAME).updates, checkpoint.committed(new)
        assert ledger in (point, point + 1)
        assert kept in ([point], [point, point + 1], [point + 1], []), kept
        assert kept, "a checkpoint was removed before its successor was there"
        seen.add((ledger - point, kept[-1] - point))
        if not was_cut:
            break
        shutil.rmtree(new)
        archive.finish()
        assert storage.complete(checkpoint.FOLDER) == [point + 1]
    assert not was_cut and len(told) == point - 1 >= 8
    assert seen == {(0, 0), (1, 0), (1, 1)}


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
@pytest.mark.parametrize("name", ["policy/model.safetensors", "trainer.bin", "manifest.json"])
def test_a_damaged_stored_checkpoint_is_named_and_the_older_one_used(
    run: Run, storage: Storage, tmp_path: Path, name: str, how: str
) -> None:
    archive = archive_of(run, storage, [])
    for number in range(2):
        run.step(number)
        run.save(number + 1)
        archive.checkpoint_saved()
    harm(storage, f"checkpoints/step-000002/{name}", how)
    told = restored(storage, tmp_path / "new")
    assert checkpoint.committed(tmp_path / "new") == [1]
    never_finished = (name, how) == ("manifest.json", "remove")
    assert (
        never_finished
        or ("not used" in told[0] and f"step-000002/{name}" in told[0].replace("step-000002: ", ""))
        or (name == "manifest.json" and "step-000002" in told[0])
    )
    assert moment_of(tmp_path / "new" / FILE_NAME).updates == 2, "the buffer still knows both steps"
    if how != "flip" and not never_finished:
        assert any("step-000002" in problem for problem in storage.problems())


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_a_damaged_stored_buffer_is_named_and_the_older_one_used_with_its_checkpoint(
    run: Run, storage: Storage, tmp_path: Path, how: str
) -> None:
    """The newer checkpoint is left out: the older buffer does not know all its steps."""
    archive = archive_of(run, storage, [])
    for number in range(2):
        run.step(number)
        run.save(number + 1)
        archive.checkpoint_saved()
    harm(storage, f"buffer/step-000002/{FILE_NAME}", how)
    told = restored(storage, tmp_path / "new")
    assert "step-000002" in told[0] and FILE_NAME in told[0] and "not used" in told[0]
    assert moment_of(tmp_path / "new" / FILE_NAME).updates == 1
    assert checkpoint.committed(tmp_path / "new") == [1]
    harm(storage, f"buffer/step-000001/{FILE_NAME}", how)
    with pytest.raises(RunFailed, match="none of the buffers"):
        restore(storage, tmp_path / "other", accept, told.append)
    assert not (tmp_path / "other").exists()


def test_buffer_copies_go_up_between_checkpoints(run: Run, storage: Storage, tmp_path: Path) -> None:
    archive = archive_of(run, storage, [], buffer_every=2)
    run.step(0)
    run.save(1)
    archive.checkpoint_saved()
    for number in range(1, 4):
        run.step(number)
        archive.step_done(number + 1)
    restored(storage, tmp_path / "new")
    assert moment_of(tmp_path / "new" / FILE_NAME).updates == 4
    assert checkpoint.committed(tmp_path / "new") == [1]


def test_after_going_back_the_newer_opening_counts_and_not_the_number_of_steps(
    run: Run, storage: Storage, tmp_path: Path
) -> None:
    """A run that rewound to an older checkpoint knows more prompts with fewer steps."""
    archive = archive_of(run, storage, [])
    for number in range(3):
        run.step(number)
    archive.checkpoint_saved()
    run.buffer.close()
    again = Run(run.folder, run._rollout)
    again.buffer.rewind(1)
    again.buffer.lease(4, "test", 9)
    archive.checkpoint_saved()
    again.buffer.close()
    restored(storage, tmp_path / "new")
    found = moment_of(tmp_path / "new" / FILE_NAME)
    assert (found.updates, found.issued) == (1, 10)


def test_the_run_that_went_on_elsewhere_owns_the_address(run: Run, storage: Storage, tmp_path: Path) -> None:
    """The old machine comes back to life: it is told so and uploads nothing."""
    archive = archive_of(run, storage, [])
    run.step(0)
    run.save(1)
    archive.checkpoint_saved()
    restored(storage, tmp_path / "new")
    new = Run(tmp_path / "new", run._rollout)
    new.step(1)
    archive_of(new, storage, []).checkpoint_saved()
    new.buffer.close()
    run.step(1)
    with pytest.raises(RunFailed, match="another run directory has gone on"):
        archive.checkpoint_saved()
    assert storage.snapshots()[0][0] == moment_of(new.folder / FILE_NAME)


def test_a_damaged_local_checkpoint_is_replaced_by_its_stored_copy(run: Run, storage: Storage) -> None:
    """Unless that is damaged too, or was never stored."""
    told: list[str] = []
    archive = archive_of(run, storage, told)
    run.step(0)
    folder = run.save(1)
    archive.checkpoint_saved()
    for wanted in (True, False):
        (folder / "trainer.bin").write_bytes(b"?")
        _, (refused,) = checkpoint.newest(run.folder)
        assert archive.mend(refused) == wanted
        assert (checkpoint.newest(run.folder)[0] is not None) == wanted
        if wanted:
            harm(storage, "checkpoints/step-000001/trainer.bin", "flip")
    assert "trainer.bin" in told[0]


def test_a_damaged_buffer_is_not_uploaded_over_a_whole_one(run: Run, storage: Storage, tmp_path: Path) -> None:
    archive = archive_of(run, storage, [])
    run.step(0)
    archive.checkpoint_saved()
    for number in range(1, 12):
        run.step(number)
    run.buffer.close()
    content = bytearray((run.folder / FILE_NAME).read_bytes())
    for place in range(4096 * 3, len(content) - 4096, 4096):  # the head of many pages
        content[place : place + 64] = bytes(64)
    (run.folder / FILE_NAME).write_bytes(content)
    with pytest.raises(DamagedExperience, match=FILE_NAME):
        archive.checkpoint_saved()
    restored(storage, tmp_path / "new")
    assert moment_of(tmp_path / "new" / FILE_NAME).updates == 1


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://bucket/run", "s3fs"),
        ("gs://bucket/run", "gcsfs"),
        ("nowhere://run", "nowhere"),
        ("some/folder", "absolute"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_by_name(address: str, said: str) -> None:
    """The packages of the object stores are not part of the lock."""
    with pytest.raises(BadInput, match=said):
        Storage(address)
