"""The policy's tensors under the names of the plain model: for engines that pull them and for folders that people load.

Adapters are merged into a copy; the base is never written, so nothing drifts however often it is published.
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeGuard, cast

import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, PeftModel, TaskType
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from rlhf.learner.engine import Engine, trainable
from rlhf.models.load import Tokenizer
from rlhf.models.quantised import is_packed, unpacked
from rlhf.models.score import ScoreModel

_ADAPTER = "default"  # peft's name of the only adapter


def published_tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the plain model's state_dict, a tied one once, adapters merged: W + (alpha / rank) B A in float32.

    Collective: all ranks iterate to the end. A tensor is whole until the next is asked for; copy it before.
    """
    base = engine.policy.base
    modules = dict(base.named_modules())
    for name, parameter in base.named_parameters():
        owner, _, kind = name.rpartition(".")
        if ".lora_" in name:
            continue
        adapted = modules.get(owner.removesuffix(".base_layer"))
        if kind == "weight" and _has_factors(adapted, parameter):
            a, b = _factor(adapted.lora_A), _factor(adapted.lora_B)
            with engine.gathered([parameter, a, b]), torch.no_grad():
                yield name.replace(".base_layer.", "."), _merged(adapted, unpacked(parameter), a, b)
        else:
            with engine.gathered([parameter]):
                yield name.replace(".base_layer.", "."), unpacked(parameter)
    persistent = _persistent_buffers(base)
    yield from persistent.items()


def save_policy(engine: Engine, tokenizer: Tokenizer, folder: Path, *, write: bool) -> None:
    """A folder that from_pretrained and vLLM load: weights (merged), config, generation config, tokenizer.

    Collective; only the rank with `write` touches the disk and holds the copy of the weights in memory.
    """
    tensors = {}
    for name, tensor in published_tensors(engine):
        if write:
            tensors[name] = tensor.to("cpu", copy=True).contiguous()
    if not write:
        return
    base = engine.policy.base
    folder.mkdir(parents=True)
    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})
    settings = copy.deepcopy(base.config)
    if "quantization_config" in settings.to_dict():
        del settings.quantization_config  # what is written is unpacked
    if not base.can_generate() and not settings.is_encoder_decoder:
        tokenizer = read_at_the_end(settings, tokenizer)
    settings.save_pretrained(folder)
    if base.can_generate() and base.generation_config is not None:
        base.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_at_the_end(settings: PretrainedConfig, tokenizer: Tokenizer) -> Tokenizer:
    """Has transformers read a sequence classifier where it was trained, at the EOS: it looks for the last token that is
    not the padding id, so the padding must be another token than those that end an answer.

    Changes the config, and returns a tokenizer that pads with the same token: one of the special tokens. Where there is
    no other the config names none, and transformers reads single sequences at their end and refuses batches.
    """
    stops = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    ends = {*stops, tokenizer.eos_token_id, None}
    if settings.pad_token_id not in ends:
        return tokenizer
    others = [token for token in tokenizer.all_special_ids if token not in ends]
    settings.pad_token_id = others[0] if others else None
    if not others:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(others[0])
    return tokenizer


def save_adapter(engine: Engine, folder: Path, *, write: bool) -> None:
    """What was trained beside the frozen base, as peft loads it: the adapter, and with it the whole head of a model
    that scores. Nothing when the whole model is trained. Collective."""
    model = engine.policy.model
    if not isinstance(model, PeftModel):
        return
    adapter: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for name, parameter in trainable(model):
        with engine.gathered([parameter]):
            if write:
                kept = adapter if ".lora_" in name else head
                kept[name] = parameter.detach().to("cpu", copy=True).contiguous()
    if not write:
        return
    folder.mkdir(parents=True)
    adapter = get_peft_model_state_dict(model, state_dict=adapter)
    save_file(adapter | head, folder / "adapter_model.safetensors")
    settings = cast(LoraConfig, copy.deepcopy(model.peft_config[_ADAPTER]))
    if isinstance(engine.policy, ScoreModel):  # peft then puts the head that is in the file in place of the base's
        settings.task_type, settings.modules_to_save = TaskType.SEQ_CLS, [engine.policy.head_name]
    settings.save_pretrained(str(folder))


def _factor(adapters: nn.ModuleDict) -> nn.Parameter:
    return cast(nn.Parameter, adapters[_ADAPTER].weight)


def _has_factors(layer: nn.Module | None, weight: nn.Parameter) -> TypeGuard[LoraLayer]:
    """Whether a weight is that of a linear layer with an adapter; peft has a class of its own for those in 4 bits."""
    return isinstance(layer, LoraLinear) or (is_packed(weight) and isinstance(layer, LoraLayer))


def _merged(layer: LoraLayer, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    delta = layer.scaling[_ADAPTER] * (b.float() @ a.float())
    turned = isinstance(layer, LoraLinear) and layer.fan_in_fan_out
    return (weight.float() + (delta.T if turned else delta)).to(weight.dtype)


def _persistent_buffers(model: nn.Module) -> Mapping[str, Tensor]:
    kept = model.state_dict(keep_vars=True).keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}
