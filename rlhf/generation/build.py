"""Builds the engine that a run file names. Engines are imported when asked for: vLLM's import takes seconds."""

from dataclasses import replace
from pathlib import Path

from rlhf.config import RunConfig
from rlhf.generation.engine import EngineSpec, VersionedGenerator, longest_sequence
from rlhf.generation.tensor_parallel import check_engine
from rlhf.models.resolve import resolve

# Largest difference at the probe between engine and learner, in nats, where the run file gives none. Seen on SmolLM2:
# 4e-5 in float32; in bfloat16 0.24 at the probe and 0.5 over 800 sampled tokens, so only gross faults show there and
# `mismatch/*` watches the rest.
PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 1.0}


def engine_spec(config: RunConfig, name: str, model: Path, tensor_parallel: int) -> EngineSpec:
    """The plain values that an engine of this run is built from; `name` is how messages call it."""
    generation = config.generation
    assert generation is not None  # the settings refuse a run that samples without it
    dtype = generation.dtype or config.learner.dtype
    wanted = config.data.max_prompt_tokens + generation.max_new_tokens
    trust_remote_code = config.model.trust_remote_code
    return EngineSpec(
        name=name,
        model=model,
        dtype=dtype,
        attention=config.model.attention,
        trust_remote_code=trust_remote_code,
        run_seed=config.seed,
        max_sequence_tokens=longest_sequence(model, wanted, trust_remote_code=trust_remote_code),
        max_sequences=generation.max_sequences,
        cache_gib=generation.cache_gib,
        gpu_memory_fraction=generation.gpu_memory_fraction,
        probe_tolerance=generation.probe_tolerance or PROBE_TOLERANCE[dtype],
        mid_sequence=generation.weights_mid_sequence,
        sleeps=False,
        tensor_parallel=tensor_parallel,
    )


def build_generator(config: RunConfig, name: str, tensor_parallel: int) -> VersionedGenerator:
    """The engine named by generation.engine, not yet set up: call `setup`, then `load` a published version.

    Raises BadInput where that engine computes in one process and tensor_parallel is more."""
    return _build(config, engine_spec(config, name, resolve(config.model.name), tensor_parallel))


def build_sleeper(config: RunConfig, name: str, tensor_parallel: int) -> VersionedGenerator:
    """The same for an engine that takes turns on its GPU, and can `sleep`."""
    spec = engine_spec(config, name, resolve(config.model.name), tensor_parallel)
    return _build(config, replace(spec, sleeps=True))


def _build(config: RunConfig, spec: EngineSpec) -> VersionedGenerator:
    assert config.generation is not None  # the settings refuse a run that samples without it
    check_engine(config.generation.engine, spec.tensor_parallel)
    if config.generation.engine == "vllm":
        from rlhf.generation.vllm_engine import VllmGenerator

        return VllmGenerator(spec)
    from rlhf.generation.transformers_engine import TransformersGenerator

    return TransformersGenerator(spec)
