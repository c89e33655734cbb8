"""Models and tokenizers as training wants them: dropout off, no cache, the attention kernel that was asked for.

One function loads the policy, the reference and the generator's copy, so that they run the same kernels alike.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from rlhf.config import Dtype, LoraConfig, ModelConfig
from rlhf.errors import BadInput
from rlhf.models.own_code import own_code_refused
from rlhf.models.quantised import check_device, nf4
from rlhf.models.resolve import resolve
from rlhf.seeding import seed_for

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(name: str, *, trust_remote_code: bool) -> Tokenizer:
    """The model's tokenizer; where it has no padding token, EOS pads (masks never look at ids, so nothing is lost)."""
    folder = resolve(name)
    with own_code_refused(folder, "model.name"):
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise BadInput(f"model.name: the tokenizer of {name} has no EOS token, so no completion could ever end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: ModelConfig, dtype: Dtype) -> PreTrainedModel:
    """The plain model (no adapter) in `dtype` on the CPU, in eval mode, dropout 0; for QLoRA in 4 bits.

    With flash_attention_2, which exists on GPUs only, it is on the GPU. Raises BadInput for an attention implementation
    that the model does not have, tensors that the folder lacks (transformers would fill them with random numbers), or
    layers that it has and the config does not count.
    """
    transformers_logging.disable_progress_bar()  # it would tear the run's own display, and a load takes seconds
    folder = resolve(config.name)
    settings = without_dropout(AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code))
    model, report = _from_folder(folder, settings, config, dtype)
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise BadInput(f"model.name: {folder} lacks tensors, or has them in another shape: {', '.join(missing[:5])}")
    check_nothing_left_out(model, report["unexpected_keys"], f"model.name: {folder}")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train(False)
    return model.to("cuda") if config.attention == "flash_attention_2" else model  # type: ignore[arg-type]


def add_lora(model: PreTrainedModel, lora: LoraConfig, run_seed: int) -> PeftModel:
    """The model with low-rank adapters: y = W x + (alpha / rank) B A x, B = 0, A from a seed (arXiv 2106.09685).

    Adapters are float32 whatever the base; the base is frozen. Each A is drawn from a seed of its own name.
    Raises BadInput for a name in target_modules that is no layer (peft passes over it where another one is).
    """
    return _adapted(model, lora, run_seed, "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM", ())


def add_lora_beside_head(model: PreTrainedModel, head: str, lora: LoraConfig, run_seed: int) -> PeftModel:
    """The same on the trunk of a model that scores; its head, a child of this name, is trained whole beside them.

    The head of a language-model start is new, and what adapters of a frozen random one could learn is no score. It
    stays where it is: peft's own modules_to_save would hold a second, frozen copy under other names.
    """
    own = model.get_submodule(head)
    layers = tuple(f"{head}.{name}".removesuffix(".") for name, _ in own.named_modules())
    adapted = _adapted(model, lora, run_seed, None, layers)
    own.requires_grad_(True)
    return adapted


def _adapted(
    model: PreTrainedModel, lora: LoraConfig, run_seed: int, task: str | None, untouched: tuple[str, ...]
) -> PeftModel:
    """untouched, layers that get no adapter whatever the settings say."""
    if isinstance(lora.target_modules, list):
        layers = {name: layer for name, layer in model.named_modules() if name not in untouched}
        unknown = [part for part in lora.target_modules if not any(f".{name}".endswith(f".{part}") for name in layers)]
        if unknown:
            known = sorted({name.rpartition(".")[2] for name, layer in layers.items() if isinstance(layer, nn.Linear)})
            raise BadInput(
                f"model.lora.target_modules: {', '.join(unknown)} is no layer of the model; its linear layers are "
                f"{', '.join(known)}"
            )
    settings = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it by the rank; a fraction is as good
        target_modules=lora.target_modules,
        lora_dropout=0.0,
        bias="none",
        task_type=task,
        exclude_modules=list(untouched) or None,
    )
    try:
        with torch.random.fork_rng(devices=[]):  # peft draws from the global generator; its values are replaced
            adapted = get_peft_model(model, settings)
    except ValueError as error:
        raise BadInput(f"model.lora.target_modules: {error}") from error
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            if not parameter.requires_grad:
                continue
            if "lora_A" in name:
                generator = torch.Generator().manual_seed(seed_for(run_seed, f"lora {name}"))
                bound = 1 / math.sqrt(parameter.shape[1])  # what kaiming_uniform with a = sqrt(5) comes to
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.zero_()
    adapted.train(False)
    return adapted


