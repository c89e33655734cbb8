"""How large a model is, counted from its config.json: matrices, parameters, what a token leaves in the KV cache.

Dense decoders of the families below and T5. No weights are read and no torch is imported. A family that is not listed
is refused: a mixture of experts would be counted wrong, not roughly right.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlhf.errors import BadInput

Place = Literal["encoder", "decoder", "head"]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear layer that occurs `count` times; `name` is that of its module, as adapters know it."""

    name: str
    inputs: int
    outputs: int
    bias: bool
    count: int
    place: Place

    @property
    def weights(self) -> int:
        """Of all its occurrences, biases left out: what a token is multiplied with."""
        return self.count * self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        return self.weights + self.count * self.outputs * self.bias


@dataclass(frozen=True, slots=True)
class Shape:
    """A model in numbers. attention, the width of all query heads of a layer; key_value, that of its key heads.

    gated, whether the feed-forward part has a gate. other, parameters that are neither in a matrix nor in the token
    embedding: norms, positions. `layers` are those of the decoder.
    """

    family: str
    layers: int
    encoder_layers: int
    hidden: int
    heads: int
    attention: int
    key_value: int
    intermediate: int
    gated: bool
    vocabulary: int
    tied: bool
    matrices: tuple[Matrix, ...]
    other: int

    @property
    def embedding(self) -> int:
        """The table of the input tokens; where it is tied, of the output head too."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them, a tied tensor once."""
        head = 0 if self.tied else self.embedding
        return self.embedding + head + self.other + sum(matrix.parameters for matrix in self.matrices)

    def multiplied(self, place: Place) -> int:
        """The weights that a token is multiplied with in the encoder, the decoder, or the output head."""
        if place == "head":
            return self.embedding
        return sum(matrix.weights for matrix in self.matrices if matrix.place == place)

    @property
    def read_for_a_token(self) -> int:
        """Parameters that are read to decode a token: all but rows of an embedding that is no output head."""
        encoder = sum(matrix.parameters for matrix in self.matrices if matrix.place == "encoder")
        return self.parameters - encoder - (0 if self.tied else self.embedding)

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values in a layer, each as wide as one of the queries'."""
        return self.key_value * self.heads // self.attention

    @property
    def cached_values(self) -> int:
        """Numbers that a token leaves in the KV cache: keys and values of each layer of the decoder."""
        return 2 * self.layers * self.key_value

    @property
    def head_parameters(self) -> int:
        """Those of a scalar head in place of the language model's: one output; T5's has a layer before it."""
        dense = self.hidden * self.hidden + self.hidden + 1 if self.encoder_layers else 0
        return dense + self.hidden

    @property
    def scoring_parameters(self) -> int:
        """Those of the same trunk with a scalar head: a reward model, a ranker or a critic."""
        return self.parameters - (0 if self.tied else self.embedding) + self.head_parameters

    def adapter_parameters(self, rank: int, targets: Sequence[str] | Literal["all-linear"]) -> int:
        """Those of low-rank adapters, rank * (inputs + outputs) for each layer that gets one (arXiv 2106.09685)."""
        chosen = self.adapted(targets)
        return sum(matrix.count * rank * (matrix.inputs + matrix.outputs) for matrix in chosen)

    def adapted(self, targets: Sequence[str] | Literal["all-linear"]) -> tuple[Matrix, ...]:
        """The layers that get an adapter; the output head gets none. Raises BadInput when there are none."""
        chosen = tuple(m for m in self.matrices if targets == "all-linear" or m.name in targets)
        if not chosen:
            known = ", ".join(sorted({matrix.name for matrix in self.matrices}))
            raise BadInput(f"model.lora.target_modules: {list(targets)} names no layer; this model has {known}")
        return chosen


# config.json of the models that are built on the spot (rlhf.models), as far as it is read here.
_TINY = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}
_TINY_T5 = {
    "model_type": "t5",
    "vocab_size": 320,
    "d_model": 64,
    "d_kv": 32,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 2,
}
_SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}
BUILT_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {**_TINY, "tie_word_embeddings": True},
    "tiny-untied": {**_TINY, "tie_word_embeddings": False},
    "tiny_t5": _TINY_T5,
    "smollm2": {**_SMOLLM2, "tie_word_embeddings": True},
}


