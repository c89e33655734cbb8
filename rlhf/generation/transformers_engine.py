"""Sampling with plain transformers: slow, simple, and the same bits whatever else is going on.

A group is one batch of its own samples and is never batched with another, so its samples depend neither on the size of
the pool nor on the order in which prompts arrive. Finished rows stay in the batch until the last one ends, because the
shape of a matrix product changes its rounding.
"""

from collections.abc import Generator, Sequence
from typing import Protocol, cast

import numpy as np
import torch
from transformers import AutoConfig, Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from rlhf.experience import Floats, Ids, Prompt, Sampling
from rlhf.generation.engine import Draw, StepwiseGroups, VersionedGenerator
from rlhf.models.encoder_decoder import own_logits, start_token
from rlhf.models.load import check_attention, language_model
from rlhf.models.offload import Offloaded, free_cached
from rlhf.weights import Weights, probe_prompt, state_once, state_shapes


class Decoding(Protocol):
    """One group in flight: what has been read so far, and where the prompt is kept, is known here alone."""

    def start(self, prompt_ids: torch.Tensor, count: int) -> torch.Tensor: ...

    def advance(self, tokens: torch.Tensor) -> torch.Tensor: ...


class CausalDecoding:
    """With a decoder-only model: prompt and samples in one KV cache."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._cache: Cache | None = None

    def start(self, prompt_ids: torch.Tensor, count: int) -> torch.Tensor:
        """Reads the prompt (P,) once for `count` samples; logits of the first token, (count, V)."""
        out = self._model(input_ids=prompt_ids.unsqueeze(0), use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        self._cache.batch_repeat_interleave(count)
        return cast(torch.Tensor, out.logits[:, -1].expand(count, -1))

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends one token to each sample, (count,); logits of the next one, (count, V)."""
        out = self._model(input_ids=tokens.unsqueeze(1), past_key_values=self._cache, use_cache=True)
        return cast(torch.Tensor, out.logits[:, -1])


