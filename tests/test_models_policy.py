"""Log-probabilities of the policy against the plain model, one prefix at a time, and what they must not depend on."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from rlhf.config import LoraConfig, ModelConfig
from rlhf.errors import BadInput
from rlhf.experience import Row
from rlhf.learner.collate import collate
from rlhf.learner.plan import Unit
from rlhf.models.load import add_lora, load_model
from rlhf.models.policy import ModelInputs, PolicyModel

TOLERANCE = 1e-5


@pytest.fixture
def policy() -> PolicyModel:
    return PolicyModel(load_model(ModelConfig(name="tiny"), "float32"), 5)


def make_rows(lengths: Sequence[tuple[int, int]], temperature: float) -> list[Row]:
    """Rows of (prompt, completion) lengths with random ids; every completion ends with EOS, which is the pad id."""
    random = np.random.default_rng(3)
    rows = []
    for unit, (prompt, completion) in enumerate(lengths):
        ids = random.integers(5, 320, prompt + completion).astype(np.int32)
        ids[-1] = 1
        rows.append(Row(unit, ids[:prompt], ids[prompt:], np.ones(completion, np.bool_), temperature, {}))
    return rows


def logprobs_of(policy: PolicyModel, rows: Sequence[Row], *, packed: bool) -> list[Tensor]:
    collated = collate([Unit((row,)) for row in rows], (), packed=packed)
    outputs = collated.outputs(*policy(*collated.inputs))
    return [outputs.logprobs[i, : len(row.completion_ids)] for i, row in enumerate(rows)]


@torch.no_grad()
def one_prefix_at_a_time(model: torch.nn.Module, row: Row) -> Tensor:
    """The independent reference: no batch, no mask, no positions; each token from a pass over what came before it."""
    ids = torch.tensor(np.concatenate([row.prompt_ids, row.completion_ids]).astype(np.int64))
    found = []
    for position in range(len(row.prompt_ids), len(ids)):
        logits = model(input_ids=ids[None, :position]).logits[0, -1] / row.temperature
        found.append(torch.log_softmax(logits, dim=-1)[ids[position]])
    return torch.stack(found)


def tiny_gpt2() -> GPT2LMHeadModel:
    """Absolute positions, learnt: wrong position_ids cannot hide."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["tiny", "tiny-untied", "gpt2"])
