"""What every engine is built from, and what every engine builds: plain values in, groups out.

`EngineSpec` is all that an engine needs to know; `VersionedGenerator` holds the rules that no engine may break: it
samples only with a version that it verified, prompts must fit, seeds are addressed. Engines add how a version is taken
and how tokens are drawn.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Generator as GeneratorType
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from rlhf.chaos.points import point
from rlhf.config import Dtype
from rlhf.errors import BadInput, RunFailed
from rlhf.experience import Floats, Group, Ids, Prompt, Sample, Sampling
from rlhf.models.load import language_model
from rlhf.seeding import seed_for
from rlhf.weights import PROBE_TOKENS, Receipt, Weights, state_shapes, verify_arrival, verify_names, verify_order
from rlhf.weights import verify_probe as compare_probe


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One engine in plain values. `model` is a local Hugging Face folder; sequences are in tokens, cache in GiB.

    `probe_tolerance` is the largest log-prob difference at the weight probe, in nats. `max_sequence_tokens` bounds a
    prompt with its completion. `mid_sequence`: a version may be taken while samples are in flight. `sleeps`: it takes
    turns on its GPU. `tensor_parallel`: processes that share each layer.
    """

    name: str
    model: Path
    dtype: Dtype
    attention: str
    trust_remote_code: bool
    run_seed: int
    max_sequence_tokens: int
    max_sequences: int
    cache_gib: float
    gpu_memory_fraction: float
    probe_tolerance: float
    mid_sequence: bool
    sleeps: bool
    tensor_parallel: int


@dataclass(frozen=True, slots=True)
class Draw:
    """One finished completion as an engine hands it over: token_ids (T,), EOS included, logprobs (T,), and the version
    of the weights that each token was sampled with (T,)."""

    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    seed: int
    versions: Sequence[int]


StepwiseGroups = GeneratorType[Group | None, None, None]


