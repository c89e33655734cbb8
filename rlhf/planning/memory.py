"""Memory of each role, in bytes, from a model's shape and the settings: what is held, and what passes need beside it.

An actor's peak is what it holds plus the largest of its phases, which follow each other. Weights, masters, gradients
and moments are exact; activations and buffers are counted for the Llama family as transformers 5 computes it, and were
held against measured peaks (docs/plan.md). What torch, DeepSpeed and vLLM themselves take is in `LIBRARIES`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rlhf.config import GenerationConfig, LearnerConfig, LoraConfig
from rlhf.config_section import Dtype
from rlhf.planning.shapes import Shape

WIDTH: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
GIB, MIB = 1 << 30, 1 << 20

# DeepSpeed's defaults, in elements: gradients are reduced in buckets; ZeRO 3 gathers no more parameters at a time.
REDUCE_BUCKET, LIVE_PARAMETERS = 500_000_000, 1_000_000_000
# Float32 arrays of logits that exist together while a chunk's log-probabilities are differentiated; while it is scored.
LOGIT_COPIES_TRAINING, LOGIT_COPIES_FORWARD = 4, 3
# vLLM on a CPU reads so many prompt tokens in a step; what one layer frees the allocator keeps beside the next one's.
# Of each logit its sampler has five float32 and an int64.
PROMPT_TOKENS_PER_STEP, LAYERS_KEPT, SAMPLER_BYTES = 4096, 2, 28
# Resident memory of a process with its libraries and the tiny model, measured on this lock (docs/plan.md).
LIBRARIES = {
    "deepspeed": 640 * MIB,
    "torch": 560 * MIB,
    "transformers": 560 * MIB,
    "vllm": 815 * MIB,
    "plain": 250 * MIB,
}

Phase = Literal["held", "update", "score", "step", "publish", "decode", "load", "away"]
Where = Literal["device", "host"]


@dataclass(frozen=True, slots=True)
class Part:
    """Some bytes, held all the time or during one phase, on the device that computes or always in the host's memory."""

    name: str
    size: float
    phase: Phase
    where: Where


def peak(parts: Iterable[Part], where: Where | None) -> float:
    """What is held and the largest phase, in one place, or (None) where device and host are one."""
    phases: dict[Phase, float] = {}
    for part in parts:
        if where is None or part.where == where:
            phases[part.phase] = phases.get(part.phase, 0.0) + part.size
    return phases.pop("held", 0.0) + max(phases.values(), default=0.0)


def kept_away(parts: Iterable[Part]) -> Part:
    """What a trainer or a reference that takes turns has in the host's memory while others have its GPU. Gradients are
    not kept between two steps."""
    held = sum(part.size for part in parts if part.phase == "held" and part.name in ("weights", "masters", "optimizer"))
    return Part("states of its GPU", held, "away", "host")


@dataclass(frozen=True, slots=True)
class States:
    """What one rank holds of a model in training, in bytes: its parameters, masters, gradients and AdamW's moments."""

    weights: float
    masters: float
    gradients: float
    moments: float

    @property
    def total(self) -> float:
        return self.weights + self.masters + self.gradients + self.moments


def sharded(parameters: float, *, weights: int, gradients: int, masters: int, stage: int, ranks: int) -> States:
    """Bytes of each rank: ZeRO 1 shards masters and moments, 2 gradients too, 3 parameters too (arXiv 1910.02054, 5).

    weights, gradients, masters: bytes of each parameter; moments are two float32.
    """
    share = [1 if stage < least else ranks for least in (1, 2, 3)]
    return States(
        weights=weights * parameters / share[2],
        masters=masters * parameters / share[0],
        gradients=gradients * parameters / share[1],
        moments=8 * parameters / share[0],
    )


def training(trained: float, frozen: float, learner: LearnerConfig, ranks: int, *, gpu: bool) -> tuple[States, float]:
    """What a rank holds of a model of which some parameters are trained, and what a pass adds for their gradients.

    In bfloat16 AdamW has float32 masters. In float32 the parameters are the masters, but ZeRO 1 to 3 keep a copy of
    their share. Gradients are accumulated in float32, but for ZeRO 0 in bfloat16. ZeRO 1 to 3 gather them in a bucket,
    which a GPU reserves whole and a CPU as far as it is filled; in bfloat16 ZeRO 2 and 3 add a float32 copy of what is
    in it. ZeRO 3 gathers parameters as well.
    """
    width = WIDTH[learner.dtype]
    reduced = learner.dtype == "bfloat16"
    if learner.engine == "torch":
        own = sharded(trained, weights=width, gradients=4, masters=4 * reduced, stage=0, ranks=1)
        return _with_frozen(own, width * frozen), width * trained * reduced
    stage = learner.zero_stage
    if stage == 0:
        own = sharded(trained, weights=width, gradients=width, masters=4 * reduced, stage=0, ranks=1)
        return _with_frozen(own, width * frozen), 4 * trained * reduced
    own = sharded(trained, weights=width, gradients=4, masters=4, stage=stage, ranks=ranks)
    own = _with_frozen(own, width * frozen / (ranks if stage == 3 else 1))
    filled = min(trained, REDUCE_BUCKET)
    bucket = (REDUCE_BUCKET if gpu else filled) * (4 if stage == 1 else width)
    bucket += 4 * filled * (reduced and stage > 1)
    gathered = width * min(trained + frozen, LIVE_PARAMETERS) if stage == 3 else 0.0
    return own, bucket + gathered