def test_equals_a_loop_over_prefixes(name: str, temperature: float) -> None:
    """Traps 4 and 5: no shift, temperature on the logits, the first token from the last prompt position."""
    model = tiny_gpt2() if name == "gpt2" else load_model(ModelConfig(name=name), "float32")
    policy = PolicyModel(model, 3)
    rows = make_rows([(4, 8), (7, 8), (1, 8)], temperature)
    for mine, row in zip(logprobs_of(policy, rows, packed=False), rows, strict=True):
        assert torch.allclose(mine, one_prefix_at_a_time(policy.base, row), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("mates", [[], [(5, 40)], [(30, 2), (2, 30), (1, 1)]])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_does_not_depend_on_batch_mates_padding_or_packing(
    mates: list[tuple[int, int]], packed: bool, attention: str
) -> None:
    """Trap 2: the same row alone, padded by longer mates, and packed behind others."""
    policy = PolicyModel(load_model(ModelConfig(name="tiny", attention=attention), "float32"), 512)
    row = make_rows([(6, 9)], 0.7)
    alone = logprobs_of(policy, row, packed=False)[0]
    among = logprobs_of(policy, [*make_rows(mates, 1.0), *row], packed=packed)[-1]
    assert torch.allclose(alone, among, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("gpt2", [False, True])
def test_left_padding_changes_nothing_when_positions_follow_the_mask(policy: PolicyModel, gpt2: bool) -> None:
    """Trap 3: 12 tokens behind 5 of padding, for rotary and absolute positions; and with wrong positions it does."""
    policy = PolicyModel(tiny_gpt2(), 5) if gpt2 else policy
    row = make_rows([(4, 8)], 1.0)
    expected = logprobs_of(policy, row, packed=False)[0]
    right = collate([Unit((row[0],))], (), packed=False).inputs
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 12, dtype=torch.int64)], dim=1)
    left = ModelInputs(
        input_ids=torch.cat([torch.ones(1, 5, dtype=torch.int64), right.input_ids], dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        predictors=right.predictors + 5,
        targets=right.targets,
        temperature=right.temperature,
    )
    assert torch.allclose(policy(*left)[0], expected, atol=TOLERANCE, rtol=0)
    if gpt2:
        wrong = left._replace(position_ids=torch.arange(17)[None])
        assert not torch.allclose(policy(*wrong)[0], expected, atol=1e-2, rtol=0)


def test_eos_is_trained_when_it_is_the_padding_token(policy: PolicyModel) -> None:
    """Trap 1: (5, 6, eos) in a row of width 6: gradient at three positions, EOS included, none at the three after."""
    rows = make_rows([(4, 6), (3, 3)], 1.0)
    collated = collate([Unit((row,)) for row in rows], (), packed=False)
    outputs = collated.outputs(*policy(*collated.inputs))
    assert collated.batch.mask[1].tolist() == [True] * 3 + [False] * 3
    outputs.logprobs.retain_grad()
    (outputs.logprobs * collated.batch.mask).sum().backward()
    assert (outputs.logprobs.grad[1] != 0).tolist() == [True] * 3 + [False] * 3
    policy.zero_grad()
    collated.outputs(*policy(*collated.inputs)).logprobs[1, 2].backward()
    assert policy.base.get_input_embeddings().weight.grad[1].abs().sum() > 0


def test_empty_completions_have_no_logprobs_and_no_nan(policy: PolicyModel) -> None:
    """Trap 18, alone and beside another row."""
    empty = Row(1, np.array([5], np.int32), np.zeros(0, np.int32), np.zeros(0, np.bool_), 1.0, {})
    full = make_rows([(4, 3)], 1.0)
    assert logprobs_of(policy, [empty], packed=False)[0].shape == (0,)
    beside = logprobs_of(policy, [*full, empty], packed=False)
    assert torch.allclose(beside[0], logprobs_of(policy, full, packed=False)[0], atol=TOLERANCE)


def test_filler_has_weight_zero_and_gives_a_zero_gradient(policy: PolicyModel) -> None:
    """A rank without rows takes part in every pass and changes nothing."""
    collated = collate([], ("advantages",), packed=False)
    outputs = collated.outputs(*policy(*collated.inputs))
    torch.where(collated.batch.mask, outputs.logprobs, 0).sum().backward()
    assert collated.batch.weight.tolist() == [0.0]
    gradients = [parameter.grad for parameter in policy.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    """Trap 19: forward and backward over 400 completion tokens; whole logits would have 128,000 elements."""
    chunk, vocabulary = 64, 320
    policy = PolicyModel(load_model(ModelConfig(name="tiny", attention="sdpa"), "float32"), chunk)
    collated = collate([Unit((row,)) for row in make_rows([(2, 50)] * 8, 1.0)], (), packed=False)
    inputs = collated.inputs
    with _Largest() as seen:
        logprobs, _ = policy(*inputs)
        logprobs.sum().backward()
    hidden = inputs.input_ids.numel() * 128  # the MLP's inner states are allowed to exist
    assert seen.numel <= max(chunk * vocabulary, hidden)
    assert seen.numel < len(inputs.targets) * vocabulary


def test_dropout_is_off_in_training_mode_too(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Trap 10: a model saved with dropout .1; two passes are bit-equal. The control shows that it would matter."""
    config = GPT2Config(
        vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=2, embd_pdrop=0.1, resid_pdrop=0.1, attn_pdrop=0.1
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    from rlhf.models.load import load_tokenizer

    load_tokenizer("tiny", trust_remote_code=False).save_pretrained(tmp_path)
    row = make_rows([(4, 8)], 1.0)
    policy = PolicyModel(load_model(ModelConfig(name=str(tmp_path)), "float32"), 5).train()
    assert torch.equal(logprobs_of(policy, row, packed=False)[0], logprobs_of(policy, row, packed=False)[0])
    noisy = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    ids = torch.arange(8)[None]
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits)


def test_adapters_start_at_the_base_and_switch_off() -> None:
    """B = 0 at the start; once it is not, the adapter changes the answer and `without_adapter` is the base again."""
    base = PolicyModel(load_model(ModelConfig(name="tiny"), "float32"), 5)
    policy = PolicyModel(add_lora(load_model(ModelConfig(name="tiny"), "float32"), LoraConfig(rank=4), 7), 5)
    row = make_rows([(4, 8)], 0.7)
    expected = logprobs_of(base, row, packed=False)[0]
    assert torch.allclose(logprobs_of(policy, row, packed=False)[0], expected, atol=TOLERANCE)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    assert not torch.allclose(logprobs_of(policy, row, packed=False)[0], expected, atol=1e-2)
    with policy.without_adapter():
        assert torch.equal(logprobs_of(policy, row, packed=False)[0], expected)


def test_adapters_come_from_the_seed_and_leave_the_global_generator_alone() -> None:
    """Same seed, same A; another seed, another A; trap 59."""
    before = torch.random.get_rng_state()

    def first(seed: int) -> Tensor:
        model = add_lora(load_model(ModelConfig(name="tiny"), "float32"), LoraConfig(rank=4), seed)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("targets", [["nope"], ["q_proj", "nope"], ["q_proj", "proj"]])
def test_unknown_target_modules_are_bad_input(targets: list[str]) -> None:
    """Trap 50: an adapter bound to no module would never learn; peft passes over the second of two in silence."""
    with pytest.raises(BadInput, match=rf"target_modules: {targets[-1]} is no layer .* q_proj"):
        add_lora(load_model(ModelConfig(name="tiny"), "float32"), LoraConfig(rank=4, target_modules=targets), 0)


def test_model_that_changes_its_logits_after_the_head_is_refused() -> None:
    """Gemma 2 caps its logits; its log-probs from the head alone would be wrong without a word."""
    config = Gemma2Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, final_logit_softcapping=0.5,
    )  # fmt: skip
    with pytest.raises(BadInput, match="soft-capped"):
        PolicyModel(Gemma2ForCausalLM(config).eval(), 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_check_fails_on_a_model_that_ignores_positions(
    policy: PolicyModel, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """The check passes as it is, and fails once rows of a packed batch can see each other, in bfloat16, too."""
    policy.to(dtype)
    policy.check_packing()
    trunk = policy.base.get_decoder()
    plain: Callable[..., object] = trunk.forward
    monkeypatch.setattr(
        trunk,
        "forward",
        lambda input_ids, attention_mask, position_ids, **rest: plain(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), position_ids=position_ids, **rest
        ),
    )
    with pytest.raises(BadInput, match="packed rows see each other"):
        policy.check_packing()


def test_rotary_frequencies_stay_float32_in_bfloat16() -> None:
    """Or positions above 256 fall together; rollout engines keep them in float32."""
    model = load_model(ModelConfig(name="tiny"), "bfloat16")
    buffers = dict(model.named_buffers())
    assert buffers
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}
