"""Parameter counts from config.json, against transformers' own models on the meta device and published counts.

Not covered: families that are refused.
"""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhf.config import LoraConfig
from rlhf.errors import BadInput
from rlhf.models.load import add_lora, language_model
from rlhf.planning.shapes import shape_of

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64}
T5 = {"vocab_size": 97, "d_model": 48, "d_kv": 7, "d_ff": 80, "num_layers": 3, "num_heads": 6, "pad_token_id": 0}

# Whatever changes a count, in small.
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", SMALL),
    ("llama", {**SMALL, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    ("mistral", {**SMALL, "head_dim": 16}),
    ("qwen2", SMALL),
    ("qwen2", {**SMALL, "tie_word_embeddings": True}),
    ("qwen3", {**SMALL, "head_dim": 16}),
    ("gemma", {**SMALL, "head_dim": 16}),
    ("phi3", SMALL),
    ("olmo2", SMALL),
    ("smollm3", SMALL),
    ("gpt2", GPT2),
    ("gpt_neox", SMALL),
    ("opt", {**SMALL, "ffn_dim": 80, "word_embed_proj_dim": 48}),
    ("t5", T5),
    ("t5", {**T5, "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    ("mt5", T5),
]

LLAMA2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA2_70B = {
    **LLAMA2_7B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
LLAMA3_8B = {**LLAMA2_7B, "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
QWEN25_05B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
QWEN25_7B = {
    **QWEN25_05B,
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
T5_SMALL = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
}


def transformers_count(model: torch.nn.Module) -> int:
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("family", "sizes"), FAMILIES)
def test_parameters_are_those_of_transformers(family: str, sizes: dict[str, Any]) -> None:
    """An independent count: the model itself, built without memory; with its scalar head where it can have one."""
    config = AutoConfig.for_model(family, **sizes)
    shape = shape_of(config.to_dict(), "config.json")
    with torch.device("meta"):
        assert shape.parameters == transformers_count(language_model(config).from_config(config))
        config.num_labels = 1
        if family != "mt5":
            scoring = AutoModelForSequenceClassification.from_config(config)
            assert shape.scoring_parameters == transformers_count(scoring)


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (LLAMA2_7B, 6_738_415_616),
        (LLAMA2_70B, 68_976_648_192),
        (LLAMA3_8B, 8_030_261_248),
        (QWEN25_05B, 494_032_768),
        (QWEN25_7B, 7_615_616_512),
        (SMOLLM2, 134_515_008),
        (T5_SMALL, 60_506_624),
    ],
)
def test_parameters_are_the_published_ones(config: dict[str, Any], published: int) -> None:
    """The sums of the tensors on the hub, as their model pages show them."""
    assert shape_of(config, "config.json").parameters == published


@pytest.mark.parametrize(
    ("family", "sizes", "targets"),
    [
        ("llama", SMALL, "all-linear"),
        ("llama", SMALL, ["q_proj", "v_proj"]),
        ("phi3", SMALL, "all-linear"),
        ("gpt2", GPT2, "all-linear"),
        ("t5", T5, ["q", "v"]),
    ],
)
def test_adapters_have_the_parameters_that_peft_gives_them(family: str, sizes: dict[str, Any], targets: Any) -> None:
    config = AutoConfig.for_model(family, **sizes)
    with torch.device("meta"):
        model = language_model(config).from_config(config)
    adapted = add_lora(model.to_empty(device="cpu"), LoraConfig(rank=4, target_modules=targets), 0)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert shape_of(config.to_dict(), "config.json").adapter_parameters(4, targets) == trained


def test_a_token_in_the_cache() -> None:
    """OPT-13B: 2 x 5,120 x 40 x 2 bytes = 800 KB (arXiv 2309.06180, section 3). Llama-3-8B has 8 of 32 key heads."""
    opt = {"model_type": "opt", "vocab_size": 50272, "hidden_size": 5120, "ffn_dim": 20480, "num_hidden_layers": 40}
    opt |= {"num_attention_heads": 40, "max_position_embeddings": 2048}
    assert 2 * shape_of(opt, "config.json").cached_values == 800 * 1024
    assert 2 * shape_of(LLAMA3_8B, "config.json").cached_values == 128 * 1024


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({}, "model_type is None"),
        ({**LLAMA2_7B, "num_local_experts": 8}, "mixture of experts"),
        ({"model_type": "llama", "hidden_size": 8}, "num_attention_heads"),
    ],
)
def test_what_cannot_be_counted_is_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        shape_of(config, "config.json")


def test_adapters_for_no_layer_are_refused() -> None:
    with pytest.raises(BadInput, match="this model has down_proj"):
        shape_of(SMOLLM2, "config.json").adapter_parameters(8, ["nothing"])
