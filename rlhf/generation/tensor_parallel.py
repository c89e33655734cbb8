"""Whether a model can be sampled by an engine of several processes. Light: asked before anything starts."""

from collections.abc import Mapping
from typing import Any

from rlhf.errors import BadInput

# By the names that config.json has for them: what vLLM divides, and for heads of keys and values divides or repeats.
DIVIDED = {
    "attention heads": ("num_attention_heads", "n_head"),
    "feed-forward neurons": ("intermediate_size", "n_inner", "ffn_dim"),
}
KEY_VALUE_HEADS = "num_key_value_heads"
VOCABULARY, VOCABULARY_BLOCK = "vocab_size", 64  # vLLM fills the vocabulary up to a multiple of it
PLACE = "cluster file: rollout.tensor_parallel"


def check_engine(engine: str, tensor_parallel: int) -> None:
    """Raises BadInput for an engine that computes in one process."""
    if tensor_parallel > 1 and engine != "vllm":
        raise BadInput(
            f"{PLACE}={tensor_parallel}: generation.engine={engine} computes in one process; expected 1, or "
            "generation.engine=vllm"
        )


def check_divisible(model: Mapping[str, Any], name: str, tensor_parallel: int) -> None:
    """Raises BadInput where a model has no equal shares for so many processes; model, its config.json. What that does
    not name is left to vLLM, which says so when the engine starts."""
    text = model.get("text_config", model)
    why = indivisible(text, tensor_parallel)
    if why is None:
        return
    heads = next((text[key] for key in DIVIDED["attention heads"] if text.get(key)), tensor_parallel)
    fitting = [str(number) for number in range(1, heads + 1) if indivisible(text, number) is None]
    raise BadInput(f"{PLACE}={tensor_parallel}: {name} has {why}; expected one of {', '.join(fitting)}")


def indivisible(model: Mapping[str, Any], parts: int) -> str | None:
    """What of a model cannot be divided into so many parts, with its number and key; None: nothing that is named."""
    for what, keys in DIVIDED.items():
        for key in keys:
            size = model.get(key)
            if isinstance(size, int) and size % parts:
                return f"{size} {what} ({key}), which it does not divide"
    heads = model.get(KEY_VALUE_HEADS)
    if isinstance(heads, int) and heads % parts and parts % heads:
        return f"{heads} heads of keys and values ({KEY_VALUE_HEADS}), of which it is neither a divisor nor a multiple"
    tokens = model.get(VOCABULARY)
    if isinstance(tokens, int) and -(-tokens // VOCABULARY_BLOCK) * VOCABULARY_BLOCK % parts:
        return f"{tokens} tokens ({VOCABULARY}), in blocks of {VOCABULARY_BLOCK}, which it does not divide"
    return None
