"""What computes: GPUs from a table of public figures, or the CPU of this machine, measured in half a second.

Peaks are dense (without sparsity), of bfloat16 on tensor cores and of float32 without TF32, which PyTorch leaves off.
Nothing reaches its peak: what share is reached is an assumption that stands here, with where it comes from.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf.config_section import Dtype
from rlhf.errors import BadInput

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or the cores that one actor has. flops by dtype and second; memory in bytes, None where it is shared.

    training, forward and decode are the shares that are reached: of the FLOPs in training and in passes without
    gradient, of the bandwidth in decoding. decode_flops, of the FLOPs in decoding.
    """

    name: str
    flops: Mapping[Dtype, float]
    bytes_per_s: float
    memory: float | None
    training: float
    forward: float
    decode: float
    decode_flops: float
    source: str


# Name -> bfloat16 TFLOP/s, float32 TFLOP/s, GB/s, GB, source.
_TABLE: Mapping[str, tuple[float, float, float, float, str]] = {
    "a10": (125, 31.2, 600, 24, "NVIDIA A10 datasheet"),
    "a100-40": (312, 19.5, 1555, 40, "NVIDIA A100 datasheet (40 GB)"),
    "a100-80": (312, 19.5, 2039, 80, "NVIDIA A100 datasheet (80 GB SXM)"),
    "b200": (2250, 75, 8000, 180, "NVIDIA HGX B200 datasheet, an eighth of a board"),
    "h100": (989, 67, 3350, 80, "NVIDIA H100 datasheet (SXM)"),
    "h100-pcie": (756, 51, 2000, 80, "NVIDIA H100 datasheet (PCIe)"),
    "h200": (989, 67, 4800, 141, "NVIDIA H200 datasheet (SXM)"),
    "l4": (121, 30.3, 300, 24, "NVIDIA L4 datasheet"),
    "l40s": (362, 91.6, 864, 48, "NVIDIA L40S datasheet"),
    "rtx-3090": (71, 35.6, 936, 24, "NVIDIA Ampere GA102 whitepaper"),
    "rtx-4090": (165.2, 82.6, 1008, 24, "NVIDIA Ada architecture whitepaper"),
    "rtx-a6000": (154.8, 38.7, 768, 48, "NVIDIA RTX A6000 datasheet"),
}
GPUS = tuple(sorted(_TABLE))

# Training: Llama 2 reached 39 to 45 % of an A100 (docs/plan.md). Decoding at small batches: vLLM and gpt-fast
# reach 68 to 75 % of the bandwidth. Forward passes and decoding at large batches are bounded by FLOPs as training is.
GPU_TRAINING, GPU_FORWARD, GPU_DECODE, GPU_DECODE_FLOPS = 0.40, 0.40, 0.70, 0.40
# Of what a float32 GEMM of numpy reaches on the same cores, measured in the same moment (docs/plan.md).
CPU_TRAINING, CPU_FORWARD, CPU_DECODE, CPU_DECODE_FLOPS = 0.70, 0.85, 0.70, 0.40
# A GEMM in bfloat16 against float32, by what the CPU has for it; without it PyTorch converts, and nothing is gained.
_BFLOAT16_GAIN = {"amx_bf16": 8.0, "avx512_bf16": 2.0}

_GEMM_SIZE, _COPY_BYTES, _HASH_BYTES, _TRIES = 1024, 64 << 20, 16 << 20, 3


def gpu(name: str) -> Device:
    """A GPU of the table. Raises BadInput, with the names, for another one."""
    found = _TABLE.get(name.lower())
    if found is None:
        raise BadInput(f"--gpu {name}: not in the table of `rlhf plan`; expected one of {', '.join(GPUS)}")
    bfloat16, float32, bandwidth, memory, source = found
    return Device(
        name=name.lower(),
        flops={"bfloat16": bfloat16 * TERA, "float32": float32 * TERA},
        bytes_per_s=bandwidth * GIGA,
        memory=memory * GIGA,
        training=GPU_TRAINING,
        forward=GPU_FORWARD,
        decode=GPU_DECODE,
        decode_flops=GPU_DECODE_FLOPS,
        source=source,
    )


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine, measured: a second of float32 GEMM and of reading memory on one core, cores, memory in bytes."""

    gemm_flops: float
    bytes_per_s: float
    hashed_per_s: float
    cores: int
    memory: float
    bfloat16_gain: float

    def cpu(self, threads: int) -> Device:
        """What an actor with so many compute threads has; threads above the cores add nothing."""
        used = min(threads, self.cores)
        float32 = self.gemm_flops * used
        return Device(
            name=f"this CPU, {used} of {self.cores} cores",
            flops={"float32": float32, "bfloat16": float32 * self.bfloat16_gain},
            bytes_per_s=self.bytes_per_s,
            memory=None,
            training=CPU_TRAINING,
            forward=CPU_FORWARD,
            decode=CPU_DECODE,
            decode_flops=CPU_DECODE_FLOPS,
            source="measured by a GEMM and a copy of numpy",
        )


def this_machine() -> Machine:
    """Measures this machine in half a second."""
    cores = len(os.sched_getaffinity(0))
    square = np.ones((_GEMM_SIZE, _GEMM_SIZE), dtype=np.float32)
    gemm_s = _fastest(lambda: square @ square)
    source, target = np.ones(_COPY_BYTES, dtype=np.uint8), np.empty(_COPY_BYTES, dtype=np.uint8)
    copy_s = _fastest(lambda: np.copyto(target, source))
    data = source[:_HASH_BYTES].data
    hash_s = _fastest(lambda: hashlib.blake2b(data, digest_size=16).digest())
    return Machine(
        gemm_flops=2 * _GEMM_SIZE**3 / gemm_s,
        bytes_per_s=2 * _COPY_BYTES / copy_s,
        hashed_per_s=_HASH_BYTES / hash_s,
        cores=cores,
        memory=_memory(),
        bfloat16_gain=max((gain for flag, gain in _BFLOAT16_GAIN.items() if flag in _flags()), default=1.0),
    )


def _fastest(work: Callable[[], object]) -> float:
    """CPU seconds of all threads, which others who use the machine make no longer; the least of a few tries."""
    found = []
    for _ in range(_TRIES):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return max(min(found), 1e-9)


def _flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()  # not Linux: no gain is assumed
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def _memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