def _with_frozen(states: States, frozen: float) -> States:
    return States(states.weights + frozen, states.masters, states.gradients, states.moments)


@dataclass(frozen=True, slots=True)
class Passes:
    """The largest micro-batch. tokens, padding included; predictions, completion tokens among them; scores, the
    length of a row whose attention scores are kept (eager attention; otherwise 0); recompute, gradient checkpointing;
    gpu, whether the trainer has one."""

    tokens: int
    predictions: int
    scores: int
    recompute: bool
    gpu: bool


def trainer_parts(
    shape: Shape, lora: LoraConfig | None, learner: LearnerConfig, ranks: int, passes: Passes
) -> list[Part]:
    """The policy on one rank."""
    width = WIDTH[learner.dtype]
    adapters = 0 if lora is None else shape.adapter_parameters(lora.rank, lora.target_modules)
    trained, frozen = (shape.parameters, 0) if lora is None else (adapters, shape.parameters)
    states, passing = training(trained, frozen, learner, ranks, gpu=passes.gpu)
    if lora is not None and lora.base == "nf4":
        states = States(0.5 * frozen + width * trained, states.masters, states.gradients, states.moments)
    chunk = min(learner.logit_chunk, passes.predictions)
    activations = passes.tokens * activation_bytes(shape, learner.dtype, passes)
    if lora is not None:
        activations += passes.tokens * _adapter_activation_bytes(shape, lora, learner.dtype)
    # With a tied head the gradient of one use waits for that of the other.
    embedding = 0.0 if lora is not None else width * shape.embedding * (2 if shape.tied else 1)
    return [
        *_held(states),
        Part("gradients of a pass", passing, "update", "device"),
        Part("activations", activations, "update", "device"),
        Part("logits", chunk * shape.vocabulary * (4 * LOGIT_COPIES_TRAINING + width % 4), "update", "device"),
        Part("gradient of the embedding", embedding, "update", "device"),
        Part("AdamW's step", _step_bytes(trained, shape, learner, ranks, passes), "step", "device"),
        Part("published copy (rank 0)", width * shape.parameters, "publish", "host"),
    ]


def head_parts(shape: Shape, lora: LoraConfig | None, learner: LearnerConfig, ranks: int, passes: Passes) -> list[Part]:
    """A model with a scalar head on one rank, as it is trained: a critic, in the policy's micro-batches, a reward model
    or a ranker. Beside adapters the head is trained whole."""
    trained, frozen = shape.scoring_parameters, 0
    activations = passes.tokens * activation_bytes(shape, learner.dtype, passes)
    if lora is not None:
        frozen = shape.scoring_parameters - shape.head_parameters
        trained = shape.adapter_parameters(lora.rank, lora.target_modules) + shape.head_parameters
        activations += passes.tokens * _adapter_activation_bytes(shape, lora, learner.dtype)
    states, passing = training(trained, frozen, learner, ranks, gpu=passes.gpu)
    embedding = 0.0 if lora is not None else WIDTH[learner.dtype] * shape.embedding
    return [
        *_held(states),
        Part("gradients of a pass", passing, "update", "device"),
        Part("activations", activations, "update", "device"),
        Part("gradient of the embedding", embedding, "update", "device"),
        Part("AdamW's step", _step_bytes(trained, shape, learner, ranks, passes), "step", "device"),
    ]


def _step_bytes(trained: float, shape: Shape, learner: LearnerConfig, ranks: int, passes: Passes) -> float:
    """The denominators of AdamW: on a CPU twice for a moment, tensor by tensor, on a GPU of all tensors at once. Under
    ZeRO 1 to 3 a rank's share is one tensor, and its gradients exist in a second, flat copy."""
    if learner.engine == "deepspeed" and learner.zero_stage > 0:
        return 4 * trained / ranks * (2 if passes.gpu else 3)
    return 4.0 * trained if passes.gpu else 8.0 * min(trained, shape.embedding)


def _held(states: States) -> list[Part]:
    named = {
        "weights": states.weights,
        "masters": states.masters,
        "gradients": states.gradients,
        "optimizer": states.moments,
    }
    return [Part(name, size, "held", "device") for name, size in named.items()]


def activation_bytes(shape: Shape, dtype: Dtype, passes: Passes) -> float:
    """Bytes that a token of a micro-batch leaves for the backward pass.

    A layer of width h, query width q, feed-forward width f, w bytes a number: two norms, each its input in float32, the
    normed value and the output, (4 + 2w) h; queries, keys and values spread over all heads, the attention's output and
    its copy, 5 w q (eager: its scores too); gate, its activation, up and their product, 4 w f (without a gate 3 w f).
    Recomputed: the input of each layer, and one whole layer.
    """
    width, inner = WIDTH[dtype], 4 if shape.gated else 3
    norm = (4 + 2 * width) * shape.hidden
    attention = 5 * width * shape.attention + shape.heads * passes.scores * (4 + width)
    layer = 2 * norm + attention + inner * width * shape.intermediate
    encoder = shape.encoder_layers * layer
    decoder_layer = layer + (norm + attention if shape.encoder_layers else 0)
    if passes.recompute:
        inputs = (shape.layers + shape.encoder_layers) * width * shape.hidden
        return inputs + decoder_layer + norm
    return encoder + shape.layers * decoder_layer + norm