def shape_of(config: Mapping[str, Any], where: str) -> Shape:
    """The shape that a config.json describes; `where` is named in errors. Raises BadInput for other families."""
    family = config.get("model_type")
    count = _FAMILIES.get(str(family))
    if count is None:
        raise BadInput(
            f"{where}: model_type is {family!r}, whose parameters `rlhf plan` cannot count; it knows "
            f"{', '.join(sorted(_FAMILIES))}"
        )
    if config.get("num_local_experts") or config.get("num_experts"):
        raise BadInput(f"{where}: a mixture of experts, which `rlhf plan` cannot count; it knows dense models")
    try:
        shape = count(config)
    except KeyError as error:
        raise BadInput(f"{where}: key {error} is missing; expected a whole config.json of a {family}") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise BadInput(f"{where}: a size in config.json is no number that fits the others: {error}") from error
    if shape.parameters <= 0 or shape.cached_values < 0:
        raise BadInput(f"{where}: config.json makes {shape.parameters} parameters; expected sizes above 0")
    return shape


def _llama_like(
    config: Mapping[str, Any],
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    head_norms: int = 0,
    tied: bool = False,
) -> Shape:
    """RMS norms, rotary positions, a gated feed-forward part. head_norms, parameters of a layer's norms of queries and
    keys."""
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    head_size = config.get("head_dim") or hidden // heads
    attention, keys = heads * head_size, (config.get("num_key_value_heads") or heads) * head_size
    inner = config["intermediate_size"]
    matrices = (
        Matrix("q_proj", hidden, attention, qkv_bias, layers, "decoder"),
        Matrix("k_proj", hidden, keys, qkv_bias, layers, "decoder"),
        Matrix("v_proj", hidden, keys, qkv_bias, layers, "decoder"),
        Matrix("o_proj", attention, hidden, out_bias, layers, "decoder"),
        Matrix("gate_proj", hidden, inner, mlp_bias, layers, "decoder"),
        Matrix("up_proj", hidden, inner, mlp_bias, layers, "decoder"),
        Matrix("down_proj", inner, hidden, mlp_bias, layers, "decoder"),
    )
    return Shape(
        family=config["model_type"],
        layers=layers,
        encoder_layers=0,
        hidden=hidden,
        heads=heads,
        attention=attention,
        key_value=keys,
        intermediate=inner,
        gated=True,
        vocabulary=config["vocab_size"],
        tied=config.get("tie_word_embeddings", tied),
        matrices=matrices,
        other=layers * (2 * hidden + head_norms) + hidden,
    )


def _llama(config: Mapping[str, Any]) -> Shape:
    biased = bool(config.get("attention_bias"))
    return _llama_like(config, qkv_bias=biased, out_bias=biased, mlp_bias=bool(config.get("mlp_bias")))


def _qwen2(config: Mapping[str, Any]) -> Shape:
    return _llama_like(config, qkv_bias=True)


def _qwen3(config: Mapping[str, Any]) -> Shape:
    biased = bool(config.get("attention_bias"))
    head_size = config.get("head_dim") or 128
    shape = {**config, "head_dim": head_size}
    return _llama_like(shape, qkv_bias=biased, out_bias=biased, head_norms=2 * head_size)


def _gemma(config: Mapping[str, Any]) -> Shape:
    biased = bool(config.get("attention_bias"))
    return _llama_like({"head_dim": 256, **config}, qkv_bias=biased, out_bias=biased, tied=True)


def _olmo2(config: Mapping[str, Any]) -> Shape:
    """As Llama, with norms over all queries and all keys of a layer."""
    biased = bool(config.get("attention_bias"))
    plain = _llama_like(config, qkv_bias=biased, out_bias=biased)
    return replace(plain, other=plain.other + plain.layers * (plain.attention + plain.key_value))


def _phi3(config: Mapping[str, Any]) -> Shape:
    """As Llama, with two matrices where that has five."""
    plain = _llama_like(config)
    hidden, layers, inner = plain.hidden, plain.layers, plain.intermediate
    fused = (
        Matrix("qkv_proj", hidden, plain.attention + 2 * plain.key_value, False, layers, "decoder"),
        Matrix("o_proj", plain.attention, hidden, False, layers, "decoder"),
        Matrix("gate_up_proj", hidden, 2 * inner, False, layers, "decoder"),
        Matrix("down_proj", inner, hidden, False, layers, "decoder"),
    )
    return replace(plain, matrices=fused)


