"""The engine for one process: plain torch, float32 master weights whatever the dtype of the passes."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf.config import LearnerConfig
from rlhf.errors import RunFailed
from rlhf.learner.engine import Step, TrainedModel, adamw, check_optimized, trainable
from rlhf.learner.state import MOMENTS, read_states, restore_states, states_of, write_states
from rlhf.models.offload import Offloaded, tensors_of
from rlhf.models.policy import ModelInputs


class TorchEngine:
    """AdamW on one device.

    In float32 the model's parameters are the masters. In bfloat16 the model computes with bfloat16 parameters, the very
    values that are published, and each has a float32 master; gradients are moved to the masters after every backward
    pass, so that accumulation is float32 too.
    """

    def __init__(self, policy: TrainedModel, config: LearnerConfig, device: torch.device) -> None:
        self.device = device
        self.policy: TrainedModel = policy.to(device)
        self._max_grad_norm = config.max_grad_norm
        self._names = [name for name, _ in trainable(policy)]
        self._parameters = [parameter for _, parameter in trainable(policy)]
        if config.dtype == "float32":
            self._masters = self._parameters
        else:
            for parameter in policy.parameters():  # not buffers: rotary frequencies stay float32
                if parameter.is_floating_point():  # a base in 4 bits is bytes
                    parameter.data = parameter.data.to(torch.bfloat16)
            self._masters = [nn.Parameter(parameter.detach().float()) for parameter in self._parameters]
        self._optimizer = adamw(self._masters, config)
        self._offloaded: Offloaded | None = None
        if self._masters is self._parameters:
            check_optimized(policy, self._optimizer)

    def forward(self, inputs: ModelInputs) -> tuple[Tensor, ...]:
        if self._offloaded is not None:
            raise RunFailed("the model in training has given its GPU up: call reload before forward")
        self.policy.train(torch.is_grad_enabled())  # recomputation of activations is for training mode only
        answers: tuple[Tensor, ...] = self.policy(*inputs)
        return answers

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        if self._masters is self._parameters:
            return
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def step(self, lr: float) -> Step:
        norm = float(nn.utils.clip_grad_norm_(self._masters, self._max_grad_norm))
        applied = bool(torch.isfinite(torch.tensor(norm)))
        if applied:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self._publish_masters()
        self._optimizer.zero_grad(set_to_none=True)
        return Step(norm, applied)

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()

    def any_rank(self, flags: Tensor) -> Tensor:
        return flags

    def save(self, folder: Path) -> None:
        write_states(states_of(self._names, self._masters, self._optimizer), folder, write=True)

    def load(self, folder: Path) -> None:
        shapes = {name: master.shape for name, master in zip(self._names, self._masters, strict=True)}
        restore_states(read_states(folder, shapes), self._masters, self._optimizer)
        self._publish_masters()

    def offload(self) -> None:
        if self._offloaded is not None:
            return
        moments = [self._optimizer.state[master][kind] for master in self._optimizer.state for kind in MOMENTS]
        self._offloaded = Offloaded([*tensors_of(self.policy), *self._masters, *moments])

    def reload(self) -> None:
        if self._offloaded is not None:
            self._offloaded.restore()
            self._offloaded = None

    def close(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _publish_masters(self) -> None:
        if self._masters is not self._parameters:
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                parameter.copy_(master)
