"""Runs on preferences and demonstrations through the real command line, on the tiny model; and their bad inputs.

Not covered: several trainer ranks, LoRA's own reference on data beyond the tests of the learner.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlhf.cli.main import main

ROOT = Path(__file__).parents[1]
RLHF = [sys.executable, "-m", "rlhf.cli.main"]
ANIMALS = ("cat", "dog", "fox", "hen", "owl", "cow")
COLOURS = ("red", "blue", "green", "black")
PAIRS = [
    {"prompt": f"What is the {animal}?", "chosen": f"It is {colour}.", "rejected": f"{colour} {colour} {colour}"}
    for animal in ANIMALS
    for colour in COLOURS
]


@pytest.fixture
def content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run file of SFT that would run, in the current folder, beside 24 pairs."""
    write_rows(tmp_path / "pairs.jsonl", PAIRS)
    monkeypatch.chdir(tmp_path)
    return {
        "seed": 5,
        "model": {"name": "tiny"},
        "algorithm": {"name": "sft"},
        "data": {"path": "pairs.jsonl", "completion_column": "chosen", "heldout": 1},
        "loop": {"num_steps": 6, "groups_per_step": 8, "checkpoint_every": 2},
        "learner": {"engine": "torch", "lr": 3e-3, "packing": True},
    }


