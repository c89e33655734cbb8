"""The policy as the learner and the reference see it: token ids in, log-probabilities of chosen tokens out.

Everything happens inside one `forward`, so that an engine that gathers sharded parameters around calls of modules
(ZeRO-3) needs to know nothing of it. It knows nothing of rows, groups or losses.
"""

import inspect
from contextlib import AbstractContextManager
from typing import NamedTuple, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rlhf.errors import BadInput
from rlhf.models.encoder_decoder import own_logits, predicting_states
from rlhf.ops.logprobs import token_logprobs
from rlhf.weights import probe_ids, probe_prompt

_HEAD_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
_LEAK_TOLERANCE = 1e-3
_PACKED_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1.0}


class ModelInputs(NamedTuple):
    """R sequences of L tokens (packed: R = 1) and the N predictions that are wanted.

    input_ids, position_ids (R, L) int64; attention_mask (R, L) int64, or None when rows are packed and position_ids
    restart at each of them. predictors (N,) int64, flat positions in R x L whose hidden state predicts a target;
    targets (N,) int64; temperature (N,) float32.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    temperature: Tensor

    def to(self, device: torch.device) -> "ModelInputs":
        return ModelInputs(
            self.input_ids.to(device),
            None if self.attention_mask is None else self.attention_mask.to(device),
            self.position_ids.to(device),
            self.predictors.to(device),
            self.targets.to(device),
            self.temperature.to(device),
        )


class PolicyModel(nn.Module):
    """Log-probabilities and entropies of chosen tokens under a language model, with or without adapters.

    Decoder-only, or an encoder-decoder: `encoder_decoder` says what differs. Logits exist for the wanted predictions
    only, `logit_chunk` at a time. Raises BadInput at construction when the model's logits are not just the output head
    on the trunk's last hidden state (soft-capping, scaling), or when a decoder-only model takes no position_ids.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, logit_chunk: int) -> None:
        super().__init__()
        self.model = model
        self._logit_chunk = logit_chunk
        self._parts = bool(self.base.config.is_encoder_decoder)
        self._check()

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model; its layers hold the adapters where there are any."""
        return cast(PreTrainedModel, self.model.get_base_model()) if isinstance(self.model, PeftModel) else self.model

    @property
    def _trunk(self) -> nn.Module:
        return cast(nn.Module, self.base.get_decoder())  # type: ignore[no-untyped-call]

    @property
    def _head(self) -> nn.Module:
        return cast(nn.Module, self.base.get_output_embeddings())  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        predictors: Tensor,
        targets: Tensor,
        temperature: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """logprobs (N,) float32 with gradient and entropy (N,) float32 without; arguments as in ModelInputs."""
        inputs = ModelInputs(input_ids, attention_mask, position_ids, predictors, targets, temperature)
        chosen = predicting_states(self.base, inputs) if self._parts else self._predicting_states(inputs)
        return token_logprobs(self._head, chosen, targets, temperature, self._logit_chunk)

    def _predicting_states(self, inputs: ModelInputs) -> Tensor:
        """The trunk's states (N, H) that predict the targets."""
        states = self._trunk(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            use_cache=False,
            return_dict=True,
        ).last_hidden_state
        return cast(Tensor, states.reshape(-1, states.shape[-1])[inputs.predictors])

    def without_adapter(self) -> AbstractContextManager[None]:
        """Inside it the model is its frozen base: with adapters, the reference (no second model in memory)."""
        if not isinstance(self.model, PeftModel):
            raise ValueError("the policy has no adapter to switch off: its reference is a model of its own")
        return cast(AbstractContextManager[None], self.model.disable_adapter())

    @torch.no_grad()
    def check_packing(self) -> None:
        """Raises BadInput unless packed sequences cannot see each other: the probe behind other tokens, and alone."""
        if self._parts:
            raise BadInput(
                f"learner.packing: {type(self.base).__name__} is an encoder-decoder, whose encoder would see all "
                "packed prompts at once. Use learner.packing=false"
            )
        alone = probe_inputs(self.base.config).to(self.base.device)
        length = alone.input_ids.shape[1]

        def behind(others: Tensor) -> Tensor:
            packed = alone._replace(
                input_ids=torch.cat([others, alone.input_ids], dim=1),
                attention_mask=None,
                position_ids=torch.cat([alone.position_ids, alone.position_ids], dim=1),
                predictors=alone.predictors + length,
            )
            return self(*packed)[0]

        # What stands before is masked to exact zeros: other tokens there change nothing, in any dtype. The probe alone
        # is rounded by other kernels, in bfloat16 to more than a tenth, so that it shows gross differences only.
        first, other = behind(alone.input_ids.flip(1)), behind(alone.input_ids.roll(1, dims=1))
        difference, allowed = float((first - other).abs().max()), _LEAK_TOLERANCE
        if difference <= allowed:
            difference, allowed = float((first - self(*alone)[0]).abs().max()), _PACKED_TOLERANCE[self.base.dtype]
        if not difference <= allowed:
            raise BadInput(
                f"learner.packing: packed rows see each other in {type(self.base).__name__} with model.attention="
                f"{self.base.config._attn_implementation}: log-probs differ by {difference:.3g}. "
                "Use learner.packing=false"
            )

    @torch.no_grad()
    def _check(self) -> None:
        """Compares `forward` with the model's own logits on the probe sequence; knows no list of model families."""
        name, trunk = type(self.base).__name__, self._trunk
        takes_positions = self._parts or "position_ids" in inspect.signature(trunk.forward).parameters
        if not isinstance(self._head, nn.Module) or trunk is self.base or not takes_positions:
            raise BadInput(f"model.name: {name} has no output head on a trunk that takes position_ids; expected both")
        inputs = probe_inputs(self.base.config).to(self.base.device)
        mine, _ = self(*inputs)
        if self._parts:
            logits = own_logits(self.model, inputs.input_ids, inputs.input_ids.shape[1] - len(inputs.targets))
        else:
            logits = self.model(input_ids=inputs.input_ids, use_cache=False).logits[0, :-1]
        theirs = torch.log_softmax(logits.float(), dim=-1).gather(1, inputs.targets[:, None])[:, 0]
        difference = float((mine - theirs).abs().max())
        if not difference <= _HEAD_TOLERANCE[self.base.dtype]:
            raise BadInput(
                f"model.name: the logits of {name} are not its output head on its last hidden state (log-probs differ "
                f"by {difference:.3g}: soft-capped or scaled logits look like this); such models are not supported"
            )


def probe_inputs(config: PretrainedConfig) -> ModelInputs:
    """The fixed sequence of the weight probe: all tokens behind its prompt, at temperature 1."""
    ids = torch.from_numpy(probe_ids(config.vocab_size).astype("int64"))
    prompt = probe_prompt(encoder_decoder=bool(config.is_encoder_decoder))
    count = len(ids) - prompt
    return ModelInputs(
        input_ids=ids[None],
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        position_ids=torch.arange(len(ids))[None],
        predictors=torch.arange(prompt - 1, len(ids) - 1),
        targets=ids[prompt:],
        temperature=torch.ones(count),
    )
