"""The export of experience as a Hugging Face data set."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlhf.buffer.export import export_experience
from rlhf.buffer.offline import Completion, dataset_group
from rlhf.buffer.schema import FILE_NAME
from rlhf.buffer.store import ExperienceBuffer
from rlhf.errors import BadInput
from rlhf.experience import Columns

PROMISED = [
    "prompt",
    "completion",
    "prompt_ids",
    "completion_ids",
    "loss_mask",
    "behavior_logprobs",
    "ref_logprobs",
    "reward",
    "group_id",
    "sample_index",
    "policy_version",
    "step",
    "source",
    "temperature",
    "finish_reason",
]


@pytest.fixture
def run_dir(tmp_path: Path, rollout) -> Path:
    """Prompt 0 trained in step 5, prompt 1 stored without columns, prompt 2 a preference pair, prompt 3 only leased."""
    buffer = ExperienceBuffer(tmp_path / "run" / FILE_NAME, frozenset({"reward"}), None, 3)
    (tmp_path / "run").mkdir()
    buffer.open()
    tickets = [lease.ticket for lease in buffer.lease(4, "test", 0)]
    for prompt_id in range(2):
        buffer.add_group(prompt_id, tickets[prompt_id], rollout(prompt_id, 2, 2, 4, {"answer": "42"}))
    prompt, ids, mask = rollout(2, 0, 1, 4, {}).prompt, np.array([7, 2], np.int32), np.array([False, True])
    pair = dataset_group(prompt, [Completion(ids, mask, "good", 0), Completion(ids, mask, "bad", 1)])
    buffer.add_group(2, tickets[2], pair)
    lengths = [len(sample.token_ids) for sample in buffer.group(0).samples]
    arrays = [np.full(length, -0.25, np.float32) for length in lengths]
    buffer.add_columns(0, Columns(0, {"reward": [0.1, None], "politeness": [1.0, 2.0]}, {"ref_logprobs": arrays}))
    groups = [g.with_columns(Columns(0, {}, {"old_logprobs": arrays})) for g in buffer.take(5, 1)]
    buffer.commit(5, groups, 6, "f", {})
    buffer.close()
    return tmp_path / "run"


def test_the_export_loads_and_holds_every_stored_sample(run_dir: Path, tmp_path: Path, rollout):
    """Loaded with `datasets.load_dataset` as a user would; compared with the groups that were stored."""
    from datasets import load_dataset

    assert export_experience(run_dir, tmp_path / "out") == 6
    rows = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), split="train")
    assert set(PROMISED) <= set(rows.column_names) and len(rows) == 6
    first, original = rows[0], rollout(0, 2, 2, 4, {}).samples[0]
    assert first["completion_ids"] == original.token_ids.tolist() and first["loss_mask"] == original.loss_mask.tolist()
    assert np.array_equal(np.float32(first["behavior_logprobs"]), original.behavior_logprobs)
    assert (first["prompt"], first["completion"], first["prompt_ids"]) == ("<hi>", original.text, [1, 2, 3])
    assert (first["step"], first["policy_version"], first["versions"]) == (5, 2, [2] * 4)
    assert first["ref_logprobs"] == first["old_logprobs"] == [-0.25] * 4 and first["politeness"] == 1.0
    assert json.loads(first["prompt_columns"]) == {"answer": "42"}
    assert rows["reward"] == [0.1, None, None, None, None, None] and rows["group_id"] == [0, 0, 1, 1, 2, 2]
    assert rows["step"] == [5, 5, None, None, None, None] and rows["sample_index"] == [0, 1] * 3
    assert rows["source"] == ["policy"] * 4 + ["dataset"] * 2 and rows["rank"] == [None] * 4 + [0.0, 1.0]
    assert rows["temperature"] == [0.7] * 4 + [None] * 2 and rows["behavior_logprobs"][4] is None
    assert rows["finish_reason"] == ["stop"] * 4 + ["given"] * 2 and rows["ref_logprobs"][2] is None


def test_the_export_is_split_into_files_that_load_in_order(run_dir: Path, tmp_path: Path, monkeypatch):
    """With tiny limits, as a run of many gigabytes would be. Not covered: the memory that it takes."""
    from datasets import load_dataset

    import rlhf.buffer.export as export

    monkeypatch.setattr(export, "ROWS_PER_BATCH", 1)
    monkeypatch.setattr(export, "ROWS_PER_FILE", 2)
    assert export_experience(run_dir, tmp_path / "out") == 6
    assert len(list((tmp_path / "out" / "data").glob("*.parquet"))) == 3
    rows = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), split="train")
    assert list(zip(rows["group_id"], rows["sample_index"], strict=True)) == [
        (g, s) for g in range(3) for s in range(2)
    ]


def test_the_export_refuses_to_overwrite_and_leaves_nothing_behind(run_dir: Path, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(BadInput, match="choose another --to"):
        export_experience(run_dir, tmp_path / "full")
    with pytest.raises(BadInput, match="not readable as an experience buffer"):
        export_experience(tmp_path / "no run", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "run"]


def test_an_empty_run_exports_nothing(tmp_path: Path):
    buffer = ExperienceBuffer(tmp_path / FILE_NAME, frozenset(), None, 3)
    buffer.open()
    buffer.close()
    with pytest.raises(BadInput, match="nothing to export"):
        export_experience(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
