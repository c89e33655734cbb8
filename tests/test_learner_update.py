"""The learner with the torch engine: gradients, steps, publication and checkpoints. Not covered here: several ranks."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.algorithms import Algorithm
from rlhf.algorithms.table import build
from rlhf.config import RunConfig
from rlhf.errors import BadInput, RunFailed
from rlhf.experience import OLD_LOGPROBS, REF_LOGPROBS, Group, Row, TrainBatch, fill_in
from rlhf.learner.collate import collate
from rlhf.learner.engine import check_optimized
from rlhf.learner.learner import PolicyLearner
from rlhf.learner.plan import Unit
from rlhf.learner.torch_engine import TorchEngine
from rlhf.metrics import Metrics, values
from rlhf.models.load import load_model
from rlhf.models.policy import PolicyModel, probe_inputs
from rlhf.models.resolve import resolve
from rlhf.ops.microbatch import LossSums, MicroBatch, Outputs
from rlhf.weights import verify_arrival, verify_names

# With eps 1 the first step of AdamW is lr g / (|g| + 1): differences of parameters are those of gradients.
LINEAR = {"adam_eps": 1.0, "lr": 1.0, "max_grad_norm": 1e9}


@pytest.fixture
def make(tiny_run: Callable[..., RunConfig]) -> Callable[..., PolicyLearner]:
    def build_one(
        learner: Mapping[str, Any], model: Mapping[str, Any], loop: Mapping[str, Any], kl: Mapping[str, Any]
    ) -> PolicyLearner:
        config = tiny_run(model, learner, loop, kl)
        made = PolicyLearner(config, build(config.algorithm), 0, 1, None)
        made.setup()
        return made

    return build_one


@pytest.fixture
def groups(sampled_groups: Callable[..., list[Group]]) -> list[Group]:
    return sampled_groups(0, 4, 4, 0, 0.05)


def tensors(learner: PolicyLearner) -> dict[str, Tensor]:
    weights = learner.publish()
    assert weights is not None
    return {name: tensor.unpack().clone() for name, tensor in weights.tensors.items()}


def furthest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].detach().float() - other[name].detach().float()).abs().max()) for name in one)


def train(learner: PolicyLearner, groups: Sequence[Group]) -> Metrics:
    filled = fill_in(groups, learner.annotate_share(groups))
    return learner.update(learner.prepare(filled))


@pytest.mark.parametrize(
    "settings",
    [{"tokens_per_microbatch": 1}, {"tokens_per_microbatch": 4096}, {"packing": True}, {"logit_chunk": 3}],
)
def test_gradient_does_not_depend_on_how_the_batch_is_cut(
    make: Callable[..., PolicyLearner], groups: list[Group], settings: dict[str, Any]
) -> None:
    """Trap 30: one row a micro-batch, all at once, packed, small chunks of logits: the same gradient to 1e-6."""
    one, other = make(LINEAR, {}, {}, {}), make({**LINEAR, **settings}, {}, {}, {})
    before = tensors(one)
    train(one, groups)
    train(other, groups)
    assert furthest(tensors(one), before) > 1e-3
    assert furthest(tensors(one), tensors(other)) <= 1e-6


def test_activation_checkpoints_change_nothing(make: Callable[..., PolicyLearner], groups: list[Group]) -> None:
    """Recomputed activations give the same gradient, with and without adapters."""
    for lora in (None, {"rank": 4}):
        one = make(LINEAR, {"lora": lora}, {}, {})
        other = make(LINEAR, {"lora": lora, "gradient_checkpointing": True}, {}, {})
        train(one, groups)
        train(other, groups)
        assert furthest(tensors(one), tensors(other)) <= 1e-6


def test_two_identical_runs_are_bitwise_equal(
    make: Callable[..., PolicyLearner], sampled_groups: Callable[..., list[Group]]
) -> None:
    """Float32, same number of threads, 3 updates; trap 59. Not covered: other machines."""
    fingerprints = []
    for _ in range(2):
        learner = make({"minibatches": 2, "epochs": 2}, {}, {}, {})
        for step in range(3):
            train(learner, sampled_groups(step, 4, 4, step, 1.0))
        weights = learner.publish()
        assert weights is not None
        fingerprints.append(weights.fingerprint)
    assert fingerprints[0] == fingerprints[1]


def test_all_parameters_move_and_in_the_direction_that_pays(
    make: Callable[..., PolicyLearner], groups: list[Group]
) -> None:
    """Trap 40, and the sign: after one step samples with a positive advantage are likelier, the others less likely."""
    learner = make({"epochs": 1, "minibatches": 2, "lr": 1e-3}, {}, {}, {})
    before, old = tensors(learner), fill_in(groups, learner.annotate_share(groups))
    learner.update(learner.prepare(old))
    assert all(not torch.equal(before[name], after) for name, after in tensors(learner).items())
    new = fill_in(groups, learner.annotate_share(groups))
    batch = learner.prepare(old)
    gained = [
        float((n.tokens[OLD_LOGPROBS] - o.tokens[OLD_LOGPROBS]).sum())
        for og, ng in zip(old, new, strict=True)
        for o, n in zip(og.samples, ng.samples, strict=True)
    ]
    advantages = [float(row.tokens["advantages"][0]) for row in batch.rows]
    assert sum(a * g for a, g in zip(advantages, gained, strict=True)) > 0


def test_grad_norm_is_logged_before_clipping_and_the_step_is_clipped() -> None:
    """Trap 33: gradients (3, 4), clip 1: logged 5.0, step taken with (.6, .8)."""
    from rlhf.config import LearnerConfig, ModelConfig

    policy = PolicyModel(load_model(ModelConfig(name="tiny"), "float32"), 5)
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
    policy.extra = nn.Parameter(torch.zeros(2))
    config = LearnerConfig(lr=1.0, adam_eps=1e3, max_grad_norm=1.0)
    engine = TorchEngine(policy, config, torch.device("cpu"))
    engine.backward((policy.extra * torch.tensor([3.0, 4.0])).sum())
    step = engine.step(1.0)
    assert step.applied
    assert step.grad_norm == pytest.approx(5.0)
    moved = -policy.extra.detach() * 1e3  # AdamW's first step: lr g / (|g| + eps)
    assert moved.tolist() == pytest.approx([0.6, 0.8], rel=1e-2)


def test_first_update_of_fresh_samples_measures_the_mismatch(
    make: Callable[..., PolicyLearner], groups: list[Group]
) -> None:
    """0 when the engine said what the learner says; .3 when it is off by .3 at every token (trap 8)."""
    helper = make({"minibatches": 2}, {}, {}, {})
    own = fill_in(groups, helper.annotate_share(groups))
    said = [
        replace(
            group, samples=tuple(replace(s, behavior_logprobs=s.tokens[OLD_LOGPROBS], tokens={}) for s in group.samples)
        )
        for group in own
    ]
    measured = values(train(make({}, {}, {}, {}), said))
    assert measured["mismatch/logprob_abs_max"] <= 1e-5
    assert abs(measured["mismatch/kl"]) <= 1e-6
    off = [
        replace(
            g, samples=tuple(replace(s, behavior_logprobs=s.behavior_logprobs - np.float32(0.3)) for s in g.samples)
        )
        for g in said
    ]
    for settings in ({}, {"minibatches": 2}):  # measured in the step's pass, or in the annotating one
        measured = values(train(make(settings, {}, {}, {}), off))
        assert measured["mismatch/logprob_abs_mean"] == pytest.approx(0.3, abs=1e-5)
        assert measured["mismatch/kl"] == pytest.approx(np.exp(0.3) - 1.3, abs=1e-5)


def test_stale_tokens_stay_out_of_the_mismatch(make: Callable[..., PolicyLearner], groups: list[Group]) -> None:
    """Samples of version 0 at version 1: nothing to compare; they differ for a good reason."""
    learner = make({}, {}, {"max_staleness": 1}, {})
    assert "mismatch/kl" in values(train(learner, groups))
    assert "mismatch/kl" not in values(train(learner, groups))


def test_old_logprobs_are_computed_only_where_they_are_needed(
    make: Callable[..., PolicyLearner], groups: list[Group]
) -> None:
    """None for one step on fresh samples; with two minibatches the ratio starts at exactly the first pass's."""
    assert make({}, {}, {}, {}).annotate_share(groups) == []
    learner = make({"minibatches": 2}, {}, {}, {})
    for columns, group in zip(learner.annotate_share(groups), groups, strict=True):
        assert columns.prompt_id == group.prompt.id
        for array, sample in zip(columns.tokens[OLD_LOGPROBS], group.samples, strict=True):
            assert array.shape == sample.token_ids.shape
            assert (array < 0).all()


