"""The whole plan of a run: placement, batches, memory by role, time by phase, and what does not fit.

Pure: reading files, measuring this machine and printing are the caller's (`rlhf.cli.plan`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from rlhf.cluster import LEARNING, Cluster, Role
from rlhf.colocation import shared_gpus
from rlhf.config import RunConfig
from rlhf.config_section import Dtype
from rlhf.passes import needs_old_logprobs, needs_reference
from rlhf.planning import memory, times
from rlhf.planning.batches import Batches, DataSize, Lengths, batches
from rlhf.planning.devices import Device, Machine
from rlhf.planning.fitting import Peak, problems_of, turn_problems
from rlhf.planning.memory import Part
from rlhf.planning.placement import Placed, demand_of, placed_roles
from rlhf.planning.shapes import Shape
from rlhf.planning.times import StepTime


@dataclass(frozen=True, slots=True)
class Models:
    """The shapes of a run's models. critic, of PPO; judges, by the key of the run file that names them, with their
    precision."""

    policy: Shape
    critic: Shape | None
    judges: Mapping[str, tuple[Shape, Dtype]]


@dataclass(frozen=True, slots=True)
class Given:
    """What a plan is made for. data, its size by one epoch; gpu, that of the roles that have one.

    network, bytes a second between nodes; None: everything is on one node."""

    config: RunConfig
    cluster: Cluster
    models: Models
    lengths: Lengths
    data: DataSize
    machine: Machine
    gpu: Device | None
    network: float | None

    def device_of(self, role: Role) -> Device:
        if role.gpus and self.gpu is not None:
            return self.gpu
        return self.machine.cpu(self.cluster.threads_of(role))

    @property
    def engine_device(self) -> Device:
        """What a whole rollout engine computes with: n GPUs, or the cores of its n processes, which read one memory."""
        role = self.cluster.rollout
        if not role.gpus or self.gpu is None:
            return self.machine.cpu(self.cluster.threads_of(role) * role.processes)
        flops = {dtype: role.processes * flops for dtype, flops in self.gpu.flops.items()}
        return replace(self.gpu, flops=flops, bytes_per_s=role.processes * self.gpu.bytes_per_s)

    @property
    def published(self) -> int:
        """Bytes of a version."""
        return memory.published_bytes(self.models.policy, self.config.learner, scores=self.config.trains_scores)

    @property
    def sampler_dtype(self) -> Dtype:
        generation = self.config.generation
        return (generation.dtype if generation is not None else None) or self.config.learner.dtype


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """One actor of a role: bytes of each part, and its peaks on its device and in the host's memory.

    On a CPU the two are one: device_peak is 0. With several processes on GPUs of their own, the device is that of one
    of them."""

    role: str
    replicas: int
    processes: int
    device: str
    parts: tuple[Part, ...]
    device_peak: float
    host_peak: float


@dataclass(frozen=True, slots=True)
class TurnMemory:
    """What a GPU of a colocation group holds in one of the turns: the peaks of the roles whose turn it is, in bytes."""

    turn: Literal["train", "sample"]
    roles: tuple[str, ...]
    device_peak: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is shown. object_store, bytes of published weights in it: the version in use and the next one.
    turns, of the roles that share GPUs, two a group; none without colocation."""

    placement: tuple[Placed, ...]
    demand: Mapping[str, float]
    batches: Batches
    memory: tuple[RoleMemory, ...]
    turns: tuple[TurnMemory, ...]
    published: float
    object_store: float
    update_flops: float
    time: StepTime
    problems: tuple[str, ...]


def make_plan(given: Given) -> Plan:
    """The plan. Raises BadInput for adapters that no layer of the model takes."""
    config, cluster = given.config, given.cluster
    roles = placed_roles(config, cluster)
    arithmetic = batches(config, cluster.trainer.replicas, given.lengths, given.data)
    held = tuple(_memory_of(given, placed) for placed in roles)
    published = given.published
    samples = config.records == "prompts"
    stored = (2 if samples else 1) * published
    turns = tuple(_turns(cluster, roles, held))
    peaks = [Peak(placed, own.device_peak, own.host_peak) for placed, own in zip(roles, held, strict=True)]
    return Plan(
        placement=roles,
        demand=demand_of(roles, least=False),
        batches=arithmetic,
        memory=held,
        turns=turns,
        published=published,
        object_store=stored,
        update_flops=sum(_update_flops(given, arithmetic)),
        time=_time(given, arithmetic),
        problems=(
            *problems_of(cluster, peaks, stored, given.machine.memory, given.gpu),
            *turn_problems([(turn.roles, turn.device_peak) for turn in turns], given.gpu),
            *_cache_problem(given),
        ),
    )


