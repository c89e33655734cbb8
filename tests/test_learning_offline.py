"""SFT, DPO and reward models learn from data what holds for rows they have not seen, and do not where labels are by
lot.

Preferences: of two random words the one with more letters `e` is preferred. Demonstrations: the prompt names a colour,
and the answer is that colour's. The control is the same run, seed by seed, with the labels of the training rows drawn
by lot: pairs turned round by a coin, answers exchanged between prompts. Measured on held-out rows, whose labels are
right, before and after: the margin of rewards, or the log-likelihood. The test holds the lower end of a one-sided 95 %
t interval over three seeds above 0. Not covered: Ray, DeepSpeed, other models; how much is learnt is no figure of
merit.
"""

import json
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from rlhf.cli import launch
from rlhf.cluster import Cluster
from rlhf.config import RunConfig
from rlhf.data.offline import OfflineSet
from rlhf.observers import EVALUATIONS_FILE, JsonlMetrics, read_jsonl

SEEDS, ROWS, HELDOUT = (0, 1, 2), 240, 48
T_95 = 2.920  # of Student's t with two degrees of freedom, one-sided
ANSWERS = {"red": "stop here", "green": "go on now", "blue": "swim a lot", "white": "sleep well"}
# name -> algorithm, what is measured on held-out rows and its sign (larger is better then), steps, learning rate
TASKS: dict[str, tuple[dict[str, Any], str, float, int, float]] = {
    "sft": ({"name": "sft"}, "loss/nll", -1.0, 20, 1e-2),
    "dpo": ({"name": "dpo", "loss": {"beta": 0.1}}, "rewards/margins", 1.0, 8, 1e-3),
    "slic-hinge": ({"name": "dpo", "loss": {"name": "slic_hinge", "beta": 0.1}}, "rewards/margins", 1.0, 8, 1e-3),
    "reward-model": ({"name": "reward_model"}, "rewards/margins", 1.0, 20, 1e-3),
}


def right_rows(name: str, source: random.Random) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    while len(rows) < ROWS:
        number = f"number {len(rows)}"
        if name == "sft":
            colour = source.choice(list(ANSWERS))
            rows.append({"prompt": f"{number} {colour}", "completion": ANSWERS[colour]})
            continue
        less, more = sorted(
            ("".join(source.choice("abcdef") for _ in range(8)) for _ in range(2)), key=lambda word: word.count("e")
        )
        if less.count("e") < more.count("e"):
            rows.append({"prompt": number, "chosen": more, "rejected": less})
    return rows


def by_lot(row: dict[str, str], source: random.Random) -> dict[str, str]:
    """The row with a label that says nothing."""
    if "completion" in row:
        return {**row, "completion": source.choice(list(ANSWERS.values()))}
    if source.random() < 0.5:
        return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    return row


def settings(file: Path, name: str, seed: int) -> RunConfig:
    algorithm, _, _, steps, rate = TASKS[name]
    return TypeAdapter(RunConfig).validate_python(
        {
            "seed": seed,
            "model": {"name": "tiny"},
            "algorithm": algorithm,
            "data": {"path": str(file), "heldout": HELDOUT},
            "loop": {"num_steps": steps, "groups_per_step": 16, "checkpoint_every": 0},
            "learner": {"engine": "torch", "lr": rate},
        }
    )


def before_and_after(folder: Path, name: str, rows: Sequence[dict[str, str]], seed: int) -> tuple[float, float]:
    """What is measured on held-out rows under the first and the last weights; larger is better."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, measure, sign, _, _ = TASKS[name]
    config = settings(folder / "rows.jsonl", name, seed)
    data = OfflineSet.load(config)
    observer = JsonlMetrics(folder, print)
    assert launch.run(config, Cluster(), folder, data, in_process=True, observer=observer) == "done"
    first, last = (row["values"][measure] for row in read_jsonl(folder / EVALUATIONS_FILE))
    return sign * first, sign * last


def least(gains: Sequence[float]) -> float:
    """The lower end of the one-sided t interval of the mean gain."""
    return statistics.fmean(gains) - T_95 * statistics.stdev(gains) / math.sqrt(len(gains))


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_beats_its_start_and_labels_by_lot(tmp_path: Path, name: str) -> None:
    over_start, over_control = [], []
    for seed in SEEDS:
        rows = right_rows(name, random.Random(seed))
        start, end = before_and_after(tmp_path / f"right-{seed}", name, rows, seed)
        config = settings(tmp_path / f"right-{seed}" / "rows.jsonl", name, seed)
        unseen = {prompt.content for prompt in OfflineSet.load(config).heldout_prompts()}
        coin = random.Random(f"coin {seed}")
        noise = [row if row["prompt"] in unseen else by_lot(row, coin) for row in rows]
        same_start, control = before_and_after(tmp_path / f"lot-{seed}", name, noise, seed)
        assert same_start == start, "both start from the same weights and are measured on the same rows"
        over_start.append(end - start)
        over_control.append(end - control)
    print(f"{name}: over its start {over_start}, over labels by lot {over_control}")
    assert least(over_start) > 0
    assert least(over_control) > 0
