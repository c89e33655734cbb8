"""Tensors whose values wait in the host's memory while another role has the GPU."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Offloaded:
    """Moves the values of some tensors to the host; on their device nothing is left of them, also where that is the
    host itself. Until `restore` they are empty, so that a pass with them fails."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        apart = {id(tensor): tensor for tensor in tensors}.values()
        self._kept = [(tensor, tensor.device, tensor.data.to("cpu")) for tensor in apart]
        for tensor, _, kept in self._kept:
            tensor.data = kept.new_empty(0, device=tensor.device)
        free_cached()

    def restore(self) -> None:
        """The same bits, on the device where they were."""
        for tensor, device, kept in self._kept:
            tensor.data = kept.to(device)
        self._kept = []


def tensors_of(module: nn.Module) -> list[Tensor]:
    """A module's parameters and buffers, a tied one once."""
    return [*module.parameters(), *module.buffers()]


def free_cached() -> None:
    """Gives what torch keeps for its next allocation back to the GPU, so that other processes can have it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
