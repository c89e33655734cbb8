"""The frozen base of QLoRA in 4 bits, arXiv 2305.14314: NormalFloat values in blocks whose scales are quantised too.

bitsandbytes holds and multiplies them, on a GPU. Whatever leaves the trainer (published
versions, saved folders) is unpacked: the values that the forward pass computes with.
"""

import sys

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from rlhf.errors import BadInput


def check_device() -> None:
    """Raises BadInput on a machine without a GPU.

    bitsandbytes runs there, but with AVX512 it packs the values anew at the first pass and multiplies in bfloat16
    whatever is asked: what is published would not be what is computed."""
    if not torch.cuda.is_available():
        raise BadInput("model.lora.base=nf4 needs an NVIDIA GPU, and this process sees none; use model.lora.base=plain")


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """How transformers loads such a base; products are in `dtype`."""
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def is_packed(parameter: Tensor) -> bool:
    """Whether a parameter is such a one: bytes that stand for a matrix of another shape."""
    if "bitsandbytes" not in sys.modules:
        return False
    from bitsandbytes.nn import Params4bit

    return isinstance(parameter, Params4bit)


def unpacked(parameter: nn.Parameter) -> Tensor:
    """The matrix that a packed parameter stands for, in the dtype of the passes; any other parameter as it is."""
    if not is_packed(parameter):
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    whole: Tensor = dequantize_4bit(parameter.data, parameter.quant_state)  # type: ignore[attr-defined]
    return whole