class EncoderDecoderDecoding:
    """With an encoder-decoder: the prompt is encoded once, the cache begins with the decoder's start token."""

    def __init__(self, model: torch.nn.Module, start: int) -> None:
        self._model, self._start = model, start
        self._encoded: BaseModelOutput | None = None
        self._cache: Cache | None = None

    def start(self, prompt_ids: torch.Tensor, count: int) -> torch.Tensor:
        """As CausalDecoding's."""
        encoder = cast(torch.nn.Module, self._model.get_encoder())  # type: ignore[operator]
        states = encoder(input_ids=prompt_ids.unsqueeze(0)).last_hidden_state
        self._encoded = BaseModelOutput(last_hidden_state=states.expand(count, -1, -1))
        return self.advance(torch.full((count,), self._start, device=prompt_ids.device))

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        """As CausalDecoding's."""
        out = self._model(
            encoder_outputs=self._encoded,
            decoder_input_ids=tokens.unsqueeze(1),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = out.past_key_values
        return cast(torch.Tensor, out.logits[:, -1])


class TransformersGenerator(VersionedGenerator):
    """A rollout engine on transformers, for decoder-only models and encoder-decoders, on a GPU where there is one.

    Does not batch over prompts: use vLLM where speed matters.
    """

    _model: torch.nn.Module

    def _start(self) -> None:
        spec = self._spec
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        settings = AutoConfig.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code)
        self._encodes = bool(settings.is_encoder_decoder)
        self._start_token = start_token(settings) if self._encodes else -1
        model: PreTrainedModel = language_model(settings).from_pretrained(
            spec.model,
            dtype=getattr(torch, spec.dtype),
            attn_implementation=spec.attention,
            trust_remote_code=spec.trust_remote_code,
        )
        check_attention(model, spec.attention)
        self._model = model.to(self._device).eval()  # type: ignore[arg-type]
        # A T5 of version 1.1 has an output head of its own although its config, as transformers reads it, ties the two.
        self._shapes = state_shapes(self._model)

    def close(self) -> None:
        self._version = self._fingerprint = None
        if "_model" in self.__dict__:
            del self._model

    def _give_up(self) -> None:
        """Of the weights shapes are left; buffers (rotary frequencies) are in no published version, and are kept."""
        self._sizes = [parameter.shape for parameter in self._model.parameters()]
        self._buffers = Offloaded(self._model.buffers())
        for parameter in self._model.parameters():
            parameter.data = parameter.data.new_empty(0)
        free_cached()

    def _make_room_for_weights(self) -> None:
        for parameter, size in zip(self._model.parameters(), self._sizes, strict=True):
            parameter.data = parameter.data.new_empty(size)
        self._buffers.restore()

    def _make_room_for_samples(self) -> None:
        """Nothing to do: a KV cache is made for each prompt."""

    @torch.no_grad()
    def _take(self, weights: Weights) -> None:
        state = state_once(self._model)
        for name, tensor in weights.tensors.items():
            state[name].copy_(tensor.unpack())

    @torch.no_grad()
    def _probe(self, token_ids: Ids) -> Floats:
        ids = torch.from_numpy(token_ids.astype(np.int64)).to(self._device)
        prompt = probe_prompt(encoder_decoder=self._encodes)
        if self._encodes:
            logits = own_logits(self._model, ids.unsqueeze(0), prompt)
        else:
            logits = self._model(input_ids=ids.unsqueeze(0)).logits[0, :-1]
        logprobs = logits.float().log_softmax(-1).gather(1, ids[prompt:, None])
        return cast(Floats, logprobs.squeeze(1).cpu().numpy())

    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int, purpose: str
    ) -> StepwiseGroups:
        for prompt in prompts:
            seeds = [self._seed(purpose, prompt, index) for index in range(samples_per_prompt)]
            draws = yield from self._draw(prompt.token_ids, seeds, sampling)
            yield self._group(prompt, draws, sampling)

    def _decoding(self) -> Decoding:
        if self._encodes:
            return EncoderDecoderDecoding(self._model, self._start_token)
        return CausalDecoding(self._model)

    @torch.no_grad()
    def _draw(self, prompt_ids: Ids, seeds: Sequence[int], sampling: Sampling) -> Generator[None, None, list[Draw]]:
        """Yields after each position, returns the finished samples."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        tokens: list[list[int]] = [[] for _ in seeds]
        logprobs: list[list[float]] = [[] for _ in seeds]
        versions: list[int] = []  # of a position, the same for all samples
        decoding = self._decoding()
        logits = decoding.start(torch.from_numpy(prompt_ids.astype(np.int64)).to(self._device), len(seeds))
        unfinished = set(range(len(seeds)))
        made_by = self._taken
        for position in range(sampling.max_new_tokens):
            versions.append(made_by)
            # One number a sample and position, on the CPU: the same draws on every device.
            uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
            chosen, chosen_logprobs = choose(logits, uniform.to(self._device), sampling)
            for row, (token, logprob) in enumerate(zip(chosen.tolist(), chosen_logprobs.tolist(), strict=True)):
                if row in unfinished:
                    tokens[row].append(token)
                    logprobs[row].append(logprob)
                    if token in self._stop_ids:
                        unfinished.remove(row)
            if not unfinished or position + 1 == sampling.max_new_tokens:
                break
            logits, made_by = decoding.advance(chosen), self._taken
            yield  # new weights may come here; the logits of the next token are those of the old ones
        return [
            Draw(row, tokens[row], logprobs[row], seed, versions[: len(tokens[row])]) for row, seed in enumerate(seeds)
        ]


def choose(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row by inverting the cumulative distribution, and its log-probability under that distribution.

        log p = log_softmax(keep(logits / T));   token = first v with sum_{w <= v} p_w > u

    logits (B, V) any float dtype, uniform (B,) float64 in [0, 1); returns (B,) int64 and (B,) float32. The logits are
    divided, never the log-probabilities. T = 0: the largest logit, with its log-probability at T = 1 over all tokens.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        chosen = logits.argmax(-1)
        return chosen, logits.log_softmax(-1).gather(1, chosen[:, None]).squeeze(1)
    logprobs = keep(logits / sampling.temperature, sampling).log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    # Rounding leaves the last sum a little beside 1, so u is stretched to it; `right` skips tokens of probability 0.
    chosen = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
    chosen = chosen.clamp(max=logits.shape[-1] - 1)
    return chosen.squeeze(1), logprobs.gather(1, chosen).squeeze(1)


def keep(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The logits (B, V) with those outside top-k, then outside top-p, at minus infinity; the largest always stays."""
    if sampling.top_k > 0:
        floor = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return logits