def _turns(cluster: Cluster, roles: tuple[Placed, ...], held: tuple[RoleMemory, ...]) -> Iterator[TurnMemory]:
    """Who takes turns is not there in the others' turn, so that a GPU needs the largest turn, not the sum."""
    peaks = {own.role: own.device_peak for own in held}
    for shared in shared_gpus(cluster, {placed.role: placed.settings for placed in roles}):
        learning = tuple(name for name in shared.roles if name in LEARNING)
        sampling = tuple(name for name in shared.roles if name not in LEARNING)
        if learning:
            yield TurnMemory("train", learning, sum(peaks[name] for name in learning))
        if sampling:
            yield TurnMemory("sample", sampling, sum(peaks[name] for name in sampling))


def _memory_of(given: Given, placed: Placed) -> RoleMemory:
    on_gpu = bool(placed.settings.gpus) and given.gpu is not None
    parts = _parts(given, placed, on_gpu=on_gpu)
    parts.append(Part("libraries", _libraries(given, placed), "held", "host"))
    if on_gpu and placed.shares_with and placed.role != "rollout":
        parts.append(memory.kept_away(parts))
    device = memory.peak(parts, "device") if on_gpu else 0.0
    host = memory.peak(parts, "host" if on_gpu else None)
    name = given.device_of(placed.settings).name
    return RoleMemory(placed.role, placed.replicas, placed.processes, name, tuple(parts), device, host)


def _libraries(given: Given, placed: Placed) -> float:
    if placed.role == "rollout" and given.config.generation is not None:
        processes = placed.processes + (placed.processes > 1)  # the one that schedules, and those that compute
        return processes * memory.LIBRARIES[given.config.generation.engine]
    if placed.role in ("trainer", "critic"):
        return memory.LIBRARIES[given.config.learner.engine]
    loads_torch = placed.role == "reference" or (placed.role == "reward" and given.models.judges)
    return memory.LIBRARIES["torch" if loads_torch else "plain"]


def _parts(given: Given, placed: Placed, *, on_gpu: bool) -> list[Part]:
    config, models = given.config, given.models
    if placed.role == "trainer":
        passes = _passes(given, placed.replicas, gpu=on_gpu)
        if config.trains_scores:
            own = memory.head_parts(models.policy, config.model.lora, config.learner, placed.replicas, passes)
            return [*own, Part("published copy (rank 0)", given.published, "publish", "host")]
        return memory.trainer_parts(models.policy, config.model.lora, config.learner, placed.replicas, passes)
    if placed.role == "critic" and models.critic is not None:
        passes = _passes(given, placed.replicas, gpu=on_gpu)
        return memory.head_parts(models.critic, None, config.learner, placed.replicas, passes)
    if placed.role == "rollout":
        return _engine_parts(given, given.gpu if on_gpu else None)
    budget = min(config.learner.tokens_per_microbatch, _group_tokens(given))
    if placed.role == "reference":
        chunk = min(config.learner.logit_chunk, _predictions(given.lengths, budget))
        return memory.scorer_parts(models.policy, models.policy.parameters, config.learner.dtype, budget, chunk)
    if placed.role == "reward":
        return [
            part
            for shape, dtype in models.judges.values()
            for part in memory.scorer_parts(shape, shape.scoring_parameters, dtype, budget, 0)
        ]
    return []


def _passes(given: Given, ranks: int, *, gpu: bool) -> memory.Passes:
    """The largest micro-batch of a rank, of completions of the mean length or of the longest."""
    config, lengths = given.config, given.lengths
    longest = Lengths(lengths.prompt, lengths.longest, lengths.longest)
    tokens = max(
        batches(config, ranks, assumed, given.data).largest_microbatch_tokens for assumed in {lengths, longest}
    )
    scores = lengths.prompt + lengths.longest if config.model.attention == "eager" else 0
    return memory.Passes(tokens, _predictions(lengths, tokens), scores, config.model.gradient_checkpointing, gpu)


