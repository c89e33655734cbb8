"""The tiny offline model: a Llama of two layers and its tokenizer, made on the spot, the same bytes every time."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.seeding import seed_for

RECIPE = "1"  # part of the cache entry's name: raise it when anything below changes
_SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
# Merges, so that tokens are not bytes and a token may reach over the end of the prompt, as in a real tokenizer.
_MERGED = [
    "th",
    "the",
    "in",
    "ing",
    "an",
    "and",
    "er",
    "on",
    "re",
    "at",
    "en",
    "is",
    "it",
    "or",
    "ou",
    "you",
    "st",
    "ll",
]
_VOCABULARY = 320
_EMBEDDING_STD = 0.1
# Each turn ends with </s>, so prompts contain the token that is EOS and padding too.
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tiny(folder: Path, tied: bool) -> None:
    """Writes model, tokenizer and generation config: 2 layers, hidden 64, 320 tokens, eos != bos, pad = eos."""
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=tied, dtype="float32",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator; its values are replaced
        model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    _initialise(model, torch.Generator().manual_seed(seed_for(0, "tiny model")))
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id, eos_token_id=[tokenizer.eos_token_id], pad_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def _initialise(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Normal embeddings, matrices scaled by their fan-in so that the layers matter, norms of 1."""
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            is_embedding = "embed_tokens" in name or "lm_head" in name
            std = _EMBEDDING_STD if is_embedding else 1 / math.sqrt(parameter.shape[1])
            parameter.normal_(0.0, std, generator=generator)


def byte_level_bpe(special: Sequence[str], size: int) -> tuple[Tokenizer, dict[str, int]]:
    """A tokenizer without a post-processor, and its vocabulary: the special tokens, the bytes, a few merges, and as
    many tokens that never occur as make `size`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    merges = []
    for word in [" t", *_MERGED, " the", " a", " and"]:
        token = word.replace(" ", "Ġ")
        if token not in vocabulary:
            cut = next(i for i in range(len(token) - 1, 0, -1) if token[:i] in vocabulary and token[i:] in vocabulary)
            merges.append((token[:cut], token[cut:]))
            vocabulary[token] = len(vocabulary)
    for i in range(len(vocabulary), size):
        vocabulary[f"<|unused_{i}|>"] = i
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    return core, vocabulary


def _tokenizer() -> PreTrainedTokenizerFast:
    core, vocabulary = byte_level_bpe(_SPECIAL, _VOCABULARY)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=_CHAT_TEMPLATE,
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"], model_max_length=1024,
    )  # fmt: skip
