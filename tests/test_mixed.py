"""Rows of data beside fresh samples: which prompt ids they are, what they add to the gradient, and whole runs.

Not covered: more than one trainer rank (each batch is planned as without a mix), vLLM, DeepSpeed.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from rlhf.algorithms.table import build
from rlhf.buffer.export import ExperienceView
from rlhf.buffer.offline import Completion, dataset_group
from rlhf.cli.main import main
from rlhf.config import RunConfig
from rlhf.config_file import load_run
from rlhf.errors import BadInput
from rlhf.experience import Group, Prompt
from rlhf.learner.learner import PolicyLearner
from rlhf.metrics import values
from rlhf.mixing import Interleaving


@pytest.mark.parametrize(("groups", "rows"), [(2, 1), (8, 3), (8, 7), (5, 1), (12, 4)])
def test_each_step_has_its_rows_and_both_kinds_count_up_without_gaps(groups: int, rows: int) -> None:
    interleaving = Interleaving(groups, rows)
    steps = [range(step * groups, (step + 1) * groups) for step in range(7)]
    assert [sum(map(interleaving.is_row, ids)) for ids in steps] == [rows] * 7
    for kind in (True, False):
        own = [interleaving.own_number(i) for ids in steps for i in ids if interleaving.is_row(i) is kind]
        assert own == list(range(len(own)))
    assert not any(map(interleaving.is_row, range(-50, 0))), "held-out prompts are sampled"


def demonstrations(count: int) -> list[Group]:
    """Random answers of uneven length with a masked token each, under ids above those of the samples."""
    random = np.random.default_rng(9)
    made = []
    for number in range(count):
        prompt_ids, ids = (random.integers(5, 320, n).astype(np.int32) for n in (4 + number, 3 + 4 * number))
        mask = np.arange(len(ids)) != 1
        prompt = Prompt(100 + number, number, 0, "", "", prompt_ids, {})
        made.append(dataset_group(prompt, [Completion(ids, mask, "", None)]))
    return made


# With eps 1 the first step of AdamW is lr g / (|g| + 1), so that gradients can be told from it.
LR = 0.1
LINEAR = {"adam_eps": 1.0, "lr": LR, "max_grad_norm": 1e9, "tokens_per_microbatch": 48}


def with_mix(config: RunConfig, coef: float) -> RunConfig:
    said = config.model_dump(exclude_unset=True)
    said["mix"] = {"data": {"path": "unused"}, "rows_per_step": 1, "coef": coef}
    return RunConfig.model_validate(said)


def gradient_of(config: RunConfig, groups: list[Group]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the first optimizer step moved each tensor by, turned back into its gradient, and the step's metrics."""
    learner = PolicyLearner(config, build(config.algorithm), 0, 1, None)
    learner.setup()
    before = learner.publish()
    measured = values(learner.update(learner.prepare(groups)))
    after = learner.publish()
    assert before is not None and after is not None
    found = {}
    for name, tensor in after.tensors.items():
        moved = (before.tensors[name].unpack() - tensor.unpack()).double()
        found[name] = moved / (LR - moved.abs())
    return found, measured


def test_the_gradient_is_the_samples_and_coef_times_the_rows_each_over_its_own_count(
    tiny_run: Callable[..., RunConfig], sampled_groups: Callable[..., list[Group]]
) -> None:
    """PPO-ptx's Eq 2 on RLOO: the two parts are those of a run without rows and of supervised fine-tuning. Twice the
    rows have the same mean, and change nothing; the samples' own metrics are what they are without rows."""
    plain = tiny_run({}, LINEAR, {}, {})
    groups, rows = sampled_groups(0, 4, 4, 0, 0.05), demonstrations(3)
    sft = plain.model_dump(exclude_unset=True) | {"algorithm": {"name": "sft"}}
    del sft["generation"], sft["reward"]
    samples, measured = gradient_of(plain, groups)
    shown, told = gradient_of(RunConfig.model_validate(sft), rows)
    both, mixed = gradient_of(with_mix(plain, 3.0), [rows[0], *groups, *rows[1:]])
    again = [replace(row, prompt=replace(row.prompt, id=row.prompt.id + 50)) for row in rows]
    twice, _ = gradient_of(with_mix(plain, 3.0), [*groups, *rows, *again])
    for name in both:
        expected = samples[name] + 3.0 * shown[name]
        assert torch.allclose(both[name], expected, atol=2e-5, rtol=1e-4), name
        assert torch.allclose(twice[name], expected, atol=2e-5, rtol=1e-4), name
    assert max(float((both[name] - samples[name]).abs().max()) for name in both) > 1e-2, "control: rows matter"
    assert mixed["mix/nll"] == pytest.approx(told["loss/nll"], rel=1e-5)
    assert mixed["tokens/trained"] == measured["tokens/trained"] + told["tokens/trained"]
    for name in ("entropy", "loss/policy", "reward/mean", "completion/length_mean", "mismatch/logprob_abs_mean"):
        assert mixed[name] == pytest.approx(measured[name], rel=1e-6), name