def _adapter_activation_bytes(shape: Shape, lora: LoraConfig, dtype: Dtype) -> float:
    """Of adapters: their input, copied where the base is not float32, and what is between A and B; both float32."""
    copied = 4 if dtype == "bfloat16" else 0
    chosen = shape.adapted(lora.target_modules)
    return sum(matrix.count * (copied * matrix.inputs + 4 * lora.rank) for matrix in chosen)


def scorer_parts(shape: Shape, parameters: float, dtype: Dtype, tokens: int, predictions: int) -> list[Part]:
    """A frozen model that reads: the reference (with logits of `predictions` tokens), a reward model (none)."""
    width = WIDTH[dtype]
    inner = 4 if shape.gated else 3
    working = tokens * (5 * 4 * shape.hidden + width * (5 * shape.attention + inner * shape.intermediate))
    return [
        Part("weights", width * parameters, "held", "device"),
        Part("activations", working, "score", "device"),
        Part("logits", predictions * shape.vocabulary * (4 * LOGIT_COPIES_FORWARD), "score", "device"),
    ]


def cache_bytes(shape: Shape, dtype: Dtype) -> int:
    """Keys and values of one token in all layers."""
    return WIDTH[dtype] * shape.cached_values


def cache_bytes_of_process(shape: Shape, dtype: Dtype, processes: int) -> float:
    """The same in each of the processes that share a layer by its heads: a head of keys and values is in one of them,
    or in several where there are fewer heads than processes."""
    return cache_bytes(shape, dtype) / min(processes, shape.key_value_heads)


def vllm_parts(
    shape: Shape,
    generation: GenerationConfig,
    dtype: Dtype,
    published: float,
    sequence: int,
    memory: float | None,
    processes: int,
) -> list[Part]:
    """An engine of vLLM. published, bytes of a version; sequence, the longest one in tokens; processes, that share each
    layer; memory, of the GPU of one: what is on the device is then that of one process. None on a CPU: all of them
    together, where a tied head is packed beside the embedding and the cache is as large as it is said to be.

    On a GPU vLLM takes gpu_memory_fraction of it, and what weights and passes leave is cache. Matrices, embeddings and
    heads are divided, hidden states and logits are whole in each process.
    """
    width = WIDTH[dtype]
    weights = width * shape.parameters / processes
    batched = max(PROMPT_TOKENS_PER_STEP, sequence)
    divided = 2 * (shape.attention + shape.key_value) + (3 if shape.gated else 2) * shape.intermediate
    layer = 3 * shape.hidden + divided / processes
    logits = generation.max_sequences * shape.vocabulary * SAMPLER_BYTES
    passes = LAYERS_KEPT * batched * layer * width + logits
    place: Where = "device" if memory is None else "host"
    received = [Part("received copy", published, "load", place)]
    if processes > 1:
        received.append(Part("copy that its processes read", published, "load", place))
    if memory is not None:
        cache = max(0.0, generation.gpu_memory_fraction * memory - weights - passes)
        return [
            Part("weights", weights, "held", "device"),
            Part("activations and logits", passes, "held", "device"),
            Part("KV cache", cache, "held", "device"),
            *received,
        ]
    packed = width * shape.embedding if shape.tied else 0
    return [
        Part("weights", weights * processes, "held", "device"),
        Part("activations and logits", passes * processes, "held", "device"),
        Part("packed head", packed, "held", "device"),
        Part("KV cache", generation.cache_gib * GIB, "held", "device"),
        *received,
        Part("embedding, loaded and packed anew", 2 * width * shape.embedding, "load", "device"),
    ]


def transformers_parts(shape: Shape, dtype: Dtype, samples: int, sequence: int, published: float) -> list[Part]:
    """An engine of transformers, which decodes the samples of one prompt: the cache grows by copying, so that a layer
    of it exists twice for a moment; logits exist in float32 and their cumulated probabilities in float64."""
    cache = samples * sequence * cache_bytes(shape, dtype)
    return [
        Part("weights", WIDTH[dtype] * shape.parameters, "held", "device"),
        Part("KV cache", cache * (1 + 1 / shape.layers), "decode", "device"),
        Part("logits", samples * shape.vocabulary * (3 * 4 + 2 * 8), "decode", "device"),
        Part("received copy", published, "load", "host"),
    ]


def published_bytes(shape: Shape, learner: LearnerConfig, *, scores: bool) -> int:
    """A version in the object store: the whole model in the precision of the passes, adapters merged. scores, whether
    it has a scalar head."""
    return WIDTH[learner.dtype] * (shape.scoring_parameters if scores else shape.parameters)