def _engine_parts(given: Given, gpu: Device | None) -> list[Part]:
    config, shape = given.config, given.models.policy
    generation = config.generation
    assert generation is not None  # a run with rollout engines has it
    published = given.published
    if generation.engine == "transformers":
        sequence = given.lengths.prompt + given.lengths.longest
        samples = config.algorithm.samples_per_prompt
        return memory.transformers_parts(shape, given.sampler_dtype, samples, sequence, published)
    sequence = given.lengths.prompt + given.lengths.longest
    size, processes = gpu.memory if gpu else None, given.cluster.rollout.processes
    return memory.vllm_parts(shape, generation, given.sampler_dtype, published, sequence, size, processes)


def _predictions(lengths: Lengths, tokens: int) -> int:
    """Completion tokens among those of a micro-batch of the longest rows."""
    return max(1, round(tokens * lengths.longest / (lengths.prompt + lengths.longest)))


def _group_tokens(given: Given) -> int:
    """Tokens of a group, which a judge reads as one batch where the budget allows."""
    config = given.config
    answers = config.algorithm.samples_per_prompt if config.records == "prompts" else given.data.answers
    return answers * (given.lengths.prompt + given.lengths.mean)


def _update_flops(given: Given, arithmetic: Batches) -> tuple[float, float]:
    """FLOPs of a step's update, of all ranks and epochs: the policy's, the critic's."""
    config, lengths = given.config, given.lengths
    recompute = config.model.gradient_checkpointing
    flops = times.sequence_flops(given.models.policy, lengths.prompt, lengths.mean)
    if config.trains_scores:  # its head's one output is nothing beside the trunk
        flops = times.Flops(flops.trunk, 0.0)
    policy, critic = times.training_flops(flops, adapters=config.model.lora is not None, recompute=recompute), 0.0
    if given.models.critic is not None:
        trunk = times.Flops(times.sequence_flops(given.models.critic, lengths.prompt, lengths.mean).trunk, 0.0)
        critic = times.training_flops(trunk, adapters=False, recompute=recompute)
    sequences = arithmetic.sequences_per_step * arithmetic.epochs
    return policy * sequences, critic * sequences


def _trained_seconds(given: Given, flops: tuple[float, float], *, backward: bool) -> float:
    """Of policy and critic, which work at the same time, where they have devices of their own."""
    cluster, dtype, found = given.cluster, given.config.learner.dtype, []
    for role, amount in zip((cluster.trainer, cluster.critic), flops, strict=True):
        device = given.device_of(role)
        found.append(amount / (device.flops[dtype] * role.replicas * (device.training if backward else device.forward)))
    return sum(found) if _shared(given) else max(found)


def _time(given: Given, arithmetic: Batches) -> StepTime:
    config = given.config
    decoding = _decoding(given, arithmetic)
    generate = 0.0 if decoding is None else decoding.seconds
    judge = _judge_seconds(given, arithmetic)
    update = _trained_seconds(given, _update_flops(given, arithmetic), backward=True)
    annotate = _trained_seconds(given, _annotate_flops(given, arithmetic), backward=False)
    sync = _sync_seconds(given)
    reason = "FLOPs"
    phases = [
        ("generate", generate, "" if decoding is None else _decode_reason(decoding)),
        ("judge", judge, reason),
        ("annotate", annotate, reason),
        ("update", update, reason),
        ("sync", sync, "bytes of the weights, copied and hashed"),
    ]
    step = times.step_seconds(
        generate, judge, annotate + update + sync,
        shared=_shared(given), ahead=config.loop.max_staleness > 0,
    )  # fmt: skip
    bound = times.longest_phase(phases)
    return StepTime(generate, judge, annotate, update, sync, step, step * config.loop.num_steps, bound, decoding)


def _decode_reason(decoding: times.Decoding) -> str:
    parts = {"the longest completions, fewer at a time than fit": decoding.tail_s, decoding.bound: decoding.body_s}
    parts["reading the prompts"] = decoding.prefill_s
    return max(parts, key=lambda name: parts[name])


def _shared(given: Given) -> bool:
    """Whether the roles work on the same cores or GPU: on one machine without GPUs, with parts of one, or by turns."""
    cluster = given.cluster
    if any("trainer" in group for group in cluster.colocation):
        return True
    roles = [cluster.trainer, cluster.rollout, *([cluster.critic] if given.models.critic is not None else [])]
    return cluster.address == "local" and not all(role.gpus >= 1 for role in roles)


