"""Every algorithm that samples learns a task whose best answer is known, and not from rewards drawn by lot.

The reward is the share of an answer's tokens that belong to a quarter of the vocabulary: about a quarter at the start,
1 at best. Each algorithm is run three times with it, and three times, with the same seeds and prompts, with rewards
that are numbers of a hash of the answer (RAFT: with its random selection): all else equal, these must teach nothing.
What is measured is the true share of the samples in the buffer. The test holds the lower end of a one-sided 95 % t
interval over the seeds.

The loop, the buffer, the learner and the engine are those of a run in one process. Not covered: vLLM, DeepSpeed, Ray
(the runs of test_run_end_to_end), KL prices (their gradients are in test_ops_kl), whether what is learnt is worth
anything.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from rlhf.buffer.audit import ExperienceView
from rlhf.buffer.schema import FILE_NAME
from rlhf.cli import launch
from rlhf.cluster import Cluster
from rlhf.config import RunConfig
from rlhf.data.prompts import PromptSet
from rlhf.observers import METRICS_FILE, JsonlMetrics, read_jsonl

STEPS, SEEDS = 10, (0, 1, 2)
T_95 = 2.920  # of Student's t with two degrees of freedom, one-sided
REWARDS = """
import hashlib

def share(prompts, completions, completion_ids, **columns):
    return [sum(token % 4 == 0 for token in ids) / len(ids) for ids in completion_ids]

def lot(prompts, completions, completion_ids, **columns):
    digests = [hashlib.blake2b(f"{p}{ids}".encode(), digest_size=4).digest() for p, ids in zip(prompts, completion_ids)]
    return [int.from_bytes(digest, "big") / 2**32 for digest in digests]
"""
NO_PRICE = {"kl": {"coef": 0}}
LEARNING_RATES = {"ppo": 1e-2, "rso": 1e-2}  # a critic has to learn first; few of the candidates are compared
PAIRS = {"loss": {"name": "sigmoid", "beta": 0.1}}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "rloo": {"name": "rloo", **NO_PRICE},
    "reinforce-none": {"name": "reinforce", "baseline": "none", **NO_PRICE},
    "reinforce-moving-average": {"name": "reinforce", "baseline": "moving_average", **NO_PRICE},
    "reinforce-batch-mean": {"name": "reinforce", "baseline": "batch_mean", **NO_PRICE},
    "reinforce++": {"name": "reinforce_plus_plus", **NO_PRICE},
    "reinforce++-baseline": {"name": "reinforce_plus_plus_baseline", **NO_PRICE},
    "grpo": {"name": "grpo", **NO_PRICE},
    "dr-grpo": {"name": "grpo", "scale": "none", "aggregation": "constant", **NO_PRICE},
    "ppo": {"name": "ppo", "critic": {"lr": 1e-2}, **NO_PRICE},
    "vanilla-pg": {
        "name": "ppo",
        "lam": 1.0,
        "clip": {"low": 1.0, "high": 1e9},
        "critic": {"lr": 1e-2, "value_clip": None},
        **NO_PRICE,
    },
    "raft": {"name": "raft", **NO_PRICE},
    "online-dpo": {"name": "online_dpo", **PAIRS},
    "rso": {"name": "rso", "rejection": {"beta": 0.5, "accept": 4}, "pairing": "tournament", **PAIRS},
}


def settings(folder: Path, algorithm: dict[str, Any], reward: str, seed: int) -> RunConfig:
    return TypeAdapter(RunConfig).validate_python(
        {
            "seed": seed,
            "model": {"name": "tiny"},
            "algorithm": {"samples_per_prompt": 8, **algorithm},
            "data": {"path": str(folder / "prompts.jsonl"), "chat_template": False},
            "loop": {"num_steps": STEPS, "groups_per_step": 4, "checkpoint_every": 0},
            "generation": {"engine": "transformers", "max_new_tokens": 4},
            "learner": {"engine": "torch", "lr": LEARNING_RATES.get(algorithm["name"], 5e-3)},
            "reward": {"function": f"{folder / 'rewards.py'}:{reward}", "isolate": False},
        }
    )


def shares(folder: Path, algorithm: dict[str, Any], reward: str, seed: int) -> list[float]:
    """The true share of each step's samples."""
    kind = algorithm.get("selection", reward)
    config, run_dir = settings(folder, algorithm, reward, seed), folder / f"{kind}-{seed}"
    run_dir.mkdir()
    observer = JsonlMetrics(run_dir, print)
    assert launch.run(config, Cluster(), run_dir, PromptSet.load(config), in_process=True, observer=observer) == "done"
    assert sum(row.get("faults/nonfinite_step", 0) for row in read_jsonl(run_dir / METRICS_FILE)) == 0
    found: list[list[float]] = [[] for _ in range(STEPS)]
    for group, _, step in ExperienceView(run_dir / FILE_NAME).stored():
        assert step is not None
        found[step] += [float((sample.token_ids % 4 == 0).mean()) for sample in group.samples]
    return [statistics.fmean(own) for own in found]


def least(gains: Sequence[float]) -> float:
    """The lower end of the t interval of the mean gain."""
    return statistics.fmean(gains) - T_95 * statistics.stdev(gains) / math.sqrt(len(gains))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "say {word}"}}\n' for word in "abcdefghijklmnop"))
    yield tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_beats_its_start_and_rewards_by_lot(folder: Path, name: str) -> None:
    taught = [shares(folder, ALGORITHMS[name], "share", seed) for seed in SEEDS]
    if name == "raft":
        by_lot = [shares(folder, {**ALGORITHMS[name], "selection": "random"}, "share", seed) for seed in SEEDS]
    else:
        by_lot = [shares(folder, ALGORITHMS[name], "lot", seed) for seed in SEEDS]
    assert [own[0] for own in taught] == [own[0] for own in by_lot], "they start from the same samples"
    end, control = ([statistics.fmean(own[-2:]) for own in runs] for runs in (taught, by_lot))
    over_start = [last - own[0] for last, own in zip(end, taught, strict=True)]
    over_control = [last - other for last, other in zip(end, control, strict=True)]
    print(f"{name}: start {[own[0] for own in taught]}, end {end}, by lot {control}")
    assert least(over_start) > 0
    assert least(over_control) > 0