@pytest.mark.parametrize("minibatches", [1, 4])
def test_every_row_is_trained_once_an_epoch_however_many_minibatches(
    tiny_run: Callable[..., RunConfig], sampled_groups: Callable[..., list[Group]], minibatches: int
) -> None:
    """Also where there are fewer rows than minibatches, or no sample is left to train on."""
    config = with_mix(tiny_run({}, {"minibatches": minibatches, "epochs": 2}, {}, {}), 1.0)
    groups, rows = sampled_groups(0, 4, 4, 0, 0.05), demonstrations(3)
    tokens = sum(int(s.loss_mask.sum()) for group in [*groups, *rows] for s in group.samples)
    learner = PolicyLearner(config, build(config.algorithm), 0, 1, None)
    learner.setup()
    assert values(learner.update(learner.prepare([*groups, *rows])))["tokens/trained"] == 2 * tokens
    unscored = [
        replace(group, samples=tuple(replace(sample, scores={"reward": None}) for sample in group.samples))
        for group in groups
    ]
    alone = values(learner.update(learner.prepare([*unscored, *rows])))
    assert alone["tokens/trained"] == 2 * sum(int(row.samples[0].loss_mask.sum()) for row in rows)


ANIMALS, COLOURS = ("cat", "dog", "fox", "hen", "owl", "cow"), ("red", "blue", "green", "black")
PAIRS = [
    {"prompt": f"What is the {a}?", "chosen": f"It is {c}.", "rejected": f"{c} {c} {c}"}
    for a in ANIMALS
    for c in COLOURS
]
REWARD = """
def share(prompts, completions, **columns):
    assert not any("What is" in str(prompt) for prompt in prompts), "asked about a row of the data"
    return [text.count("e") / max(len(text), 1) for text in completions]
"""


@pytest.fixture
def content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of RLOO in the current folder, with a third of each step out of demonstrations."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Count to {n}."}) + "\n" for n in range(20)))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (tmp_path / "reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return {
        "seed": 5,
        "model": {"name": "tiny"},
        "algorithm": {"name": "rloo", "samples_per_prompt": 2, "kl": {"coef": 0.05}},
        "data": {"path": "prompts.jsonl", "heldout": 1},
        "mix": {"data": {"path": "pairs.jsonl", "completion_column": "chosen"}, "rows_per_step": 2, "coef": 1.0},
        "loop": {"num_steps": 6, "groups_per_step": 6, "checkpoint_every": 2},
        "generation": {"engine": "transformers", "max_new_tokens": 6},
        "learner": {"engine": "torch", "lr": 3e-3},
        "reward": {"function": "reward.py:share"},
    }


def rlhf(content: Mapping[str, Any], run_dir: str) -> int:
    Path("run.yaml").write_text(yaml.safe_dump(dict(content)))
    return main(["run", "run.yaml", "--in-process", "--run-dir", run_dir])