def test_lora_reference_is_the_base_model(make: Callable[..., PolicyLearner], groups: list[Group]) -> None:
    """The column equals the untrained model's log-probs, before and after training moved the adapter."""
    plain = make({"minibatches": 2}, {}, {}, {}).annotate_share(groups)
    learner = make({"lr": 0.1}, {"lora": {"rank": 4}}, {}, {"coef": 0.1})
    for _ in range(2):
        filled = learner.annotate_share(groups)
        for column, expected in zip(filled, plain, strict=True):
            for mine, theirs in zip(column.tokens[REF_LOGPROBS], expected.tokens[OLD_LOGPROBS], strict=True):
                assert np.abs(mine - theirs).max() <= 1e-5
        learner.update(learner.prepare(fill_in(groups, filled)))


@pytest.mark.parametrize("name", ["tiny", "tiny-untied"])
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_published_weights_make_a_plain_model_with_the_same_logprobs(
    make: Callable[..., PolicyLearner], groups: list[Group], name: str, lora: dict[str, int] | None
) -> None:
    """Names as in the weight file (a tied head once), nothing missing, nothing unexpected, probe to 1e-5; trap 50."""
    learner = make({"lr": 0.1}, {"name": name, "lora": lora}, {}, {})
    train(learner, groups)
    train(learner, groups)
    weights = learner.publish()
    assert weights is not None
    assert weights.version == learner.version == 2
    verify_arrival(weights, "test")
    model = AutoModelForCausalLM.from_pretrained(resolve(name))
    verify_names(weights, {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}, "test")
    start = {key: parameter.clone() for key, parameter in model.named_parameters()}
    model.load_state_dict({key: tensor.unpack() for key, tensor in weights.tensors.items()}, strict=False)
    assert furthest(start, dict(model.named_parameters())) > 1e-2
    inputs = probe_inputs(model.config)
    with torch.no_grad():
        logits = torch.log_softmax(model(inputs.input_ids).logits[0, :-1], dim=-1)
    measured = logits.gather(1, inputs.targets[:, None])[:, 0]
    assert float((measured - torch.from_numpy(weights.probe.logprobs)).abs().max()) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hundred_publications_leave_the_base_bit_identical(
    make: Callable[..., PolicyLearner], groups: list[Group], dtype: str
) -> None:
    """Trap 49: adapters are merged into copies."""
    learner = make({"lr": 0.1, "dtype": dtype}, {"lora": {"rank": 4}}, {}, {})
    base = load_model(learner._config.model, learner._config.learner.dtype).state_dict()
    train(learner, groups)
    first = learner.publish()
    for _ in range(100):
        last = learner.publish()
    assert first is not None
    assert last is not None
    assert first.fingerprint == last.fingerprint
    for name, parameter in learner._engine.policy.base.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, base[name.replace(".base_layer.", ".")])


