"""A run's checkpoints and copies of its buffer at any fsspec address, so that the run outlives its machine.

    ADDRESS/checkpoints/step-000010/   a checkpoint, as in the run directory
    ADDRESS/buffer/step-000010/        the buffer after ten updates, with the logs and the run file

A folder is uploaded file by file, its manifest last; one without a manifest, or whose bytes are not those of the
manifest, is not used. Nothing is removed before what takes its place is complete. Imports neither torch nor ray.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from rlhf import checkpoint
from rlhf.buffer.schema import FILE_NAME
from rlhf.buffer.snapshot import Moment, moment_of, snapshot
from rlhf.errors import BadInput, RunFailed

BUFFER = "buffer"
KEPT_SNAPSHOTS = 2
Note = Callable[[str], None]


class Storage:
    """Folders with manifests at an address: KIND/step-NNNNNN, where KIND is `checkpoints` or `buffer`.

    Credentials are those of the protocol's own package (environment, files). Raises BadInput for an address that
    cannot be used, naming the package that is missing.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        if "://" not in address and not Path(address).is_absolute():
            raise BadInput(
                f"storage.address {address}: expected protocol://place, such as s3://bucket/run, or an absolute path"
            )
        try:
            self._files, self._root = url_to_fs(self.address)
        except ImportError as error:
            raise BadInput(
                f"storage.address {address}: {error}. Next: pip install the package that it names"
            ) from error
        except ValueError as error:
            raise BadInput(f"storage.address {address}: {error}. Expected a protocol that fsspec knows") from error

    def complete(self, kind: str) -> list[int]:
        """The updates of the folders of a kind that have a manifest, newest first."""
        self._files.invalidate_cache()
        try:
            names = [
                str(path).rstrip("/").rsplit("/", 1)[-1]
                for path in self._files.ls(f"{self._root}/{kind}", detail=False)
            ]
        except FileNotFoundError:
            return []
        steps = [
            checkpoint.updates_of(n) for n in names if n.startswith("step-") and n.removeprefix("step-").isdecimal()
        ]
        return sorted((step for step in steps if self._files.exists(self._manifest(kind, step))), reverse=True)

    def snapshots(self) -> list[tuple[Moment, int]]:
        """The complete copies of the buffer, the one of the last opening first; what cannot be read is left out.

        A run that went back to an older checkpoint has fewer steps than an earlier copy, and knows more prompts."""
        found = []
        for updates in self.complete(BUFFER):
            try:
                found.append((Moment(**self.manifest(BUFFER, updates)["info"]), updates))
            except (ValueError, KeyError, TypeError):
                continue
        return sorted(found, key=lambda entry: (entry[0].opened, entry[1]), reverse=True)

    def manifest(self, kind: str, updates: int) -> dict[str, Any]:
        """Raises ValueError for one that is not readable."""
        content: dict[str, Any] = json.loads(self._files.cat_file(self._manifest(kind, updates)))
        return content

    def put(self, kind: str, folder: Path, updates: int) -> bool:
        """Uploads a sealed folder, the manifest last; false when the same is there. Raises OSError when it cannot.

        Another one under the same name loses its manifest first, so that no mixture of the two is ever complete."""
        mine, there = (folder / checkpoint.MANIFEST).read_bytes(), self._manifest(kind, updates)
        if self._files.exists(there):
            if self._files.cat_file(there) == mine:
                return False
            self.remove(kind, updates)
        for name, entry in json.loads(mine)["files"].items():
            target = f"{self._place(kind, updates)}/{name}"
            self._files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._files.put_file(str(folder / name), target)
            if self._files.size(target) != entry["size"]:
                raise OSError(
                    f"{self._shown(kind, updates)}/{name}: {self._files.size(target)} bytes arrived of {entry['size']}"
                )
        self._files.pipe_file(there, mine)
        return True

    def fetch(self, kind: str, updates: int, to: Path) -> str | None:
        """Downloads a folder into a new one and checks every byte; what is wrong with it, None when it is whole."""
        try:
            manifest = self.manifest(kind, updates)
            if outside := [name for name in manifest["files"] if not checkpoint.stays_inside(name)]:
                raise ValueError(f"the manifest names {outside[0]!r}, which is not inside of the folder")
            for name in [*manifest["files"], checkpoint.MANIFEST]:
                (to / name).parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(f"{self._place(kind, updates)}/{name}", str(to / name))
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            return f"{self._shown(kind, updates)}: {type(error).__name__}: {error}"
        faults = checkpoint.problems(to)
        return faults[0].replace(str(to), self._shown(kind, updates)) if faults else None

    def problems(self) -> list[str]:
        """Files that are missing or have another size, by what the manifests say; no checksum is read."""
        found = []
        for kind in (checkpoint.FOLDER, BUFFER):
            for updates in self.complete(kind):
                try:
                    files = self.manifest(kind, updates)["files"]
                except (ValueError, KeyError) as error:
                    found.append(f"{self._shown(kind, updates)}/{checkpoint.MANIFEST}: unreadable: {error!r}")
                    continue
                for name, entry in files.items():
                    place = f"{self._place(kind, updates)}/{name}"
                    size = self._files.size(place) if self._files.exists(place) else None
                    if size != entry["size"]:
                        what = "missing" if size is None else f"{size} bytes, the manifest says {entry['size']}"
                        found.append(f"{self._shown(kind, updates)}/{name}: {what}")
        return found

    def remove(self, kind: str, updates: int) -> None:
        """The manifest first, so that a removal that is cut short leaves nothing that looks complete."""
        self._files.rm_file(self._manifest(kind, updates))
        self._files.rm(self._place(kind, updates), recursive=True)

    def _place(self, kind: str, updates: int) -> str:
        return f"{self._root}/{kind}/step-{updates:06d}"

    def _manifest(self, kind: str, updates: int) -> str:
        return f"{self._place(kind, updates)}/{checkpoint.MANIFEST}"

    def _shown(self, kind: str, updates: int) -> str:
        return f"{self.address}/{kind}/step-{updates:06d}"