def _decoding(given: Given, arithmetic: Batches) -> times.Decoding | None:
    config, cluster = given.config, given.cluster
    generation, shape = config.generation, given.models.policy
    if generation is None:
        return None
    device, dtype = given.engine_device, given.sampler_dtype
    prompts = -(-arithmetic.prompts_per_step // cluster.rollout.replicas)
    samples = prompts * config.algorithm.samples_per_prompt
    if generation.engine == "transformers":
        at_once = config.algorithm.samples_per_prompt
        one = times.decoding(shape, memory.WIDTH[dtype], device, dtype, at_once, at_once, given.lengths)
        return times.repeated(one, prompts)
    at_once = max(1, min(generation.max_sequences, cached_sequences(given, device)))
    return times.decoding(shape, memory.WIDTH[dtype], device, dtype, samples, at_once, given.lengths)


def cached_sequences(given: Given, device: Device) -> int:
    """How many sequences of full length vLLM's cache holds."""
    generation, shape = given.config.generation, given.models.policy
    assert generation is not None  # asked of a run with engines
    sequence = given.lengths.prompt + given.lengths.longest
    processes = given.cluster.rollout.processes
    parts = memory.vllm_parts(shape, generation, given.sampler_dtype, 0.0, sequence, device.memory, processes)
    cache = sum(part.size for part in parts if part.name == "KV cache")
    if device.memory is None:
        cache /= processes
    return int(cache // (sequence * memory.cache_bytes_of_process(shape, given.sampler_dtype, processes)))


def _cache_problem(given: Given) -> list[str]:
    """vLLM does not start where its cache cannot hold one sequence."""
    generation = given.config.generation
    if generation is None or generation.engine != "vllm":
        return []
    device = given.device_of(given.cluster.rollout)
    if cached_sequences(given, device) > 0:
        return []
    key = "gpu_memory_fraction or rollout.tensor_parallel" if device.memory is not None else "cache_gib"
    return [
        f"rollout: vLLM's cache cannot hold one sequence of {given.lengths.prompt + given.lengths.longest} tokens "
        f"beside the weights; raise generation.{key}"
    ]


def _judge_seconds(given: Given, arithmetic: Batches) -> float:
    """Of the slower of the two pools, the reference and reward models; functions and servers take nobody knows how
    long."""
    config, cluster, lengths = given.config, given.cluster, given.lengths
    sequences = _sequences_judged(given, arithmetic)
    found = [0.0]
    if needs_reference(config) and config.model.lora is None:
        device = given.device_of(cluster.reference)
        each = times.sequence_flops(given.models.policy, lengths.prompt, lengths.mean).forward
        rate = device.flops[config.learner.dtype] * device.forward * cluster.reference.replicas
        found.append(sequences * each / rate)
    device, reward = given.device_of(cluster.reward), 0.0
    for shape, dtype in given.models.judges.values():
        each = times.sequence_flops(shape, lengths.prompt, lengths.mean).trunk
        reward += sequences * each / (device.flops[dtype] * device.forward * cluster.reward.replicas)
    return max(*found, reward)


def _sequences_judged(given: Given, arithmetic: Batches) -> int:
    """Samples; or the answers of the data, which the reference reads once each, however often they are compared."""
    return arithmetic.samples_per_step or arithmetic.prompts_per_step * given.data.answers


def _annotate_flops(given: Given, arithmetic: Batches) -> tuple[float, float]:
    """Passes without gradient: the policy's old log-probs and, with LoRA, its reference; the critic's values."""
    config, lengths = given.config, given.lengths
    flops = times.sequence_flops(given.models.policy, lengths.prompt, lengths.mean)
    passes = needs_old_logprobs(config) + (config.model.lora is not None and needs_reference(config))
    critic = 0.0
    if given.models.critic is not None:
        critic = times.sequence_flops(given.models.critic, lengths.prompt, lengths.mean).trunk
    sequences = _sequences_judged(given, arithmetic)
    return passes * flops.forward * sequences, critic * sequences


def _sync_seconds(given: Given) -> float:
    """Packing and hashing on rank 0; hashing and loading in every engine at once; the way between nodes, one copy an
    engine. Nobody takes the weights of a run on data, but they are published."""
    size = given.published
    machine, engines = given.machine, given.cluster.rollout.replicas
    pack = size / machine.hashed_per_s + 2 * size / machine.bytes_per_s
    if given.config.generation is None:
        return pack
    sent = 0.0 if given.network is None else size * engines / given.network
    shared = 2 * size / machine.bytes_per_s if given.cluster.rollout.processes > 1 else 0.0
    return 2 * pack + shared + sent
