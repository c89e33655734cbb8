"""Where an encoder-decoder (T5) differs from a decoder-only model: its encoder reads the prompt, its decoder the rest.

Everything outside knows sequences of prompt and completion only. Here they are parted again, right before the model
reads them: the decoder starts with a token of its own, and predicts the first completion token there.
"""

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rlhf.errors import BadInput

if TYPE_CHECKING:
    from rlhf.models.policy import ModelInputs


class Parted(NamedTuple):
    """The same R sequences for an encoder and a decoder.

    prompt_ids, prompt_mask (R, P) int64; decoder_ids (R, T) int64, the start token and the completion without its last
    token; slots (N,) int64, flat positions in R x T whose hidden state predicts a target.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    decoder_ids: Tensor
    slots: Tensor


def start_token(config: PretrainedConfig) -> int:
    """What the decoder reads first. Raises BadInput where the model does not say."""
    start: int | None = config.to_dict().get("decoder_start_token_id")
    if start is None:
        raise BadInput("model.name: config.json of this encoder-decoder names no decoder_start_token_id")
    return start


def part(inputs: "ModelInputs", start: int) -> Parted:
    """A sequence's prompt ends where its first prediction is made; one without predictions is all prompt.

    Raises ValueError for packed rows, which no encoder could keep apart.
    """
    if inputs.attention_mask is None:
        raise ValueError("an encoder-decoder reads padded rows; these are packed")
    length = inputs.input_ids.shape[1]
    rows, columns = inputs.predictors // length, inputs.predictors % length
    lengths = inputs.attention_mask.sum(dim=1)
    ends = lengths.scatter_reduce(0, rows, columns + 1, "amin")
    place = torch.arange(int(ends.max()), device=ends.device)
    prompt_mask = (place < ends[:, None]).to(inputs.attention_mask.dtype)
    steps = torch.arange(max(int((lengths - ends).max()), 1), device=ends.device)
    before = (ends[:, None] + steps - 1).clamp(max=length - 1)
    decoder_ids = inputs.input_ids.gather(1, before)
    decoder_ids[:, 0] = start
    slots = rows * len(steps) + columns + 1 - ends[rows]
    return Parted(inputs.input_ids[:, : len(place)], prompt_mask, decoder_ids, slots)


def predicting_states(model: PreTrainedModel, inputs: "ModelInputs") -> Tensor:
    """The decoder's states (N, H) that predict the targets, as the output head wants them."""
    parted = part(inputs, start_token(model.config))
    encoder = cast(nn.Module, model.get_encoder())  # type: ignore[no-untyped-call]
    decoder = cast(nn.Module, model.get_decoder())  # type: ignore[no-untyped-call]
    encoded = encoder(input_ids=parted.prompt_ids, attention_mask=parted.prompt_mask).last_hidden_state
    # The decoder needs no mask of its own: it looks back only, and padding is behind the tokens.
    states = decoder(
        input_ids=parted.decoder_ids,
        encoder_hidden_states=encoded,
        encoder_attention_mask=parted.prompt_mask,
        use_cache=False,
    ).last_hidden_state
    chosen: Tensor = states.reshape(-1, states.shape[-1])[parted.slots]
    # T5 with tied embeddings scales what its head reads; T5 1.1 does not.
    scaled = model.config.to_dict().get("scale_decoder_outputs", False)
    return chosen * model.config.d_model**-0.5 if scaled else chosen


def own_logits(model: nn.Module, ids: Tensor, prompt: int) -> Tensor:
    """The model's own logits (T, V) of the tokens behind the first `prompt` ones of one sequence (1, L), by its own
    way of shifting."""
    logits: Tensor = model(input_ids=ids[:, :prompt], labels=ids[:, prompt:], use_cache=False).logits
    return logits[0]


def whole_in_both(trunk: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, start: int) -> Tensor:
    """The decoder's states (R, L, H) where encoder and decoder both read the whole sequence, the decoder one token
    behind: how T5 and BART classify a sequence in transformers."""
    behind = torch.cat([torch.full_like(input_ids[:, :1], start), input_ids[:, :-1]], dim=1)
    states: Tensor = trunk(
        input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=behind, use_cache=False
    ).last_hidden_state
    return states
