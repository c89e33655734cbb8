"""A language model with a scalar head: token ids in, one number at each chosen position out.

Reward models (a score of the whole sequence, read at its last token) and critics (a value at each position) are this
one module. It is what transformers calls a sequence classifier with one label, so that it loads and saves with
from_pretrained, but positions are found by length: transformers itself looks for the last token that is not the pad
id, and reads another one where the padding token is the EOS.
"""

import inspect
import math
from typing import Literal, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from rlhf.config import Dtype, ModelConfig
from rlhf.errors import BadInput
from rlhf.models.encoder_decoder import start_token, whole_in_both
from rlhf.models.load import DTYPES, check_attention, check_nothing_left_out, without_dropout
from rlhf.models.policy import probe_inputs
from rlhf.models.resolve import resolve
from rlhf.seeding import seed_for

# Where a score of a completion token is read: at the token itself (it has been seen), or at the one before it, which
# predicts it (it has not).
ReadAt = Literal["token", "predictor"]

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}


class ScoreModel(nn.Module):
    """Scores at chosen positions under a trunk, with or without adapters, with one linear head of one output.

    Of an encoder-decoder, encoder and decoder both read the whole sequence and the head may have two layers, as in
    transformers; such a model scores whole answers and is no critic.

    Raises BadInput at construction when the model is not of that form (a pooler between trunk and head, several labels,
    no position_ids), or when its own forward pass gives another score for the probe sequence.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, read_at: ReadAt) -> None:
        super().__init__()
        self.model = model
        self._shift = 1 if read_at == "token" else 0
        base = self.base
        name, trunk = type(base).__name__, base.base_model
        heads = [(key, child) for key, child in base.named_children() if child is not trunk and _has_weights(child)]
        self._reads_twice = bool(base.config.is_encoder_decoder)
        if self._reads_twice and read_at == "predictor":
            raise BadInput(
                f"{name} is an encoder-decoder: its encoder has seen the whole answer, so it cannot say what to expect "
                "before a token. PPO needs a decoder-only model; use rloo, or another algorithm without a critic"
            )
        last = _last_layer(heads[0][1]) if len(heads) == 1 else None
        if trunk is base or last is None or (last is not heads[0][1] and not self._reads_twice):
            shown = ", ".join(f"{key} ({type(child).__name__})" for key, child in heads) or "nothing"
            raise BadInput(f"{name} has {shown} beside its trunk; expected one linear head and nothing between the two")
        self._trunk_name = base.base_model_prefix
        self.head_name = heads[0][0]
        outputs = last.out_features
        if outputs != 1:
            raise BadInput(f"the head of {name} has {outputs} outputs; expected 1 (num_labels=1)")
        if not self._reads_twice and "position_ids" not in inspect.signature(trunk.forward).parameters:
            raise BadInput(f"the trunk of {name} takes no position_ids; expected one that does")
        self._check()

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model; its layers hold the adapters where there are any."""
        return cast(PreTrainedModel, self.model.get_base_model()) if isinstance(self.model, PeftModel) else self.model

    @property
    def head(self) -> nn.Module:
        return self.base.get_submodule(self.head_name)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        predictors: Tensor,
        targets: Tensor,
        temperature: Tensor,
    ) -> tuple[Tensor]:
        """scores (N,) float32 with gradient; arguments as in ModelInputs, of which targets and temperature are not
        read."""
        trunk = self.base.get_submodule(self._trunk_name)
        if self._reads_twice:
            states = whole_in_both(trunk, input_ids, attention_mask, start_token(self.base.config))
        else:
            states = trunk(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
                return_dict=True,
            ).last_hidden_state
        chosen = states.reshape(-1, states.shape[-1])[predictors + self._shift]
        return (self.head(chosen).float().squeeze(-1),)

    @torch.no_grad()
    def _check(self) -> None:
        """The score of the probe's last token, here and by the model's own forward pass."""
        base, settings = self.base, self.base.config
        inputs = probe_inputs(settings)
        ids = inputs.input_ids.clone()
        if self._reads_twice:  # the model itself reads at the last EOS
            ids[0, -1] = settings.eos_token_id
        else:  # at the last token that is not padding
            pad = settings.get_text_config().pad_token_id
            if pad is not None and int(ids[0, -1]) == pad:
                ids[0, -1] = (pad + 1) % settings.vocab_size
        last = torch.tensor([ids.shape[1] - 1 - self._shift])
        probe = inputs._replace(input_ids=ids, predictors=last).to(base.device)
        mine = self(*probe)[0]
        theirs = base(input_ids=probe.input_ids, use_cache=False).logits.float().reshape(-1)
        if not bool(mine.isfinite().all()):
            raise BadInput(f"the score of {type(base).__name__} is {float(mine[0])}: its weights are broken")
        difference = float((mine - theirs).abs().max())
        scale = max(1.0, float(theirs.abs().max()))
        if theirs.numel() != 1 or not difference <= _TOLERANCE[base.dtype] * scale:
            raise BadInput(
                f"the score of {type(base).__name__} is not its head on the last token's state (scores differ by "
                f"{difference:.3g}); such models are not supported"
            )


