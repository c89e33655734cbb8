"""Runs with one side frozen: sampled and judged without training, or trained on what another run recorded.

In one process and float32, so that results are compared bitwise. Not covered: records of other models' tokenizers that
happen to be equal, critics.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

Forked = Callable[..., tuple[int, str]]

RUN = {
    "seed": 3,
    "model": {"name": "tiny"},
    "algorithm": {"name": "rloo", "samples_per_prompt": 2, "kl": {"coef": 0.02}},
    "data": {"path": "prompts.jsonl"},
    "loop": {"num_steps": 3, "groups_per_step": 2},
    "generation": {"engine": "transformers", "max_new_tokens": 4, "temperature": 0.9},
    "learner": {"engine": "torch", "lr": 1e-3},
    "reward": {"function": "reward.py:reward"},
}
REWARD = """
from pathlib import Path

def reward(prompts, completions):
    with (Path(__file__).parent / "judged").open("a") as file:
        file.write(prompts[0] + "\\n")
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(40)))
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    return tmp_path


@pytest.fixture
def rlhf(forked: Forked, workplace: Path) -> Callable[..., str]:
    """`rlhf run run.yaml … --run-dir DIR`, in one process; gives what was printed."""

    def run(run_dir: str, *words: str, code: int = 0) -> str:
        found, printed = forked(workplace, "run", "run.yaml", *words, "--run-dir", run_dir, "--in-process")
        assert found == code, printed
        return printed

    return run


def ledger(forked: Forked, run_dir: Path) -> Mapping[str, int]:
    code, printed = forked(run_dir.parent, "verify", run_dir.name, "--json")
    assert code == 0, printed
    counts: dict[str, int] = json.loads(printed)["ledger"]
    return {name: count for name, count in counts.items() if count}