class VersionedGenerator(ABC):
    """The part of an engine that is the same for all: versions, checks, seeds, samples.

    A fresh engine, or one whose last update failed, holds no version and refuses to sample; so does one that sleeps.
    Not thread safe: one call to `generate` at a time, and no `load` before it is exhausted or closed, unless the engine
    is built for that (`EngineSpec.mid_sequence`): then samples in flight keep their KV cache, which old weights have
    filled, go on under the new ones, and say of each token which version it was sampled with.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._life = 0
        self._version: int | None = None
        self._fingerprint: str | None = None
        self._shapes: Mapping[str, tuple[int, ...]] = {}
        self._stop_ids: frozenset[int] = frozenset()
        self._tokenizer: Any = None
        self._sampling = self._asleep = False
        self._taken = -1  # the version that the tensors are of, verified or not: what tokens are stamped with

    def setup(self) -> None:
        """Loads tokenizer and model. Raises BadInput for a model folder that cannot be used."""
        spec = self._spec
        self._tokenizer = AutoTokenizer.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code)
        self._stop_ids = stop_ids(spec.model, self._tokenizer.eos_token_id)
        config = AutoConfig.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code)
        with torch.device("meta"):
            skeleton: PreTrainedModel = language_model(config).from_config(
                config, trust_remote_code=spec.trust_remote_code
            )
        skeleton.tie_weights()
        self._shapes = state_shapes(skeleton)
        self._start()

    def load(self, weights: Weights) -> Receipt:
        """Takes a published version and verifies it; raises WeightMismatch when it cannot.

        Order, bytes, names and shapes are checked before the engine is touched, so a version that fails there leaves
        the former one in use. After a failed probe it holds no version and refuses to sample.
        """
        started = time.monotonic()
        name = self._spec.name
        if self._sampling and not self._spec.mid_sequence:
            raise RunFailed(
                f"{name}: weights would change while samples are in flight; exhaust or close generate() first"
            )
        verify_order(weights, self._life, self._version, self._fingerprint, name)
        verify_arrival(weights, name)
        verify_names(weights, self._shapes, name)
        self._version = self._fingerprint = None
        if self._asleep:
            self._make_room_for_weights()
        self._take(weights)
        if self._asleep:
            self._make_room_for_samples()
            self._asleep = False
        self._taken = weights.version
        seen = compare_probe(weights, self._probe(weights.probe.token_ids), self._spec.probe_tolerance, name)
        self._life, self._version, self._fingerprint = weights.life, weights.version, weights.fingerprint
        point("rollout: weights verified")
        return Receipt(name, weights.version, weights.fingerprint, seen, time.monotonic() - started)

    def sleep(self) -> None:
        """Gives the GPU up, weights and KV cache, until the next `load`, which may be of the same version.

        Raises RunFailed for an engine that was not built to take turns, and while samples are in flight."""
        if not self._spec.sleeps:
            raise RunFailed(f"{self._spec.name} was not built to take turns on its GPU, and cannot sleep")
        if self._sampling:
            raise RunFailed(f"{self._spec.name}: asked to sleep with samples in flight; exhaust or close generate()")
        if not self._asleep:
            self._asleep = True
            self._give_up()

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int, purpose: str
    ) -> Iterator[Group]:
        """Yields each group as soon as its samples are finished; closing the iterator drops the rest.

        Behaviour log-probs are those of the distribution sampled from: temperature, top-p and top-k included. Greedy
        samples (temperature 0) have them at temperature 1 over all tokens. Raises RunFailed without a verified version
        and BadInput for a prompt that does not fit.
        """
        return _groups_of(self.steps(prompts, sampling, samples_per_prompt, purpose))

    def steps(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int, purpose: str
    ) -> StepwiseGroups:
        """As `generate`, and None after each step of the engine: it is alive and advances, however long an answer
        is."""
        if self._version is None:
            raise RunFailed(f"{self._spec.name} holds no verified version of the policy: publish one and load it first")
        if self._asleep:
            raise RunFailed(f"{self._spec.name} sleeps and has given its weights up: load a version first")
        for prompt in prompts:
            self._check_fits(prompt, sampling)
            point("rollout: group begun", prompt.id)
        return self._one_call_at_a_time(self._generate(prompts, sampling, samples_per_prompt, purpose))

    def _one_call_at_a_time(self, groups: StepwiseGroups) -> StepwiseGroups:
        """Keeps `load` away until the last group is out, where the engine is not built for that."""
        if self._sampling:
            raise RunFailed(
                f"{self._spec.name}: generate() was called again before the last call was exhausted or closed"
            )
        self._sampling = True
        try:
            with closing(groups):
                for group in groups:
                    if group is not None:
                        point("rollout: group finished", group.prompt.id)
                    yield group
                    if self._version is None:
                        raise RunFailed(f"{self._spec.name}: the last version could not be verified")
        finally:
            self._sampling = False

    @abstractmethod
    def close(self) -> None:
        """Gives back memory and ends every process that `setup` started. Closing twice is allowed."""

    @abstractmethod
    def _start(self) -> None:
        """Builds the engine."""

    @abstractmethod
    def _take(self, weights: Weights) -> None:
        """Replaces the engine's tensors and forgets everything derived from the old ones."""

    @abstractmethod
    def _give_up(self) -> None:
        """Frees what the engine holds on its GPU, weights and KV cache, and keeps what cannot be loaded again."""

    @abstractmethod
    def _make_room_for_weights(self) -> None:
        """After `_give_up`, before `_take`."""

    @abstractmethod
    def _make_room_for_samples(self) -> None:
        """After that `_take`, before `_probe`."""

    @abstractmethod
    def _probe(self, token_ids: Ids) -> Floats:
        """Log-probabilities of the tokens behind the probe's prompt at temperature 1, as this engine computes them."""

    @abstractmethod
    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int, purpose: str
    ) -> StepwiseGroups:
        """Each group as soon as it is finished, None after each step of the engine."""

    def _seed(self, purpose: str, prompt: Prompt, index: int) -> int:
        return seed_for(self._spec.run_seed, purpose, prompt.id, index)

    def _group(self, prompt: Prompt, draws: Sequence[Draw], sampling: Sampling) -> Group:
        """The group of one prompt, its samples ordered by index."""
        ordered = sorted(draws, key=lambda draw: draw.index)
        return Group(prompt, tuple(self._sample(draw, sampling) for draw in ordered), "policy")

    def _sample(self, draw: Draw, sampling: Sampling) -> Sample:
        ids = np.array(draw.token_ids, dtype=np.int32)
        stopped = len(ids) > 0 and int(ids[-1]) in self._stop_ids
        # A stop id that the tokenizer does not call special would end up in what judges read.
        spoken = ids[:-1] if stopped else ids
        return Sample(
            index=draw.index,
            token_ids=ids,
            loss_mask=np.ones(len(ids), dtype=np.bool_),
            text=self._tokenizer.decode(spoken.tolist(), skip_special_tokens=True),
            finish_reason="stop" if stopped else "length",
            behavior_logprobs=np.array(draw.logprobs, dtype=np.float32),
            versions=np.array(draw.versions, dtype=np.int32),
            sampling=sampling,
            seed=draw.seed,
            scores={},
            tokens={},
        )

    def _check_fits(self, prompt: Prompt, sampling: Sampling) -> None:
        length, limit = len(prompt.token_ids), self._spec.max_sequence_tokens
        if length + sampling.max_new_tokens > limit:
            raise BadInput(
                f"prompt {prompt.id} (row {prompt.row}) has {length} tokens; with generation.max_new_tokens="
                f"{sampling.max_new_tokens} that is more than the {limit} that {self._spec.name} was built for. "
                "Lower data.max_prompt_tokens or generation.max_new_tokens"
            )


def _groups_of(steps: StepwiseGroups) -> Iterator[Group]:
    with closing(steps):
        yield from (group for group in steps if group is not None)


def stop_ids(model: Path, tokenizer_eos: int | None) -> frozenset[int]:
    """Every id that ends a completion: those of generation_config.json (else of config.json) and the tokenizer's.

    Llama-3 lists two, and a model that stops at only one of them runs on after a finished answer. Raises BadInput when
    there is none.
    """
    source = model / "generation_config.json"
    if not source.exists():
        source = model / "config.json"
    listed = json.loads(source.read_text()).get("eos_token_id")
    ids = set(listed) if isinstance(listed, list) else {listed}
    ids = (ids | {tokenizer_eos}) - {None}
    if not ids:
        raise BadInput(
            f"{model}: neither {source.name} nor the tokenizer names an eos_token_id: no completion could end"
        )
    return frozenset(int(token) for token in ids)


def longest_sequence(model: Path, wanted: int, *, trust_remote_code: bool) -> int:
    """`wanted` tokens, or as many as the model has positions for. Raises BadInput when the probe does not fit."""
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    positions = config.to_dict().get("max_position_embeddings")
    longest = max(wanted, PROBE_TOKENS + 1)
    if positions is not None:
        longest = min(longest, positions)
    if longest <= PROBE_TOKENS:
        raise BadInput(f"{model}: {longest} positions are too few, the weight probe alone has {PROBE_TOKENS} tokens")
    return longest