def load_score_model(config: ModelConfig, dtype: Dtype) -> PreTrainedModel:
    """A trained reward model in `dtype` on the CPU, in eval mode, dropout 0.

    Raises BadInput when the head or any other tensor is missing: transformers would make one up from random numbers.
    """
    model, missing = _load(config, dtype)
    if missing:
        raise BadInput(
            f"{config.name} lacks tensors of {type(model).__name__}, or has them in another shape: "
            f"{', '.join(missing[:5])}; expected a trained reward model (rlhf.models.score_head says what that is)"
        )
    return model


def start_score_model(config: ModelConfig, dtype: Dtype, run_seed: int) -> PreTrainedModel:
    """A model to train: a reward model as it is, or a language model's trunk with a new head.

    A new head is drawn from N(0, 1 / (hidden size + 1)) with a seed of its own, so that first scores are small
    (arXiv 2403.17031); a bias starts at 0. Raises BadInput when anything but the head is missing.
    """
    model, missing = _load(config, dtype)
    model.config.architectures = [type(model).__name__]  # what a saved folder says it is
    if not missing:
        return model
    trunk = f"{model.base_model_prefix}."
    lost = [name for name in missing if name.startswith(trunk)]
    if lost:
        raise BadInput(f"model.name: {config.name} lacks tensors, or has them in another shape: {', '.join(lost[:5])}")
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.startswith(trunk):
                continue
            parameter.zero_()
            if parameter.dim() == 2:
                generator = torch.Generator().manual_seed(seed_for(run_seed, f"score head {name}"))
                fresh = torch.empty(parameter.shape).normal_(
                    0.0, 1 / math.sqrt(parameter.shape[1] + 1), generator=generator
                )
                parameter.copy_(fresh)
    return model


def _load(config: ModelConfig, dtype: Dtype) -> tuple[PreTrainedModel, list[str]]:
    """The sequence classifier with one label, and the tensors that its folder lacks or has in another shape."""
    transformers_logging.disable_progress_bar()
    folder = resolve(config.name)
    settings = without_dropout(AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code))
    settings.num_labels = 1
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a head that is missing is the caller's to judge
    try:
        with torch.random.fork_rng(devices=[]):  # a missing head is drawn from the global generator, then replaced
            loaded, report = AutoModelForSequenceClassification.from_pretrained(
                folder, config=settings, dtype=DTYPES[dtype], attn_implementation=config.attention,
                trust_remote_code=config.trust_remote_code, weights_only=True, output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
    except (ValueError, ImportError) as error:
        raise BadInput(f"{config.name} cannot have a scalar head: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    model = cast(PreTrainedModel, loaded)
    check_attention(model, config.attention)
    check_nothing_left_out(model, report["unexpected_keys"], config.name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train(False)
    if config.attention == "flash_attention_2":  # exists on GPUs only
        model.to("cuda")  # type: ignore[arg-type]
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    return model, missing


def _last_layer(head: nn.Module) -> nn.Linear | None:
    """The linear layer that a head ends in; None where it ends in another."""
    layers = [module for module in head.modules() if _has_weights(module) and not list(module.children())]
    return layers[-1] if layers and isinstance(layers[-1], nn.Linear) else None


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