def test_bfloat16_publishes_the_values_it_computes_with_and_keeps_finer_masters(
    make: Callable[..., PolicyLearner], groups: list[Group]
) -> None:
    """Steps too small for bfloat16 add up in the masters: 40 steps at 1e-4 move weights that one step cannot."""
    learner = make({"dtype": "bfloat16", "lr": 1e-4}, {}, {}, {})
    start = tensors(learner)
    assert {tensor.dtype for tensor in start.values()} == {torch.bfloat16}
    norm = "model.norm.weight"  # 1.0, where bfloat16 has steps of 2^-8 below and 2^-7 above
    train(learner, groups)
    assert torch.equal(tensors(learner)[norm], start[norm])
    for _ in range(39):
        train(learner, groups)
    assert not torch.equal(tensors(learner)[norm], start[norm])


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}])
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_going_on_from_a_checkpoint_equals_never_stopping(
    make: Callable[..., PolicyLearner],
    sampled_groups: Callable[..., list[Group]],
    tmp_path: Path,
    settings: dict[str, Any],
    lora: dict[str, int] | None,
) -> None:
    """Trap 63, bitwise: 2 + 2 updates with a new learner between them = 4 updates; moments and rate included."""
    settings = {**settings, "schedule": "linear", "minibatches": 2}

    def run(learner: PolicyLearner, steps: range) -> None:
        for step in steps:
            train(learner, sampled_groups(step, 4, 4, step, 1.0))

    whole, first = make(settings, {"lora": lora}, {}, {}), make(settings, {"lora": lora}, {}, {})
    run(whole, range(4))
    run(first, range(2))
    first.save(tmp_path)
    second = make(settings, {"lora": lora}, {}, {})
    second.load(tmp_path)
    assert second.version == 2
    run(second, range(2, 4))
    expected, found = whole.publish(), second.publish()
    assert expected is not None
    assert found is not None
    assert found.fingerprint == expected.fingerprint


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_saved_policy_loads_with_from_pretrained(
    make: Callable[..., PolicyLearner], groups: list[Group], tmp_path: Path, lora: dict[str, int] | None
) -> None:
    """Model (merged), tokenizer and generation config; the adapter alone loads on the base and says the same."""
    learner = make({"lr": 0.1}, {"lora": lora}, {}, {})
    train(learner, groups)
    learner.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template
    assert model.generation_config.eos_token_id == [1]
    assert furthest(tensors(learner), dict(model.named_parameters())) == 0.0
    assert (tmp_path / "adapter").exists() == (lora is not None)
    if lora is not None:
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(resolve("tiny"))
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
        ids = torch.arange(5, 25)[None]
        assert torch.allclose(adapted(ids).logits, model(ids).logits, atol=1e-4)