def weights(run_dir: Path, updates: int = 3) -> Mapping[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{updates:06d}" / "policy" / "model.safetensors")


def equal(left: Path, right: Path) -> bool:
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def judged(workplace: Path) -> list[str]:
    return (workplace / "judged").read_text().splitlines()


def test_training_on_a_record_equals_the_run_that_made_it(
    workplace: Path, record: Path, rlhf: Callable[..., str], forked: Forked
) -> None:
    """Without its data, its reward and its engine, which are gone. Another learning rate is a control. The record is
    only read."""
    content = (record / "experience.db").read_bytes()
    (workplace / "prompts.jsonl").unlink()
    (workplace / "reward.py").unlink()
    said = rlhf("again", "--train-only", str(record))
    assert f"6 groups that {record} sampled and judged; nothing is sampled or judged here" in said
    assert equal(record, workplace / "again")
    assert ledger(forked, workplace / "again") == {"issued": 6, "trained": 6}
    rlhf("faster", "--train-only", str(record), "learner.lr=0.01")
    assert not equal(record, workplace / "faster")
    assert (record / "experience.db").read_bytes() == content


@pytest.mark.soak
def test_training_on_a_record_goes_on_where_it_stopped(workplace: Path, rlhf: Callable[..., str]) -> None:
    """And with nothing else: not with fresh samples, not with a record that has changed meanwhile."""
    rlhf("record")
    rlhf("again", "--train-only", "record", "loop.num_steps=2")
    assert "this run was started with data 'record" in rlhf("again", code=2)
    assert "goes on from" in rlhf("again", "--train-only", "record")
    assert equal(workplace / "record", workplace / "again")
    rlhf("record", "loop.num_steps=4")
    assert "this run was started with data 'record" in rlhf(
        "again", "--train-only", "record", "loop.num_steps=4", code=2
    )


def test_generating_only_is_the_beginning_of_the_run(
    workplace: Path, record: Path, rlhf: Callable[..., str], forked: Forked
) -> None:
    """Once sampled and judged, groups stay: the run that goes on with them equals one that was not stopped, and no
    group is judged again."""
    said = rlhf("frozen", "--generate-only", "1")
    assert "2 groups are stored and judged, for the steps from 0 on" in said
    assert ledger(forked, workplace / "frozen") == {"issued": 2, "complete": 2}
    assert not (workplace / "frozen" / "checkpoints").exists() and len(judged(workplace)) == 2
    rlhf("frozen", "--generate-only", "1")
    assert len(judged(workplace)) == 2, "what is there was sampled again"
    rlhf("frozen")
    assert len(judged(workplace)) == len(set(judged(workplace))) == 6
    assert ledger(forked, workplace / "frozen") == {"issued": 6, "trained": 6}
    assert equal(workplace / "frozen", record)


def test_both_sides_one_after_the_other(workplace: Path, rlhf: Callable[..., str], forked: Forked) -> None:
    """Three steps of one policy's samples, and a run that trains on them as far as staleness allows."""
    rlhf("rollouts", "loop.max_staleness=2", "--generate-only", "3")
    assert ledger(forked, workplace / "rollouts") == {"issued": 6, "complete": 6}
    assert "step 1 would train on samples of version 0; expected loop.max_staleness=1 or more, found 0" in rlhf(
        "trained", "--train-only", "rollouts", code=2
    )
    rlhf("trained", "--train-only", "rollouts", "loop.max_staleness=2")
    rows = [json.loads(line) for line in (workplace / "trained" / "metrics.jsonl").read_text().splitlines()]
    assert [row["staleness/mean"] for row in rows] == [0, 1, 2]
    assert ledger(forked, workplace / "rollouts") == {"issued": 6, "complete": 6}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--generate-only", "2"],
            "--generate-only 2: loop.max_staleness=0 and loop.num_steps=3 let one policy sample",
        ),
        (["--generate-only", "0"], "expected 1 to 1"),
        (["--generate-only", "1", "--train-only", "record"], "expected one of them"),
        (["--train-only", "nowhere"], "nowhere: not a run directory"),
        (["--train-only", "empty"], "--train-only empty: has no experience.db"),
        (["--train-only", "record", "loop.num_steps=9"], "holds 6 judged groups, but loop.num_steps=9"),
        (
            ["--train-only", "record", "algorithm.samples_per_prompt=4"],
            "expected algorithm.samples_per_prompt=2, found 4",
        ),
        (["--train-only", "record", "model.name=tiny_t5"], "whose tokenizer is not that of model.name=tiny_t5"),
    ],
)
def test_what_cannot_be_frozen_is_refused(
    words: list[str], said: str, workplace: Path, rlhf: Callable[..., str], record: Path
) -> None:
    shutil.copytree(record, workplace / "record")
    (workplace / "empty").mkdir()
    shutil.copy(record / "config.yaml", workplace / "empty")
    assert said in rlhf("out", *words, code=2)
    assert not (workplace / "out").exists()


@pytest.fixture(scope="module")
def record(forked: Forked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("record")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(40)))
    (folder / "reward.py").write_text(REWARD)
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    code, printed = forked(folder, "run", "run.yaml", "--run-dir", "record", "--in-process")
    assert code == 0, printed
    return folder / "record"


@pytest.mark.parametrize("which", ["dpo_tiny", "ppo_ptx_tiny"])
def test_a_run_that_reads_data_has_nothing_to_freeze(which: str, workplace: Path, record: Path, forked: Forked) -> None:
    config = str(Path(__file__).parents[1] / "configs" / f"{which}.yaml")
    code, printed = forked(workplace, "run", config, "--train-only", str(record), "--run-dir", "out", "--in-process")
    assert code == 2 and "expected an algorithm that samples" in printed, printed


def test_a_record_without_the_columns_is_refused(workplace: Path, rlhf: Callable[..., str]) -> None:
    rlhf("record", "algorithm.kl.coef=0", "loop.num_steps=1")
    said = rlhf("out", "--train-only", "record", "loop.num_steps=1", code=2)
    assert "rloo needs ref_logprobs, too; expected the record of a run with the same judges" in said


@pytest.mark.ray
@pytest.mark.soak
def test_on_ray_a_record_needs_no_engine(workplace: Path, record: Path, forked: Forked) -> None:
    (workplace / "cluster.yaml").write_text("threads_per_role: 1\nrollout: {gpus: 1}\nreward: {gpus: 1}\n")
    words = ["--cluster", "cluster.yaml", "--train-only", str(record), "--run-dir", "out"]
    code, printed = forked(workplace, "run", "run.yaml", *words)
    assert code == 0, printed
    assert equal(record, workplace / "out")