@pytest.fixture
def rlhf(content: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Writes `content` as run.yaml and calls `rlhf run`; returns the exit code and what was printed."""

    def call(*arguments: str) -> tuple[int, str]:
        Path("run.yaml").write_text(yaml.safe_dump(content))
        code = main(["run", "run.yaml", "--in-process", *arguments])
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return call


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def policy(run_dir: Path, updates: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{updates:06d}" / "policy" / "model.safetensors")


def test_sft_learns_held_out_answers_and_goes_on_bitwise(
    rlhf: Callable[..., tuple[int, str]], content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped after three steps and gone on with: the parameters, metrics and ledger of a run that was not. The
    control is the held-out loss before training; answers of held-out animals share their form with the others."""
    assert rlhf("--run-dir", "straight")[0] == 0
    before, after = (row["values"]["loss/nll"] for row in read_rows(Path("straight/evaluations.jsonl")))
    assert after < 0.75 * before
    content["loop"]["num_steps"] = 3
    assert rlhf("--run-dir", "stopped")[0] == 0
    content["loop"]["num_steps"] = 6
    code, shown = rlhf("--run-dir", "stopped")
    assert code == 0 and "goes on" in shown
    left, right = policy(Path("straight"), 6), policy(Path("stopped"), 6)
    assert all(torch.equal(left[name], right[name]) for name in left)
    losses = [[row["loss/nll"] for row in read_rows(Path(run) / "metrics.jsonl")] for run in ("straight", "stopped")]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert main(["verify", "straight", "--json"]) == 0
    ledger = json.loads(capsys.readouterr().out)["ledger"]
    assert ledger["trained"] == ledger["issued"] == 48 and ledger["lost"] == ledger["duplicated"] == 0
    assert main(["inspect", "straight"]) == 0
    assert "held-out after 6 steps: loss/nll" in capsys.readouterr().out
    assert main(["replay", "straight", "--step", "4"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    step = read_rows(Path("straight/metrics.jsonl"))[0]
    assert not {"staleness/mean", "time/generate_s", "mismatch/logprob_abs_mean", "reward/mean"} & step.keys()


def test_dpo_starts_at_ln_2_and_learns_to_tell_held_out_pairs(
    rlhf: Callable[..., tuple[int, str]], content: dict[str, Any]
) -> None:
    """Reference log-probs come from the reference judge and stand in the buffer; trap 15: h is 0 at the start."""
    content["algorithm"] = {"name": "dpo", "loss": {"beta": 0.1}}
    content["data"] = {"path": "pairs.jsonl", "heldout": 2}
    content["learner"]["lr"] = 3e-4
    assert rlhf("--run-dir", "dpo")[0] == 0
    before, after = (row["values"] for row in read_rows(Path("dpo/evaluations.jsonl")))
    assert before["loss/preference"] == pytest.approx(0.693147, abs=1e-4)
    assert abs(before["rewards/margins"]) < 1e-4
    assert after["rewards/accuracies"] == 1.0 and after["rewards/margins"] > 0.1
    report = Path("dpo/report.html").read_text()
    assert "Held-out: rewards/margins" in report and "Preference loss" in report


@pytest.mark.parametrize("how", ["lora", "reward"])
def test_dpo_with_adapters_and_with_rewards_that_order_the_pairs(
    rlhf: Callable[..., tuple[int, str]], content: dict[str, Any], how: str
) -> None:
    """With LoRA the learner fills the reference's column; a reward that prefers `rejected` turns the labels round."""
    content["data"] = {"path": "pairs.jsonl", "heldout": 1}
    content["learner"]["lr"] = 1e-3
    content["algorithm"] = {"name": "dpo", "loss": {"beta": 0.1}}
    if how == "lora":
        content["model"]["lora"] = {"rank": 4}
    else:
        Path("reward.py").write_text("def long(prompts, completions, **_):\n    return [len(c) for c in completions]\n")
        content["reward"] = {"function": "reward.py:long", "isolate": False}
        content["algorithm"]["preferred_by"] = "reward"
    assert rlhf("--run-dir", how)[0] == 0
    before, after = (row["values"] for row in read_rows(Path(how) / "evaluations.jsonl"))
    assert before["loss/preference"] == pytest.approx(0.693147, abs=1e-4)
    assert after["rewards/margins"] > 0.05
    longer = before["pairs/chosen_length_mean"] - before["pairs/rejected_length_mean"]
    assert longer > 0 if how == "reward" else longer < 0


def rankings(sign: int) -> list[dict[str, Any]]:
    """Four answers a row: a sentence, a word twice, and a word given by two, which tie."""
    rows = []
    for animal in ANIMALS:
        for colour, ranks in zip(COLOURS, ([0, 2, 1, 1], [0, 1, 3, 3], [-1, 9, 5, 5], [0, 2, 1, 1]), strict=True):
            answers = [f"It is {colour}.", f"{colour} {colour}", animal, animal]
            ranked = {"completions": answers, "ranks": [sign * rank for rank in ranks]}
            rows.append({"prompt": f"What is the {animal}?", **ranked})
    return rows


def test_a_reward_model_learns_from_rankings(rlhf: Callable[..., tuple[int, str]], content: dict[str, Any]) -> None:
    """Four answers a row, two of them equal in text and rank: five pairs and a tie. Held-out prompts are put in order;
    with ranks turned round the same answers are put in the opposite order."""
    orders = []
    for name, sign in (("right", 1), ("wrong", -1)):
        write_rows(Path("ranked.jsonl"), rankings(sign))
        content["algorithm"], content["data"] = {"name": "reward_model"}, {"path": "ranked.jsonl", "heldout": 2}
        content["learner"] = {"engine": "torch", "lr": 1e-3}
        code, said = rlhf("--run-dir", name)
        assert code == 0, said
        steps = read_rows(Path(name) / "metrics.jsonl")
        assert [row["pairs/ties"] for row in steps] == [8] * 6
        before, after = (row["values"] for row in read_rows(Path(name) / "evaluations.jsonl"))
        assert before["rewards/accuracies"] < 0.9 < after["rewards/accuracies"]
        orders.append(after["rewards/margins"])
    assert min(orders) > 0.5


def test_dropped_rows_are_counted_where_people_look(
    rlhf: Callable[..., tuple[int, str]], content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [{**PAIRS[0], "chosen": ""}, {**PAIRS[1], "chosen": " "}, {**PAIRS[2], "chosen": "long " * 40}]
    write_rows(Path("pairs.jsonl"), PAIRS + bad)
    content["loop"]["num_steps"] = 1
    code, shown = rlhf("--run-dir", "dropping", "data.bad_rows=drop", "data.max_completion_tokens=32")
    assert code == 0, shown
    assert "2 dropped (empty answer), 1 dropped (answer too long)" in shown
    report = Path("dropping/report.html").read_text()
    assert "rows of the data left out: empty answer</td><td>2" in report and "answer too long</td><td>1" in report
    assert main(["inspect", "dropping"]) == 0
    assert "2 dropped (empty answer)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        ([{**PAIRS[0], "chosen": " "}], [], "pairs.jsonl:2: empty answer: 'chosen' is ' '"),
        ([{"prompt": "a"}], [], "pairs.jsonl:2: no column 'chosen'"),
        ([], ["data.format=messages"], "pairs.jsonl:1: no column 'messages'"),
        ([], ["data.format=preference"], "data.format=preference: this algorithm learns from demonstrations"),
        ([], ["data.completion_column=completion"], "data.completion_column=chosen trains on the chosen answers"),
        ([], ["generation.max_new_tokens=8"], "generation: algorithm.name=sft learns from the demonstrations"),
        ([], ["reward.function=json:dumps"], "reward: algorithm.name=sft learns from the demonstrations"),
        ([], ["algorithm={name: rloo}"], "missing required key generation: algorithm.name=rloo samples answers"),
        (
            [],
            ["data={path: pairs.jsonl, heldout: 9, completion_column: chosen}"],
            "data.heldout=9 leaves nothing to train on",
        ),
        (
            [{**PAIRS[0], "chosen": "long " * 600}],
            ["data.max_completion_tokens=4096"],
            "tokens, but tiny holds 1024 (max_position_embeddings)",
        ),
    ],
)
def test_bad_input_of_a_run_on_data(
    rlhf: Callable[..., tuple[int, str]], rows: list[dict[str, Any]], settings: list[str], expected: str
) -> None:
    write_rows(Path("pairs.jsonl"), [PAIRS[0], *rows])
    code, shown = rlhf("data.heldout=0", *settings)
    assert code == 2 and expected in shown, shown
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({**PAIRS[0], "rejected": PAIRS[0]["chosen"]}, "pairs.jsonl:2: chosen equals rejected"),
        ({**PAIRS[0], "rejected": ""}, "pairs.jsonl:2: empty answer"),
        (
            {
                "prompt": "q",
                "chosen": [{"role": "user", "content": "other"}, {"role": "assistant", "content": "b"}],
                "rejected": [{"role": "user", "content": "other"}, {"role": "assistant", "content": "c"}],
            },
            "pairs.jsonl:2: prompts of the two sides differ",
        ),
    ],
)
def test_bad_pairs_are_refused(
    rlhf: Callable[..., tuple[int, str]], content: dict[str, Any], row: dict[str, Any], expected: str
) -> None:
    write_rows(Path("pairs.jsonl"), [PAIRS[0], row])
    content["algorithm"] = {"name": "dpo", "loss": {"beta": 0.1}}
    content["data"] = {"path": "pairs.jsonl"}
    code, shown = rlhf()
    assert code == 2 and expected in shown and "data.bad_rows=drop" in shown, shown


def test_a_run_goes_on_with_the_same_rows_only(rlhf: Callable[..., tuple[int, str]]) -> None:
    """Its prompt ids would mean other rows."""
    assert rlhf("--run-dir", "one", "loop.num_steps=1")[0] == 0
    write_rows(Path("pairs.jsonl"), PAIRS[1:])
    code, shown = rlhf("--run-dir", "one", "loop.num_steps=2")
    assert code == 2 and "this run was started with data" in shown


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_shipped_run_files_on_data_train_on_ray(tmp_path: Path, name: str) -> None:
    """Two steps with DeepSpeed and no rollout engine; DPO with its reference model as an actor."""
    command = [*RLHF, "run", f"configs/{name}_tiny.yaml", "loop.num_steps=2", "--run-dir", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    steps = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert len(steps) == 2 and all(step["sync/engines"] == 0 and step["grad_norm"] > 0 for step in steps)
    assert len(read_rows(tmp_path / "run" / "evaluations.jsonl")) == 2
