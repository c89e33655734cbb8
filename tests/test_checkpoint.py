"""A checkpoint is whole or absent. Not covered: real power loss, remote file systems."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf import checkpoint


def _save(folder: Path) -> None:
    (folder / "policy").mkdir()
    (folder / "policy" / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "trainer.bin").write_bytes(b"moments")


def test_newest_valid_checkpoint_is_found(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 5, {"seed": 1}, _save)
    checkpoint.write(tmp_path, 10, {"seed": 1}, _save)
    found, rejected = checkpoint.newest(tmp_path)
    assert found is not None and found.updates == 10 and found.info == {"seed": 1} and not rejected


@pytest.mark.parametrize("name", ["policy/model.safetensors", "trainer.bin", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_harmed_checkpoint_is_refused_by_file_name_and_the_older_one_used(
    tmp_path: Path, name: str, harm: str
) -> None:
    checkpoint.write(tmp_path, 5, {}, _save)
    newer = checkpoint.write(tmp_path, 10, {}, _save).folder / name
    content = bytearray(newer.read_bytes())
    if harm == "remove":
        newer.unlink()
    elif harm == "truncate":
        newer.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0xFF
        newer.write_bytes(content)
    found, rejected = checkpoint.newest(tmp_path)
    assert found is not None and found.updates == 5
    assert [r.folder.name for r in rejected] == ["step-000010"] and name in rejected[0].reason


def test_pruning_keeps_the_newest_and_clears_what_interrupted_writes_left(tmp_path: Path) -> None:
    for updates in (1, 2, 3):
        checkpoint.write(tmp_path, updates, {}, _save)
    (tmp_path / "checkpoints" / ".step-000004.77").mkdir()
    checkpoint.prune(tmp_path, 2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000002", "step-000003"]


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from rlhf import checkpoint

def save(folder):
    (folder / "a").write_bytes(b"x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)

checkpoint.write(Path(sys.argv[1]), 10, {}, save)
"""


def test_a_process_killed_while_saving_leaves_no_checkpoint_and_the_next_write_succeeds(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 5, {}, _save)
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)], check=False)
    assert killed.returncode == -9
    found, rejected = checkpoint.newest(tmp_path)
    assert found is not None and found.updates == 5 and not rejected
    assert checkpoint.write(tmp_path, 10, {}, _save).updates == 10
