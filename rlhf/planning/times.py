"""Time of each phase of a step, in seconds, by what bounds it: bytes through memory, FLOPs, or the longest sequence.

Every figure is a count divided by a peak and by the share of it that is reached (`rlhf.planning.devices`). Left out:
queues, Python, networks between ranks, reward functions and servers, whose time nobody knows before they are called.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.config_section import Dtype
from rlhf.planning.batches import Lengths
from rlhf.planning.devices import Device
from rlhf.planning.shapes import Shape


@dataclass(frozen=True, slots=True)
class Flops:
    """Of one sequence in one pass without gradient: in the trunk, and in the output head."""

    trunk: float
    head: float

    @property
    def forward(self) -> float:
        return self.trunk + self.head


def sequence_flops(shape: Shape, prompt: int, completion: int) -> Flops:
    """2 FLOPs a weight and token; attention over what each token sees, 4 q a layer and pair of tokens.

    The head is multiplied for completion tokens only, as the learner does it. An encoder reads the prompt.
    """
    head = 2.0 * shape.multiplied("head") * completion
    if shape.encoder_layers:
        trunk = 2.0 * (shape.multiplied("encoder") * prompt + shape.multiplied("decoder") * completion)
        pairs = shape.encoder_layers * prompt**2 + shape.layers * (completion**2 / 2 + completion * prompt)
        return Flops(trunk + 4.0 * shape.attention * pairs, head)
    length = prompt + completion
    trunk = 2.0 * shape.multiplied("decoder") * length
    return Flops(trunk + 4.0 * shape.attention * shape.layers * length**2 / 2, head)


def training_flops(flops: Flops, *, adapters: bool, recompute: bool) -> float:
    """A backward pass costs two forward passes (6ND, arXiv 2001.08361), with adapters one: frozen weights need no
    gradient. The head's logits are computed again in it; with gradient checkpointing the trunk is, too."""
    backward = 1 if adapters else 2
    return flops.trunk * (1 + backward + recompute) + flops.head * (2 + backward)


@dataclass(frozen=True, slots=True)
class Decoding:
    """One engine's samples of a step. steps of the engine; of these tail_steps with fewer sequences than it could hold.

    seconds = prefill + body + tail; bound, what the body waits for: weights and cache through memory, or FLOPs."""

    sequences_at_once: int
    steps: float
    tail_steps: float
    weights_s: float
    cache_s: float
    flops_s: float
    prefill_s: float
    body_s: float
    tail_s: float
    bound: str

    @property
    def seconds(self) -> float:
        return self.prefill_s + self.body_s + self.tail_s


def decoding_steps(samples: int, at_once: int, mean: float, longest: int) -> float:
    """Steps of an engine that fills a free place at once: the last sample to begin is the longest.

    max(0, S - B) m / B + L           S samples of m tokens on average, B at once, the longest of L
    """
    return max(0, samples - at_once) * mean / at_once + longest


def decoding(
    shape: Shape, dtype_width: int, device: Device, dtype: Dtype, samples: int, at_once: int, lengths: Lengths
) -> Decoding:
    """The samples of one engine in one step of the run; at_once, how many sequences it decodes together at most."""
    together = min(samples, at_once)
    steps = decoding_steps(samples, together, lengths.mean, lengths.longest)
    body_steps = min(steps, samples * lengths.mean / together)
    bandwidth, flops = device.bytes_per_s * device.decode, device.flops[dtype] * device.decode_flops
    weights_s = dtype_width * shape.read_for_a_token / bandwidth
    prompt = 0 if shape.encoder_layers else lengths.prompt
    held = samples * (lengths.mean * prompt + lengths.mean**2 / 2)
    cache_s = held * dtype_width * shape.cached_values / bandwidth
    each = sequence_flops(shape, lengths.prompt, lengths.mean)
    read = sequence_flops(shape, lengths.prompt, 0)
    flops_s = samples * (each.forward - read.forward) / flops
    memory_s = body_steps * weights_s + cache_s
    return Decoding(
        sequences_at_once=together,
        steps=steps,
        tail_steps=steps - body_steps,
        weights_s=body_steps * weights_s,
        cache_s=cache_s,
        flops_s=flops_s,
        prefill_s=samples * read.forward / (device.flops[dtype] * device.forward),
        body_s=max(memory_s, flops_s),
        tail_s=(steps - body_steps) * weights_s,
        bound="FLOPs" if flops_s > memory_s else "weights" if body_steps * weights_s > cache_s else "KV cache",
    )


def repeated(one: Decoding, times: int) -> Decoding:
    """An engine that decodes groups one after the other; `one` is its group."""
    return Decoding(
        sequences_at_once=one.sequences_at_once,
        steps=one.steps * times,
        tail_steps=one.tail_steps * times,
        weights_s=one.weights_s * times,
        cache_s=one.cache_s * times,
        flops_s=one.flops_s * times,
        prefill_s=one.prefill_s * times,
        body_s=one.body_s * times,
        tail_s=one.tail_s * times,
        bound=one.bound,
    )


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of the phases of a step; judge is None for a reward whose time nobody knows, and None counts as 0.

    step_s: with max_staleness 0 one after the other; otherwise sampling and judging beside training, where they
    have devices of their own. bound names the longest phase and why it takes so long.
    """

    generate_s: float
    judge_s: float
    annotate_s: float
    update_s: float
    sync_s: float
    step_s: float
    run_s: float
    bound: str
    decoding: Decoding | None


def step_seconds(generate: float, judge: float, train: float, *, shared: bool, ahead: bool) -> float:
    """shared: one machine does everything, so that nothing is done beside anything. ahead: samples may be stale."""
    if shared:
        return generate + judge + train
    sampled = max(generate, judge)  # groups are judged as they come
    return max(sampled, train) if ahead else sampled + train


def longest_phase(phases: Sequence[tuple[str, float, str]]) -> str:
    """The name of the longest phase and its reason; phases are (name, seconds, reason)."""
    name, _, reason = max(phases, key=lambda phase: phase[1])
    return f"{name}: {reason}"