def metrics_of(run_dir: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


ONLINE_DPO = {"name": "online_dpo", "samples_per_prompt": 2, "loss": {"beta": 0.1}}


@pytest.mark.parametrize("kind", ["demonstrations", "preferences"])
def test_a_run_that_mixes_goes_on_bitwise(
    content: dict[str, Any], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped after three of six steps: weights, losses and ledger of a run that was not. Each step has its two rows,
    which are learnt; no reward is asked for them."""
    if kind == "preferences":
        content["algorithm"] = ONLINE_DPO
    assert rlhf(content, "straight") == 0
    content["loop"]["num_steps"] = 3
    assert rlhf(content, "stopped") == 0
    content["loop"]["num_steps"] = 6
    assert rlhf(content, "stopped") == 0
    weights = [load_file(f"{r}/checkpoints/step-000006/policy/model.safetensors") for r in ("straight", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    name = "mix/nll" if kind == "demonstrations" else "mix/preference"
    losses = [[step[name] for step in metrics_of(run)] for run in ("straight", "stopped")]
    assert losses[0] == losses[1] and len(losses[0]) == 6 and losses[0][-1] < 0.9 * losses[0][0]
    capsys.readouterr()
    assert main(["verify", "stopped", "--json"]) == 0
    ledger = json.loads(capsys.readouterr().out)["ledger"]
    assert ledger["trained"] == 36 and ledger["lost"] == ledger["duplicated"] == 0
    assert main(["replay", "straight", "--step", "4"]) == 0
    check_rows("straight", 6)


def check_rows(run_dir: str, steps: int) -> None:
    """Two of six groups of each step are rows without a version and without a reward, and no step counts them."""
    view = ExperienceView(Path(run_dir) / "experience.db")
    for number in range(steps):
        groups = view.replay(number)
        rows = [group for group in groups if group.origin == "dataset"]
        assert len(rows) == 2 and len(groups) == 6
        assert all(group.policy_version is None for group in rows)
        assert all(sample.scores["reward"] is None for group in rows for sample in group.samples)
    assert all(step["faults/unscorable"] == 0 for step in metrics_of(run_dir))


def test_rows_never_age_and_with_almost_no_weight_they_are_not_learnt(content: dict[str, Any]) -> None:
    """Samples are a version old, rows have none. The loss of the rows stays: the control of the run above."""
    content["mix"]["coef"] = 1e-9
    content["loop"] |= {"num_steps": 4, "max_staleness": 1}
    assert rlhf(content, "idle") == 0
    check_rows("idle", 4)
    assert max(step["staleness/max"] for step in metrics_of("idle")) == 1
    losses = [step["mix/nll"] for step in metrics_of("idle")]
    assert min(losses) > 0.9 * losses[0]


def test_rows_with_a_held_out_prompt_are_left_out_and_counted(
    content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The data sets share all prompts; two prompts are held out, with four rows each."""
    content["data"] = {"path": "pairs.jsonl", "heldout": 2}
    content["loop"]["num_steps"] = 1
    Path("reward.py").write_text(REWARD.replace("assert", "0 and "))
    assert rlhf(content, "shared") == 0
    shown = capsys.readouterr().out
    assert "16 demonstrations to train on" in shown and "8 dropped (same prompt as a held-out one)" in shown


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mix": {"rows_per_step": 6}}, "mix.rows_per_step=6 leaves no prompt to sample"),
        ({"mix": {"data": {"path": "pairs.jsonl", "heldout": 3}}}, "mix.data.heldout"),
        ({"mix": {"coef": 0.0}}, "mix.coef"),
        ({"mix": {"data": {"path": "pairs.jsonl"}}}, "learns from demonstrations"),
        ({"mix": {"data": {"path": "nowhere.jsonl"}}}, "nowhere.jsonl"),
        (
            {"algorithm": {"name": "rso", "rejection": {"beta": 1.0}, "loss": {"beta": 1.0}, "reference": "sampler"}},
            "no policy sampled the rows",
        ),
    ],
)
def test_a_mix_that_cannot_work_is_refused(
    content: dict[str, Any], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], named: str
) -> None:
    for section, keys in changes.items():
        content[section] = keys if section == "algorithm" else content[section] | keys
    assert rlhf(content, "refused") == 2
    shown = capsys.readouterr()
    assert named in shown.out + shown.err and not Path("refused").exists()


def test_a_run_on_data_has_nothing_to_mix(content: dict[str, Any]) -> None:
    for section in ("generation", "reward"):
        del content[section]
    content["algorithm"] = {"name": "sft"}
    Path("run.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(BadInput, match="does not sample"):
        load_run(Path("run.yaml"), [])