def _two_matrix(
    config: Mapping[str, Any], names: Sequence[str], sizes: Mapping[str, int], *, tied: bool, positions: int
) -> Shape:
    """Layer norms with biases, biased matrices, a feed-forward part without a gate.

    names: of the query, key and value matrices (one, where they are fused), of the output, of the two of the
    feed-forward part. positions, the parameters of their table."""
    hidden, layers, inner = sizes["hidden"], sizes["layers"], sizes["inner"]
    *read, out, first, second = names
    matrices = [Matrix(name, hidden, 3 * hidden // len(read), True, layers, "decoder") for name in read]
    matrices += [
        Matrix(out, hidden, hidden, True, layers, "decoder"),
        Matrix(first, hidden, inner, True, layers, "decoder"),
        Matrix(second, inner, hidden, True, layers, "decoder"),
    ]
    return Shape(
        family=config["model_type"],
        layers=layers,
        encoder_layers=0,
        hidden=hidden,
        heads=sizes["heads"],
        attention=hidden,
        key_value=hidden,
        intermediate=inner,
        gated=False,
        vocabulary=config["vocab_size"],
        tied=config.get("tie_word_embeddings", tied),
        matrices=tuple(matrices),
        other=layers * 4 * hidden + 2 * hidden + positions,
    )


def _gpt2(config: Mapping[str, Any]) -> Shape:
    hidden = config["n_embd"]
    sizes = {"hidden": hidden, "layers": config["n_layer"], "heads": config["n_head"]}
    sizes["inner"] = config.get("n_inner") or 4 * hidden
    names = ("c_attn", "c_proj", "c_fc", "c_proj")
    return _two_matrix(config, names, sizes, tied=True, positions=config["n_positions"] * hidden)


def _gpt_neox(config: Mapping[str, Any]) -> Shape:
    sizes = {"hidden": config["hidden_size"], "layers": config["num_hidden_layers"]}
    sizes |= {"heads": config["num_attention_heads"], "inner": config["intermediate_size"]}
    names = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    return _two_matrix(config, names, sizes, tied=False, positions=0)


def _opt(config: Mapping[str, Any]) -> Shape:
    hidden = config["hidden_size"]
    sizes = {"hidden": hidden, "layers": config["num_hidden_layers"], "heads": config["num_attention_heads"]}
    sizes["inner"] = config["ffn_dim"]
    names = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    return _two_matrix(config, names, sizes, tied=True, positions=(config["max_position_embeddings"] + 2) * hidden)


def _t5(config: Mapping[str, Any]) -> Shape:
    """Encoder and decoder; relative positions are a table of buckets x heads on each side (arXiv 1910.10683)."""
    hidden, heads, inner = config["d_model"], config["num_heads"], config["d_ff"]
    encoder = config["num_layers"]
    decoder = config.get("num_decoder_layers") or encoder
    attention = heads * config["d_kv"]
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    matrices: list[Matrix] = []
    sides: tuple[tuple[Place, int, int], ...] = (("encoder", encoder, 1), ("decoder", decoder, 2))
    for place, layers, attentions in sides:
        matrices += [Matrix(name, hidden, attention, False, layers * attentions, place) for name in ("q", "k", "v")]
        matrices.append(Matrix("o", attention, hidden, False, layers * attentions, place))
        for name in ("wi_0", "wi_1") if gated else ("wi",):
            matrices.append(Matrix(name, hidden, inner, False, layers, place))
        matrices.append(Matrix("wo", inner, hidden, False, layers, place))
    buckets = config.get("relative_attention_num_buckets", 32) * heads
    return Shape(
        family=config["model_type"],
        layers=decoder,
        encoder_layers=encoder,
        hidden=hidden,
        heads=heads,
        attention=attention,
        key_value=attention,
        intermediate=inner,
        gated=gated,
        vocabulary=config["vocab_size"],
        tied=config.get("tie_word_embeddings", True),
        matrices=tuple(matrices),
        other=(2 * encoder + 3 * decoder + 2) * hidden + 2 * buckets,
    )


_FAMILIES: Mapping[str, Callable[[Mapping[str, Any]], Shape]] = {
    "gemma": _gemma,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mistral": _llama_like,
    "mt5": _t5,
    "olmo2": _olmo2,
    "opt": _opt,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _llama,
    "t5": _t5,
}