def test_state_of_another_model_or_algorithm_is_refused(
    make: Callable[..., PolicyLearner], groups: list[Group], tmp_path: Path
) -> None:
    """The message names a tensor, or what the algorithm carries from step to step."""
    make({}, {"name": "tiny"}, {}, {}).save(tmp_path)
    with pytest.raises(BadInput, match=r"lm_head\.weight absent"):
        make({}, {"name": "tiny-untied"}, {}, {}).load(tmp_path)
    file = tmp_path / "trainer" / "learner.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"run_state": {"reward_sum": 1.0}}))
    with pytest.raises(BadInput, match="reward_sum"):
        make({}, {"name": "tiny"}, {}, {}).load(tmp_path)


def test_run_state_advances_with_the_update_and_not_before(
    tiny_run: Callable[..., RunConfig], groups: list[Group]
) -> None:
    """A batch that is prepared and never trained leaves the moving baseline where it was."""
    config = tiny_run({}, {}, {}, {})
    plain = build(config.algorithm)

    def prepare(groups: Sequence[Group], state: Mapping[str, float]) -> tuple[TrainBatch, Mapping[str, float]]:
        batch, _ = plain.prepare(groups, {})
        seen.append(state["calls"])
        return batch, {"calls": state["calls"] + 1}

    seen: list[float] = []
    learner = PolicyLearner(config, Algorithm(plain.needs, {"calls": 0.0}, prepare, plain.loss), 0, 1, None)
    learner.setup()
    learner.prepare(groups)
    learner.update(learner.prepare(groups))
    learner.prepare(groups)
    assert seen == [0.0, 0.0, 1.0]


