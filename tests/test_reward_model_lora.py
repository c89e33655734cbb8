"""Reward models and rankers with low-rank adapters: what moves, what is saved, what the plan says of it.

DeepSpeed is in test_learner_deepspeed. Not covered: GPUs, real models, whether a low rank is enough for them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rlhf.algorithms.table import build
from rlhf.buffer.offline import Completion, dataset_group
from rlhf.cli.main import main
from rlhf.cluster import Cluster
from rlhf.config import RunConfig
from rlhf.config_file import load_run
from rlhf.errors import BadInput
from rlhf.experience import Group, Prompt
from rlhf.judges.build import build_reward_judge
from rlhf.learner.build import build_scorer
from rlhf.learner.learner import PolicyLearner
from rlhf.models.resolve import resolve
from rlhf.models.score import ScoreModel
from rlhf.observers import read_jsonl
from rlhf.planning.batches import DataSize, Lengths
from rlhf.planning.devices import Machine
from rlhf.planning.plan import Given, Models, make_plan
from rlhf.planning.shapes import BUILT_CONFIGS, shape_of
from rlhf.weights import probe_ids

CONFIG = Path(__file__).parents[1] / "configs" / "reward_model_tiny.yaml"
LORA = {"lora": {"rank": 4}}


@pytest.fixture
def groups() -> list[Group]:
    """Six prompts with two or three answers of random tokens, the first the best."""
    random = np.random.default_rng(3)
    made = []
    for number in range(6):
        prompt = Prompt(number, number, 0, "q", "q", random.integers(5, 320, 4).astype(np.int32), {})
        answers = [random.integers(5, 320, random.integers(1, 13)).astype(np.int32) for _ in range(2 + number % 2)]
        completions = [
            Completion(ids, np.ones(len(ids), np.bool_), "", float(rank)) for rank, ids in enumerate(answers)
        ]
        made.append(dataset_group(prompt, completions))
    return made


@pytest.fixture
def config_of(tiny_run: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    def build_config(model: Mapping[str, Any], learner: Mapping[str, Any]) -> RunConfig:
        content = tiny_run(model, {"lr": 0.05, **learner}, {}, {}).model_dump(exclude_unset=True)
        content |= {"algorithm": {"name": "reward_model"}, "generation": None, "reward": None}
        return RunConfig.model_validate(content)

    return build_config


def learner_of(config: RunConfig) -> PolicyLearner:
    made = PolicyLearner(config, build(config.algorithm), 0, 1, None)
    made.setup()
    return made


def train(learner: PolicyLearner, groups: Sequence[Group], steps: int) -> PolicyLearner:
    for _ in range(steps):
        learner.update(learner.prepare(groups))
    return learner


def parameters(learner: PolicyLearner) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner._engine.policy.named_parameters()}


def score_of_the_probe(learner: PolicyLearner) -> np.ndarray:
    """The learner's own scores of the fixed sequence that goes with each version, at each token but the first few."""
    weights = learner.publish()
    assert weights is not None
    return weights.probe.logprobs


def heads_on_the_trunk(model: torch.nn.Module, name: str) -> np.ndarray:
    """Plain transformers' scores of the same tokens: one prefix at a time, read at its last token."""
    model.config.pad_token_id = None  # it then reads at the last token, padding or not
    ids = torch.from_numpy(probe_ids(BUILT_CONFIGS[name]["vocab_size"]).astype("int64"))[None]
    with torch.no_grad():
        return np.array([model(input_ids=ids[:, : 1 + i]).logits.item() for i in range(ids.shape[1])])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny", "tiny_t5"])
def test_adapters_and_the_head_learn_and_the_base_stays_bit_for_bit(
    config_of: Callable[..., RunConfig], groups: list[Group], name: str, dtype: str
) -> None:
    """Of all parameters, by name: every adapter and every tensor of the head has moved after two steps, others not by
    a bit. T5's head has two layers, and neither has an adapter."""
    learner = learner_of(config_of({"name": name, **LORA}, {"dtype": dtype}))
    policy = learner._engine.policy
    assert isinstance(policy, ScoreModel)
    start, head = parameters(learner), {id(parameter) for parameter in policy.head.parameters()}
    expected = {n for n, p in policy.named_parameters() if ".lora_A." in n or ".lora_B." in n or id(p) in head}
    assert len(head) == (4 if name == "tiny_t5" else 1) and len(expected) > len(head)
    assert not [n for n in expected if policy.head_name in n and ".lora_" in n]
    after = parameters(train(learner, groups, 2))
    assert {n for n in after if not torch.equal(after[n], start[n])} == expected


@pytest.mark.parametrize("name", ["tiny-untied", "tiny_t5"])
def test_first_scores_are_those_of_the_model_without_adapters(
    config_of: Callable[..., RunConfig], groups: list[Group], name: str
) -> None:
    """Bit for bit, B being 0, and with the same new head; the control is a step of training."""
    whole, adapted = (learner_of(config_of({"name": name, **lora}, {})) for lora in ({}, LORA))
    assert np.array_equal(score_of_the_probe(whole), score_of_the_probe(adapted))
    assert not np.array_equal(score_of_the_probe(whole), score_of_the_probe(train(adapted, groups, 1)))