class Archive:
    """Keeps storage in step with a run directory: after each checkpoint, and every `buffer_every` steps the buffer.

    logs, the files beside the buffer that go with it. A failed upload is told, counted and made up for at the next one;
    only `finish` insists. The run that has opened the buffer last owns the address: an earlier one is refused.
    """

    def __init__(self, storage: Storage, run_dir: Path, buffer_every: int, logs: tuple[str, ...], note: Note) -> None:
        self._storage, self._run_dir, self._every = storage, run_dir, buffer_every
        self._logs, self._note = logs, note
        self.address = storage.address
        self.failed = 0

    @property
    def remedy(self) -> str:
        """What to do with a run directory that is damaged beyond its checkpoints."""
        return f"move {self._run_dir} away and run the same command: it goes on from {self.address}"

    def step_done(self, updates: int) -> None:
        if self._every and updates % self._every == 0:
            self._try(self._put_buffer)

    def checkpoint_saved(self) -> None:
        """Buffer first: a checkpoint at the address always finds a buffer that knows all its steps."""
        self._try(self._put_everything)

    def finish(self) -> None:
        """Raises RunFailed when what the run directory holds cannot be uploaded."""
        try:
            self._put_everything()
        except OSError as error:
            raise RunFailed(
                f"{self.address}: the run is whole in {self._run_dir}, but could not be uploaded: {error}. "
                "Next: the same command again uploads it"
            ) from error

    def mend(self, refused: checkpoint.Rejected) -> bool:
        """Puts the stored copy of a damaged checkpoint in its place, where there is one that is whole."""
        updates = checkpoint.updates_of(refused.folder.name)
        if updates not in self._storage.complete(checkpoint.FOLDER):
            return False
        with tempfile.TemporaryDirectory(dir=refused.folder.parent, prefix=".step-mending-") as scratch:
            whole = Path(scratch) / "whole"
            if fault := self._storage.fetch(checkpoint.FOLDER, updates, whole):
                self._note(f"{fault}: not used either")
                return False
            refused.folder.rename(Path(scratch) / "damaged")
            whole.rename(refused.folder)
        return True

    def _try(self, upload: Callable[[], None]) -> None:
        try:
            upload()
        except OSError as error:
            self.failed += 1
            self._note(f"{self.address}: upload failed, tried again with the next one: {error}")

    def _put_everything(self) -> None:
        self._put_buffer()
        mine = checkpoint.committed(self._run_dir)
        for updates in mine:
            folder = self._run_dir / checkpoint.FOLDER / f"step-{updates:06d}"
            self._storage.put(checkpoint.FOLDER, folder, updates)
        if mine:
            for updates in set(self._storage.complete(checkpoint.FOLDER)) - set(mine):
                self._storage.remove(checkpoint.FOLDER, updates)

    def _put_buffer(self) -> None:
        self._check_owner()
        folder = self._run_dir / ".snapshot"
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed here
        folder.mkdir()
        moment = snapshot(self._run_dir / FILE_NAME, folder / FILE_NAME)
        for name in self._logs:
            if (self._run_dir / name).exists():
                shutil.copyfile(self._run_dir / name, folder / name)
        checkpoint.seal(folder, moment.updates, asdict(moment))
        self._storage.put(BUFFER, folder, moment.updates)
        shutil.rmtree(folder)
        for _, updates in self._storage.snapshots()[KEPT_SNAPSHOTS:]:
            self._storage.remove(BUFFER, updates)

    def _check_owner(self) -> None:
        mine = moment_of(self._run_dir / FILE_NAME)
        for there, _ in self._storage.snapshots()[:1]:
            if there.opened > mine.opened:
                raise RunFailed(
                    f"{self.address}: another run directory has gone on with this run (opening {there.opened} of the "
                    f"buffer, {self._run_dir} had {mine.opened}): this one must end. Next: go on there, or move "
                    f"{self._run_dir} away and run again to go on from the address"
                )