def language_model(settings: PretrainedConfig) -> Any:
    """transformers' class for a model that writes: decoder-only, or with an encoder for the prompt."""
    return AutoModelForSeq2SeqLM if settings.is_encoder_decoder else AutoModelForCausalLM


def stop_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every token that ends a completion: the EOS ids of generation config, model config and tokenizer, ascending."""
    found: set[int] = {int(tokenizer.eos_token_id)}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = json.loads((folder / name).read_text()).get("eos_token_id")
            found.update([ids] if isinstance(ids, int) else ids or [])
    return tuple(sorted(found))


def _from_folder(
    folder: Path, settings: PretrainedConfig, config: ModelConfig, dtype: Dtype
) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    packed = config.lora is not None and config.lora.base == "nf4"
    if packed:
        check_device()
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded: tuple[PreTrainedModel, dict[str, list[str]]] = language_model(settings).from_pretrained(
            folder, config=settings, dtype=DTYPES[dtype], attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code, weights_only=True, output_loading_info=True,
            ignore_mismatched_sizes=True,  # load_model names the tensors
            quantization_config=nf4(DTYPES[dtype]) if packed else None, device_map={"": device} if packed else None,
        )  # fmt: skip
    except (ValueError, ImportError) as error:
        raise BadInput(f"model.name: {config.name} with model.attention={config.attention}: {error}") from error
    check_attention(loaded[0], config.attention)
    return loaded


def check_nothing_left_out(model: PreTrainedModel, unexpected: Iterable[str], place: str) -> None:
    """Raises BadInput when the weights have more layers than the config: half a model would load without a word.

    Other tensors that the model has no use for (a scalar head, rotary tables, a tied lm_head) are no fault: a layer is
    told by its number, where the tensor of the layer 0 is the model's own."""
    names, modules = set(model.state_dict()), {name for name, _ in model.named_modules()}
    left_out = []
    for key in sorted(unexpected):
        parts = key.split(".")
        for i, part in enumerate(parts):
            layer, first = ".".join(parts[: i + 1]), ".".join([*parts[:i], "0", *parts[i + 1 :]])
            if part.isdigit() and layer not in modules and first in names:
                left_out.append(key)
    if left_out:
        raise BadInput(
            f"{place} holds layers that its config.json does not count: {', '.join(left_out[:5])}. Expected a config "
            "of these weights (num_hidden_layers)"
        )


def check_attention(model: PreTrainedModel, wanted: str) -> None:
    """Raises BadInput unless the model runs the attention implementation that was asked for, in all its parts."""
    found = {str(part.config._attn_implementation) for part in model.modules() if isinstance(part, PreTrainedModel)}
    if found != {wanted}:
        raise BadInput(
            f"model.attention={wanted}: {type(model).__name__} runs {', '.join(sorted(found))} instead; expected one "
            "that it has"
        )


def without_dropout(settings: PretrainedConfig) -> PretrainedConfig:
    """Sets every dropout rate to 0: a log-probability must be a number, not a random variable."""
    for part in (settings, settings.get_text_config()):
        rates = [key for key, value in part.to_dict().items() if "drop" in key and isinstance(value, float)]
        for key in rates:
            setattr(part, key, 0.0)
    return settings