def test_what_is_saved_is_scored_alike_by_plain_transformers_and_by_peft(
    config_of: Callable[..., RunConfig], groups: list[Group], tmp_path: Path
) -> None:
    """policy/ is a sequence classifier without a trace of adapters; adapter/ on the base, with the head that is in it.
    Both to float32's rounding at every token of the probe; the base with a head of zeros is far away."""
    learner = train(learner_of(config_of(LORA, {})), groups, 3)
    learner.save(tmp_path)
    merged, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "policy", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected = score_of_the_probe(learner)
    found = heads_on_the_trunk(merged, "tiny")[-len(expected) :]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected).max() > 1e-2

    base = AutoModelForSequenceClassification.from_pretrained(resolve("tiny"), num_labels=1)
    with torch.no_grad():
        base.score.weight.zero_()
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert adapted.peft_config["default"].task_type == "SEQ_CLS"
    np.testing.assert_allclose(heads_on_the_trunk(adapted, "tiny")[-len(expected) :], expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_going_on_from_a_checkpoint_equals_never_stopping(
    config_of: Callable[..., RunConfig], groups: list[Group], tmp_path: Path, dtype: str
) -> None:
    """Bitwise, moments and head included: 2 + 2 updates = 4; and what is saved does not train on as another model."""
    config = config_of(LORA, {"dtype": dtype, "minibatches": 2, "schedule": "linear"})
    whole = train(learner_of(config), groups, 4)
    train(learner_of(config), groups, 2).save(tmp_path)
    second = learner_of(config)
    second.load(tmp_path)
    train(second, groups, 2)
    expected, found = whole.publish(), second.publish()
    assert expected is not None and found is not None
    assert found.fingerprint == expected.fingerprint
    with pytest.raises(BadInput, match="not the state of this model"):
        learner_of(config_of({}, {})).load(tmp_path)


@pytest.mark.slow
def test_a_run_file_trains_one_that_is_a_judge(
    tmp_path: Path, tiny_run: Callable[..., RunConfig], make_group: Callable[..., Group]
) -> None:
    """`rlhf run` on preferences: the held-out loss falls; its policy/ judges text, and not as an untrained one does."""
    settings = ["model.lora.rank=4", "learner.engine=torch", "learner.lr=0.01", "loop.num_steps=6"]
    settings += ["loop.eval_every=3", "loop.checkpoint_every=3"]
    assert main(["run", str(CONFIG), *settings, "--in-process", "--run-dir", str(tmp_path / "run")]) == 0
    losses = [row["values"]["loss/bradley_terry"] for row in read_jsonl(tmp_path / "run" / "evaluations.jsonl")]
    assert losses[-1] < losses[0]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / "step-000006" / "adapter" / "adapter_model.safetensors").is_file()
    group, judged = make_group(0, [None] * 3, [1, 2, 3], {}, {}), []
    for step in ("step-000003", "step-000006"):
        content = tiny_run({}, {}, {}, {}).model_dump() | {"reward": {"model": str(checkpoints / step / "policy")}}
        judge = build_reward_judge(RunConfig.model_validate(content), {}, Path("unused"))
        judge.setup()
        judged.append(judge.judge(group).scores["reward"])
    assert all(score is not None and np.isfinite(score) for scores in judged for score in scores)
    assert judged[0] != judged[1]


@pytest.mark.parametrize("lora", [None, {"rank": 4}, {"rank": 3, "target_modules": ["q_proj", "v_proj"]}])
@pytest.mark.parametrize("name", ["tiny", "tiny-untied", "tiny_t5"])
def test_the_plan_counts_what_the_real_model_trains_and_holds(
    config_of: Callable[..., RunConfig], name: str, lora: dict[str, Any] | None
) -> None:
    """Two moments of 4 bytes for each trained parameter, 4 bytes for each parameter; what is published has no
    adapters, and no language model's head."""
    if name == "tiny_t5" and lora is not None:
        lora = {**lora, "target_modules": ["q", "v"]}
    config = config_of({"name": name, "lora": lora}, {})
    machine = Machine(gemm_flops=1e11, bytes_per_s=1e10, hashed_per_s=1e9, cores=2, memory=64e9, bfloat16_gain=2.0)
    shape = shape_of(BUILT_CONFIGS[name], name)
    models, lengths = Models(shape, None, {}), Lengths(10, 10, 10)
    plan = make_plan(Given(config, Cluster(), models, lengths, DataSize(100, 2), machine, None, None))
    (trainer,) = (own for own in plan.memory if own.role == "trainer")
    planned = {part.name: part.size for part in trainer.parts}
    real = build_scorer(config)
    assert planned["optimizer"] == 8 * sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert planned["weights"] == 4 * sum(p.numel() for p in real.parameters())
    plain = build_scorer(config_of({"name": name}, {}))
    assert plan.published == planned["published copy (rank 0)"] == 4 * sum(p.numel() for p in plain.parameters())
    assert "logits" not in planned


@pytest.mark.parametrize("target", [["score"], ["q_proj", "score"]])
def test_an_adapter_for_the_head_is_refused(config_of: Callable[..., RunConfig], target: list[str]) -> None:
    """It is trained whole; peft would pass over the name."""
    with pytest.raises(BadInput, match="target_modules: score is no layer"):
        build_scorer(config_of({"lora": {"rank": 4, "target_modules": target}}, {}))


@pytest.mark.parametrize("name", ["reward_model", "pairwise_ranker"])
def test_four_bits_are_refused(name: str) -> None:
    overrides = [f"algorithm={{name: {name}}}", "learner.engine=torch", "model.lora.base=nf4"]
    with pytest.raises(BadInput, match="reward models and rankers are not loaded in 4 bits"):
        load_run(CONFIG, [*overrides, "learner.zero_stage=2"])
