"""How a version gets into vLLM's model: in this process, or in each of the processes of an engine with tensor
parallelism.

There vLLM's own `collective_rpc` calls `RankExtension` in all of them at once. The tensors lie in memory without a name
that each process maps and takes its share from: one copy for all, no pickle, and the kernel frees it whoever dies.

On a CPU vLLM repacks the linear layers once they are loaded, and an update leaves a tied output head with its old
packed values; `refresh_output_heads` packs it again, and the probe of every load proves that it did.
"""

import logging
import mmap
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlhf.processes import end_with
from rlhf.weights import PackedTensor, Weights

RANK_EXTENSION = "rlhf.generation.vllm_weights.RankExtension"
ALIGNMENT = 64  # bytes: a tensor of any dtype may begin there


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in shared memory, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """The tensors of a version in memory that other processes of this user on this machine can map, at `path`."""

    path: str
    places: tuple[Place, ...]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors, which must not be written into; the mapping goes with the last of them."""
        with open(self.path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = np.frombuffer(memory, dtype=np.uint8)
        for place in self.places:
            own = data[place.offset : place.offset + place.size]
            yield place.name, PackedTensor(place.dtype, place.shape, own, "").unpack()


@contextmanager
def shared(weights: Weights) -> Iterator[SharedWeights]:
    """The tensors of a version, copied once into memory without a name; gone with the block, or with this process."""
    places, end = [], 0
    for name, tensor in weights.tensors.items():
        places.append(Place(name, tensor.dtype, tensor.shape, end, tensor.data.nbytes))
        end += -(-tensor.data.nbytes // ALIGNMENT) * ALIGNMENT
    descriptor = os.memfd_create("weights")
    try:
        os.ftruncate(descriptor, end)
        with mmap.mmap(descriptor, end) as memory:
            for place, tensor in zip(places, weights.tensors.values(), strict=True):
                memory[place.offset : place.offset + place.size] = tensor.data.data
        yield SharedWeights(f"/proc/{os.getpid()}/fd/{descriptor}", tuple(places))
    finally:
        os.close(descriptor)


class RankExtension:
    """vLLM mixes it into its worker, in each process of an engine with tensor parallelism."""

    model_runner: Any

    def begin_rank(self, engine: int, *, on_cpu: bool) -> None:
        """Before anything is asked of it; engine, the process that started it and with which it ends. Also where it
        waits for another rank that has died, and would not see that vLLM's own pipe was closed. Signals to the process
        group are the engine's to heed, which may yet have to save."""
        end_with(engine)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if on_cpu:
            torch.compiler.set_stance("force_eager")  # see VllmGenerator._step

    def take_shared(self, weights: SharedWeights, *, on_cpu: bool) -> None:
        """Loads this rank's share of each tensor."""
        take(self.model_runner, weights.tensors(), on_cpu=on_cpu)


def take(runner: Any, tensors: Iterable[tuple[str, torch.Tensor]], *, on_cpu: bool) -> None:
    """Loads tensors under the names of a checkpoint into vLLM's model in this process; runner, its model runner."""
    if not on_cpu:
        runner.get_model().load_weights(tensors)
        return
    # Said of rotary tables, which are computed, and of a tied head, which is packed again below and probed.
    with silenced("vllm.model_executor.model_loader.reload.layerwise", ": Failed to load weights"):
        runner.reload_weights(weights_iterator=tensors)
    refresh_output_heads(runner.get_model())


def refresh_output_heads(model: torch.nn.Module) -> None:
    """Packs the weights of every output head again, from the tensor that it shares with the embedding where it is tied.

    A reload repacks only layers that were themselves loaded. A tied head was not: it would go on multiplying with the
    values of the former version, and nothing in vLLM says so.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


@contextmanager
def silenced(logger_name: str, text: str) -> Iterator[None]:
    """Hides the messages of one logger that contain a text, for warnings that are known to be unfounded here."""
    logger = logging.getLogger(logger_name)

    def keep(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
