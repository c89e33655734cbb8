"""Weights that are published once, versioned and fingerprinted, and pulled by engines that verify what they hold.

Three checks, from cheap to sure: the digest of each tensor (it arrived intact), the list of names (nothing missing,
nothing unexpected), and the probe (the engine computes with them: its log-probabilities of a fixed token sequence equal
the learner's). Only the probe sees a tied output head that kept its old, repacked values. Tensors travel as bytes in
numpy arrays, which Ray's object store hands over without a copy.
"""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf.errors import WeightMismatch
from rlhf.experience import Floats, Ids
from rlhf.seeding import seed_for

PROBE_TOKENS = 24


@dataclass(frozen=True, slots=True, eq=False)
class PackedTensor:
    """A tensor as bytes: dtype is torch's name without "torch.", data (nbytes,) uint8."""

    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    digest: str

    def unpack(self) -> torch.Tensor:
        """The tensor, on the CPU, sharing the memory of `data`, which may be read-only: never write into it."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = torch.from_numpy(self.data)
        return flat.view(getattr(torch, self.dtype)).reshape(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A fixed token sequence (P,) and the learner's log-probabilities of the last ones of its tokens at temperature 1:
    (P-1,), or with an encoder that reads a prompt of p tokens (P-p,)."""

    token_ids: Ids
    logprobs: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Version v of the policy under the names of `state_dict`, a tied tensor once.

    `life` counts the learners of one run: a learner that was built again goes back to its checkpoint and publishes the
    versions since then anew. On a GPU they may differ in their last bits."""

    version: int
    fingerprint: str
    tensors: Mapping[str, PackedTensor]
    probe: Probe
    life: int

    @property
    def size_bytes(self) -> int:
        return sum(tensor.data.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Receipt:
    """An engine's word that it verified a version: the largest probe difference it saw, and how long loading took."""

    engine: str
    version: int
    fingerprint: str
    probe_abs_max: float
    seconds: float


def probe_ids(vocabulary: int) -> Ids:
    """The fixed token sequence of the probe, (PROBE_TOKENS,): spread over the vocabulary, the same in every process."""
    ids = [seed_for(0, "weight probe", position) % vocabulary for position in range(PROBE_TOKENS)]
    return np.array(ids, dtype=np.int32)


def probe_prompt(*, encoder_decoder: bool) -> int:
    """How many tokens of the probe are its prompt. An encoder reads half of them: over one token alone its attention
    would be 1 whatever its weights are."""
    return PROBE_TOKENS // 2 if encoder_decoder else 1


def state_once(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's `state_dict`, sharing its memory, with a tied tensor once, under the first of its names."""
    seen: set[int] = set()
    once: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            once[name] = tensor
    return once


def state_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a published version of this model must have; the model may be on the meta device."""
    return {name: tuple(tensor.shape) for name, tensor in state_once(model).items()}


def pack(version: int, tensors: Iterable[tuple[str, torch.Tensor]], probe: Probe) -> Weights:
    """Packs a model's tensors for publication, by the run's first learner; each is copied once."""
    packed = {name: _pack_tensor(tensor) for name, tensor in tensors}
    return Weights(version, fingerprint_of(packed), packed, probe, life=0)


def fingerprint_of(tensors: Mapping[str, PackedTensor]) -> str:
    """One hash over names, dtypes, shapes and digests in the order of the names."""
    lines = [f"{name} {t.dtype} {t.shape} {t.digest}" for name, t in sorted(tensors.items())]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def verify_arrival(weights: Weights, engine: str) -> None:
    """Raises WeightMismatch, naming the tensor, when a tensor's bytes are not those that were published."""
    for name, tensor in weights.tensors.items():
        if _digest(tensor.data) != tensor.digest:
            raise WeightMismatch(
                f"{engine}, version {weights.version}: tensor {name} arrived with other bytes than were published"
            )
    if fingerprint_of(weights.tensors) != weights.fingerprint:
        raise WeightMismatch(f"{engine}, version {weights.version}: the list of tensors is not the published one")


def verify_names(weights: Weights, expected: Mapping[str, tuple[int, ...]], engine: str) -> None:
    """Raises WeightMismatch when names and shapes published are not exactly those of the engine's model."""
    names, published = set(expected), set(weights.tensors)
    if names != published:
        raise WeightMismatch(
            f"{engine}, version {weights.version}: missing tensors {sorted(names - published)[:5]}, "
            f"unexpected tensors {sorted(published - names)[:5]}"
        )
    for name, shape in expected.items():
        if weights.tensors[name].shape != shape:
            raise WeightMismatch(
                f"{engine}, version {weights.version}: tensor {name} has shape {weights.tensors[name].shape}, "
                f"the engine's model has {shape}"
            )


def verify_order(weights: Weights, life: int, held: int | None, fingerprint: str | None, engine: str) -> None:
    """Raises WeightMismatch when an engine that holds version `held` of a learner's `life` is given an older one, or
    another of that number.

    Newer versions may skip numbers, and the same version may come again. Only a learner of a later life goes back: it
    was built again from its checkpoint. What an earlier life published is refused from then on.
    """
    if held is None or weights.life > life:
        return
    if weights.life < life:
        raise WeightMismatch(
            f"{engine} holds version {held} of learner {life} and was given version {weights.version} of learner "
            f"{weights.life}, which is gone"
        )
    if weights.version < held:
        raise WeightMismatch(
            f"{engine} holds version {held} and was given the older version {weights.version}: versions arrive in "
            "order, and only a learner that was built again goes back"
        )
    if weights.version == held and weights.fingerprint != fingerprint:
        raise WeightMismatch(
            f"{engine} holds version {held} with fingerprint {fingerprint} and was given another of that number, "
            f"{weights.fingerprint}: only one learner may publish"
        )


def verify_probe(weights: Weights, measured: Floats, tolerance: float, engine: str) -> float:
    """The largest difference between the engine's probe log-probabilities and the published; raises above tolerance."""
    if measured.shape != weights.probe.logprobs.shape:
        raise WeightMismatch(
            f"{engine}: probe gave {measured.shape} log-probs, expected {weights.probe.logprobs.shape}"
        )
    first = len(weights.probe.token_ids) - len(measured)
    difference = np.abs(measured - weights.probe.logprobs)
    worst = int(np.argmax(np.nan_to_num(difference, nan=np.inf)))
    if not difference[worst] <= tolerance:
        raise WeightMismatch(
            f"{engine}, version {weights.version}: all tensors arrived intact, but the engine does not compute with "
            f"them: log-prob of probe token {first + worst} is {measured[worst]:.5f}, the learner's "
            f"{weights.probe.logprobs[worst]:.5f} (allowed difference {tolerance:g}). A tied output head that kept old "
            "values looks like this (lm_head.weight)"
        )
    return float(difference[worst])


def _pack_tensor(tensor: torch.Tensor) -> PackedTensor:
    flat = tensor.detach().to("cpu", copy=True).contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy()
    return PackedTensor(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data, _digest(data))


def _digest(data: NDArray[np.uint8]) -> str:
    return hashlib.blake2b(data.data, digest_size=16).hexdigest()