def restore(storage: Storage, run_dir: Path, check: Callable[[Path], None], note: Note) -> bool:
    """Fills an empty or missing run directory with what the address holds; false when it holds no run.

    Takes the newest whole buffer, and every whole checkpoint that this buffer knows all steps of. `check` looks at the
    run file before anything is put in place. What is damaged is told and left out. Raises RunFailed when there are
    buffers and none is whole.
    """
    if not storage.complete(BUFFER):
        return False
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=run_dir.parent, prefix=f".{run_dir.name}.restoring-") as scratch:
        whole = Path(scratch) / "run"
        updates = _fetch_buffer(storage, whole, note)
        (whole / checkpoint.MANIFEST).unlink()
        try:
            check(whole)
        except BadInput as error:
            raise BadInput(f"storage.address {storage.address}: {error}") from error
        for step in [step for step in storage.complete(checkpoint.FOLDER) if step <= updates]:
            folder = whole / checkpoint.FOLDER / f"step-{step:06d}"
            if fault := storage.fetch(checkpoint.FOLDER, step, folder):
                note(f"{fault}: not used")
                shutil.rmtree(folder, ignore_errors=True)
        if run_dir.exists():
            run_dir.rmdir()
        os.rename(whole, run_dir)
    there = checkpoint.committed(run_dir)
    note(f"restored from {storage.address}: the buffer after {updates} updates, checkpoints {there}")
    return True


def _fetch_buffer(storage: Storage, to: Path, note: Note) -> int:
    """The updates of the buffer that was fetched. Raises RunFailed when none is whole."""
    for _, updates in storage.snapshots():
        fault = storage.fetch(BUFFER, updates, to)
        if fault is None:
            return updates
        note(f"{fault}: not used")
        shutil.rmtree(to, ignore_errors=True)
    raise RunFailed(
        f"{storage.address}: none of the buffers {storage.complete(BUFFER)} there is whole. Next: look at them, or "
        "start a new run at another address"
    )
