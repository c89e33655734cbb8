"""The tiny offline encoder-decoder: a T5 of two layers a side and its tokenizer, the same bytes every time.

As in T5 (arXiv 1910.10683): relative positions, embeddings tied to the output head, whose input is scaled by
1/sqrt(d_model); padding is the token that the decoder starts with; prompts end with </s>; there is no chat template.
"""

import math
from pathlib import Path

import torch
from tokenizers import processors
from transformers import GenerationConfig, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from rlhf.models.tiny import byte_level_bpe
from rlhf.seeding import seed_for

RECIPE = "1"  # part of the cache entry's name: raise it when anything below changes
_SPECIAL = ["<pad>", "</s>"]
_VOCABULARY = 320
_HEAD_SIZE = 32


def build_tiny_t5(folder: Path) -> None:
    """Writes model, tokenizer and generation config: 2 layers a side, hidden 64, 320 tokens, dropout 0.1 as in T5."""
    pad, eos = 0, 1
    config = T5Config(  # type: ignore[call-arg]  # keys that all configs have are not in its signature
        vocab_size=_VOCABULARY, d_model=64, d_kv=_HEAD_SIZE, d_ff=128, num_layers=2, num_heads=2, dtype="float32",
        pad_token_id=pad, eos_token_id=eos, decoder_start_token_id=pad,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator; its values are replaced
        model = T5ForConditionalGeneration(config)  # type: ignore[no-untyped-call]
    _initialise(model, torch.Generator().manual_seed(seed_for(0, "tiny t5")))
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        decoder_start_token_id=pad, eos_token_id=[eos], pad_token_id=pad
    )
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


@torch.no_grad()
def _initialise(model: T5ForConditionalGeneration, generator: torch.Generator) -> None:
    """Unit embeddings, which the output head scales down; matrices by their fan-in, queries smaller still, because T5
    does not divide its attention scores; norms of 1."""
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        std = 1.0 if name == "shared.weight" else 1 / math.sqrt(parameter.shape[1])
        if name.endswith(".q.weight"):
            std /= math.sqrt(_HEAD_SIZE)
        parameter.normal_(0.0, std, generator=generator)


def _tokenizer() -> PreTrainedTokenizerFast:
    core, vocabulary = byte_level_bpe(_SPECIAL, _VOCABULARY)
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, eos_token="</s>", pad_token="<pad>", model_max_length=1024
    )
