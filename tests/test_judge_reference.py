"""The reference judge on tiny models. Not covered: GPU, Ray, LoRA (the learner fills the column then)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.config import RunConfig
from rlhf.errors import RunFailed
from rlhf.experience import Row
from rlhf.judges.reference import ReferenceJudge
from rlhf.learner.collate import collate
from rlhf.learner.plan import Unit
from rlhf.learner.torch_engine import TorchEngine
from rlhf.models.load import load_model
from rlhf.models.policy import PolicyModel
from rlhf.models.resolve import resolve


def run_config(name="tiny", dtype="float32", tokens=4096):
    return RunConfig.model_validate(
        {
            "model": {"name": name},
            "algorithm": {"name": "rloo"},
            "data": {"path": "none.jsonl"},
            "loop": {"num_steps": 1, "groups_per_step": 1},
            "generation": {"max_new_tokens": 8},
            "learner": {"engine": "torch", "dtype": dtype, "tokens_per_microbatch": tokens, "logit_chunk": 3},
            "reward": {"function": "a:b"},
        }
    )


@pytest.fixture
def judge_with():
    def build(**settings):
        judge = ReferenceJudge(run_config(**settings))
        judge.setup()
        return judge

    return build


@pytest.fixture
def group(make_group):
    """Completions of 4, 1, 0 and 6 tokens that differ, at temperature 0.7."""
    made = make_group(3, [1.0] * 4, [4, 1, 0, 6], {}, {})
    samples = [replace(s, token_ids=(s.token_ids + 3 * s.index).astype(np.int32)) for s in made.samples]
    return replace(made, samples=tuple(samples))


def prefix_by_prefix(folder, prompt_ids, completion_ids, temperature):
    """The independent reference: one unpadded prefix at a time, the last position's logits, float64 log-softmax."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for count, token in enumerate(completion_ids):
        ids = torch.tensor([[*prompt_ids, *completion_ids[:count]]], dtype=torch.int64)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1].double() / temperature
        found.append(float(logits[int(token)] - logits.logsumexp(0)))
    return found


@pytest.mark.parametrize("name", ["tiny", "tiny-untied"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_equal_those_of_one_prefix_at_a_time(judge_with, group, name, temperature):
    """No shift by one, the first token from the last prompt position, logits divided by the sample's temperature."""
    samples = tuple(
        replace(s, sampling=replace(s.sampling, temperature=temperature), loss_mask=s.loss_mask) for s in group.samples
    )
    group = replace(group, samples=samples)
    columns = judge_with(name=name).judge(group)
    assert columns.names == {"ref_logprobs"} and columns.prompt_id == 3
    for sample, column in zip(group.samples, columns.tokens["ref_logprobs"], strict=True):
        expected = prefix_by_prefix(resolve(name), group.prompt.token_ids, sample.token_ids, temperature)
        assert column.tolist() == pytest.approx(expected, abs=1e-5)
    group.with_columns(columns)


def test_group_mates_and_micro_batches_do_not_matter(judge_with, group):
    """Each sample alone, and the group cut into micro-batches of one row: the same numbers to 1e-5."""
    whole = judge_with().judge(group).tokens["ref_logprobs"]
    cut = judge_with(tokens=1).judge(group).tokens["ref_logprobs"]
    alone = [
        judge_with().judge(replace(group, samples=(replace(s, index=0),))).tokens["ref_logprobs"][0]
        for s in group.samples
    ]
    for one, other, single in zip(whole, cut, alone, strict=True):
        assert np.allclose(one, other, atol=1e-5) and np.allclose(one, single, atol=1e-5)


def test_judging_again_gives_the_same_bits_and_no_gradient(judge_with, group):
    """Dropout is off, nothing is trained."""
    judge = judge_with()
    first, second = judge.judge(group), judge.judge(group)
    for one, other in zip(first.tokens["ref_logprobs"], second.tokens["ref_logprobs"], strict=True):
        assert np.array_equal(one, other)
    assert not any(parameter.requires_grad for parameter in judge._model.parameters())
    assert not judge._model.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_untrained_policy_equals_its_reference(judge_with, group, dtype):
    """The policy in the learner's engine, float32 masters and all, on the same batch: the same bits, so KL is 0 at
    step 0."""
    config = run_config(dtype=dtype)
    policy = PolicyModel(load_model(config.model, "float32"), config.learner.logit_chunk)
    engine = TorchEngine(policy, config.learner, torch.device("cpu"))
    rows = [
        Row(s.index, group.prompt.token_ids, s.token_ids, s.loss_mask, s.sampling.temperature, {})
        for s in group.samples
    ]
    collated = collate([Unit((row,)) for row in sorted(rows, key=lambda r: -len(r.completion_ids))], (), packed=False)
    with torch.no_grad():
        expected = collated.outputs(*engine.forward(collated.inputs)).logprobs
    found = judge_with(dtype=dtype).judge(group).tokens["ref_logprobs"]
    for unit, column in zip(collated.batch.unit.tolist(), expected, strict=True):
        assert np.array_equal(column[: len(found[unit])].numpy(), found[unit])


def test_masked_tokens_have_logprobs_too(judge_with, group):
    """A tool's tokens are context, and the column has their length."""
    masked = replace(group.samples[0], loss_mask=np.array([True, False, False, True]))
    columns = judge_with().judge(replace(group, samples=(masked, *group.samples[1:])))
    plain = judge_with().judge(group)
    assert np.array_equal(columns.tokens["ref_logprobs"][0], plain.tokens["ref_logprobs"][0])


def test_completions_of_a_data_set_are_read_at_temperature_one(judge_with, group):
    """They were not sampled, so there is no sampling temperature."""
    given = tuple(
        replace(s, sampling=None, behavior_logprobs=None, versions=None, finish_reason="given") for s in group.samples
    )
    at_one = tuple(replace(s, sampling=replace(s.sampling, temperature=1.0)) for s in group.samples)
    found = judge_with().judge(replace(group, samples=given)).tokens["ref_logprobs"]
    expected = judge_with().judge(replace(group, samples=at_one)).tokens["ref_logprobs"]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_judging_before_setup_is_an_error(group):
    """And not a column of zeros."""
    with pytest.raises(RunFailed, match="call setup"):
        ReferenceJudge(run_config()).judge(group)