def test_gradient_that_is_not_finite_is_skipped_and_counted(
    tiny_run: Callable[..., RunConfig], groups: list[Group]
) -> None:
    """Nothing moves, the version counts up, and the next update trains as if nothing had been."""
    config = tiny_run({}, {}, {}, {})
    plain = build(config.algorithm)
    bad = [True]

    def loss(outputs: Outputs, batch: MicroBatch) -> LossSums:
        sums = plain.loss(outputs, batch)
        return sums._replace(loss=sums.loss * float("nan")) if bad[0] else sums

    learner = PolicyLearner(config, plain._replace(loss=loss), 0, 1, None)
    learner.setup()
    before = tensors(learner)
    measured = values(train(learner, groups))
    assert measured["faults/nonfinite_step"] == 1
    assert "grad_norm" not in measured
    assert furthest(before, tensors(learner)) == 0.0
    assert learner.version == 1
    bad[0] = False
    assert "faults/nonfinite_step" not in values(train(learner, groups))
    assert furthest(before, tensors(learner)) > 0


def test_update_without_rows_or_without_advantages_is_no_fault(
    make: Callable[..., PolicyLearner], sampled_groups: Callable[..., list[Group]]
) -> None:
    """An empty batch takes no step; equal rewards give a zero gradient, and no complaint."""
    learner = make({}, {}, {}, {})
    assert values(learner.update(TrainBatch((), "rows", {})))["faults/empty_minibatch"] == 1
    measured = values(train(learner, sampled_groups(0, 2, 4, 0, 0.0)))
    assert measured["grad_norm"] == 0
    assert learner.version == 2


def test_tensor_that_no_gradient_reaches_is_named(make: Callable[..., PolicyLearner], groups: list[Group]) -> None:
    """Trap 40: a trainable tensor outside the loss stops the first update."""
    learner = make({}, {}, {}, {})
    policy = learner._engine.policy
    trunk = policy.base.get_decoder()
    layer = trunk.layers[1]
    layer.forward = lambda hidden, *args, **kwargs: type(layer).forward(layer, hidden, *args, **kwargs).detach()
    with pytest.raises(RunFailed, match=r"model\.layers\.1"):
        train(learner, groups)


def test_tensors_outside_the_optimizer_are_named() -> None:
    """Trap 40: 3 of 10 tensors left out."""
    module = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
    optimizer = torch.optim.AdamW(list(module.parameters())[:7])
    with pytest.raises(RunFailed, match=r"3 of 10 .*3\.bias, 4\.weight, 4\.bias"):
        check_optimized(module, optimizer)


def test_frozen_model_is_refused() -> None:
    """No trainable tensor at all."""
    module = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(RunFailed, match="no trainable parameters"):
        check_optimized(module, torch.optim.AdamW(module.parameters()))


def test_collation_keeps_rows_columns_and_masks_where_they_belong() -> None:
    """By hand: two rows, padded and packed; a masked token in the middle; columns are 0 at padding."""
    column = {"advantages": np.array([1, 2, 3], np.float32)}
    one = Row(4, np.array([9], np.int32), np.array([5, 6, 1], np.int32), np.array([True, False, True]), 0.5, column)
    two = Row(
        6,
        np.array([8, 7], np.int32),
        np.array([1], np.int32),
        np.array([True]),
        2.0,
        {"advantages": np.array([9.0], np.float32)},
    )
    for packed in (False, True):
        collated = collate([Unit((one,)), Unit((two,))], ["advantages"], packed=packed)
        assert collated.batch.mask.tolist() == [[True, False, True], [True, False, False]]
        assert collated.batch.tokens["advantages"].tolist() == [[1, 2, 3], [9, 0, 0]]
        assert collated.batch.unit.tolist() == [4, 6]
        assert collated.inputs.targets.tolist() == [5, 6, 1, 1]
        assert collated.inputs.temperature.tolist() == [0.5, 0.5, 0.5, 2.0]
        predictors = collated.inputs.input_ids.reshape(-1)[collated.inputs.predictors]
        assert predictors.tolist() == [9, 5, 6, 7]
        assert (collated.inputs.attention_mask is None) == packed
