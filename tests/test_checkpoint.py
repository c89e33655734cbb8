"""A checkpoint is whole or absent; the last n and the best are kept. Not covered: real power loss."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf import checkpoint
from rlhf.cli.main import main
from rlhf.config import RunConfig
from rlhf.config_file import dump
from rlhf.errors import BadInput
from rlhf.evaluation import heldout


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
    checkpoint.prune(tmp_path, 2, [])
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000002", "step-000003"]


def test_pruning_counts_whole_checkpoints_and_keeps_the_named_ones(tmp_path: Path) -> None:
    """A damaged one takes the place of none; a person's copy under another name is left alone."""
    for updates in (1, 2, 3, 4, 5):
        checkpoint.write(tmp_path, updates, {}, _save)
    (tmp_path / "checkpoints" / "step-000004" / "trainer.bin").unlink()
    shutil.copytree(tmp_path / "checkpoints" / "step-000001", tmp_path / "checkpoints" / "step-000001.mine")
    checkpoint.prune(tmp_path, 2, [2])
    left = sorted(os.listdir(tmp_path / "checkpoints"))
    assert left == ["step-000001.mine", "step-000002", "step-000003", "step-000005"]
    assert checkpoint.committed(tmp_path) == [2, 3, 5]


REMOVED_HALF = """
import os, shutil, signal, sys
from pathlib import Path
from rlhf import checkpoint

shutil.rmtree = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.prune(Path(sys.argv[1]), 1, [])
"""


def test_a_removal_that_is_cut_short_leaves_nothing_under_a_checkpoints_name(tmp_path: Path) -> None:
    for updates in (1, 2):
        checkpoint.write(tmp_path, updates, {}, _save)
    assert subprocess.run([sys.executable, "-c", REMOVED_HALF, str(tmp_path)], check=False).returncode == -9
    assert [folder.name for folder in checkpoint.folders(tmp_path)] == ["step-000002"]
    checkpoint.prune(tmp_path, 1, [])
    assert os.listdir(tmp_path / "checkpoints") == ["step-000002"]


ROWS = [{"step": step, "reward_mean": mean} for step, mean in enumerate([9.0, 1.0, 3.0, 3.0, float("nan"), 2.0])]


def test_the_best_is_the_earliest_highest_reward_or_smallest_loss_of_those_that_are_there() -> None:
    """By hand; step 0 has no checkpoint, step 4 no number."""
    assert heldout.best(ROWS, "reward", [1, 2, 3, 4, 5]) == 2
    assert heldout.best(ROWS, "reward", [1, 5]) == 5
    assert heldout.best(ROWS, "reward", [4, 7]) is None
    measured = [
        {"step": n, "values": {"loss/nll": v, "rewards/accuracies": v}} for n, v in ((1, 0.5), (2, 0.2), (3, 0.9))
    ]
    assert heldout.best(measured, "loss/nll", [1, 2, 3]) == 2
    assert heldout.best(measured, "rewards/accuracies", [1, 2, 3]) == 3
    with pytest.raises(BadInput, match=r"expected one of \['loss/nll', 'rewards/accuracies'\]"):
        heldout.best(measured, "reward", [1, 2, 3])


def test_export_takes_the_checkpoint_that_was_asked_for(
    tmp_path: Path, tiny_run: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """latest, best or a number; one that is damaged or not there is refused by name, not replaced by another."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def export(number: int, keep_best: str | None, *which: str) -> tuple[int, str]:
        config = tiny_run({}, {}, {"eval_every": 1, "checkpoint_every": 1}, {}).model_dump()
        config["data"]["heldout"], config["loop"]["keep_best"] = 2, keep_best
        (run_dir / "config.yaml").write_text(dump(RunConfig.model_validate(config)))
        try:
            code = main(["export", str(run_dir), "--to", str(tmp_path / f"out-{number}"), *which])
        except SystemExit as refused:  # argparse's own
            code = int(refused.code or 0)
        return code, capsys.readouterr().err

    def exported(number: int) -> bytes:
        return (tmp_path / f"out-{number}" / "model.safetensors").read_bytes()

    for updates in (1, 2, 5):

        def save(folder: Path, updates: int = updates) -> None:
            (folder / "policy").mkdir()
            (folder / "policy" / "model.safetensors").write_bytes(bytes([updates]))

        checkpoint.write(run_dir, updates, {}, save)
    for number, (which, expected) in enumerate([("latest", 5), ("best", 2), ("1", 1)]):
        assert export(number, "reward", "--checkpoint", which)[0] == 0
        assert exported(number) == bytes([expected])
    assert export(3, "reward")[0] == 0 and exported(3) == bytes([5])
    for which, keep_best, said in [
        ("best", None, "loop.keep_best"),
        ("3", None, "[1, 2, 5]"),
        ("last", None, "expected latest, best or a number"),
    ]:
        code, told = export(4, keep_best, "--checkpoint", which)
        assert code == 2 and said in told
    (run_dir / "checkpoints" / "step-000002" / "policy" / "model.safetensors").write_bytes(b"?")
    code, told = export(5, "reward", "--checkpoint", "2")
    assert code == 2 and "model.safetensors" in told
    code, told = export(6, "reward", "--checkpoint", "1", "--what", "experience")
    assert code == 2 and "--checkpoint" in told


@pytest.mark.parametrize("lacking", ["eval_every", "checkpoint_every", "heldout"])
def test_keeping_the_best_is_refused_where_it_would_do_nothing(
    tiny_run: Callable[..., RunConfig], lacking: str
) -> None:
    config = tiny_run({}, {}, {"eval_every": 1, "checkpoint_every": 1}, {}).model_dump()
    config["data"]["heldout"] = 2
    config["loop"]["keep_best"] = "reward"
    RunConfig.model_validate(config)
    config["data" if lacking == "heldout" else "loop"][lacking] = 0
    with pytest.raises(ValueError, match=f"{lacking} must be above 0"):
        RunConfig.model_validate(config)
    config["loop"]["keep_best"] = "loss/nll"
    with pytest.raises(ValueError, match="held-out answers are measured by `reward`"):
        RunConfig.model_validate(config)


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
