"""What the learner asks of an engine: passes, optimizer steps, whole parameters, and its own state on disk."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rlhf.config import LearnerConfig
from rlhf.errors import RunFailed
from rlhf.models.policy import ModelInputs, PolicyModel
from rlhf.models.score import ScoreModel

TrainedModel = PolicyModel | ScoreModel


class Step(NamedTuple):
    """An optimizer step: the gradient's norm before clipping, and whether the step was taken: it was finite."""

    grad_norm: float
    applied: bool


class Engine(Protocol):
    """Holds the policy (or a model with a scalar head) and its optimizer.

    Every method is collective: all ranks call it, in the same order.
    """

    policy: TrainedModel
    device: torch.device

    def forward(self, inputs: ModelInputs) -> tuple[Tensor, ...]:
        """What the model answers, (N,) each: log-probs and entropy, or scores; with gradient unless it is off."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this rank's part of the loss; parts are summed over micro-batches and ranks."""

    def step(self, lr: float) -> Step:
        """Clips to max_grad_norm, takes a step of AdamW, clears the gradient; one that is not finite: no step."""

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Inside it the parameters are whole on every rank. Read only."""

    def any_rank(self, flags: Tensor) -> Tensor:
        """Each flag (n,) bool, true where it is true on any rank."""

    def save(self, folder: Path) -> None:
        """Writes weights in full precision and optimizer state into an existing folder (`rlhf.learner.state`)."""

    def load(self, folder: Path) -> None:
        """Takes what any engine wrote, on any number of ranks. Raises BadInput for the state of another model."""

    def offload(self) -> None:
        """Moves all that it holds to the host's memory; every other method but `close` needs a `reload` first."""

    def reload(self) -> None:
        """Brings it back, bit for bit."""

    def close(self) -> None: ...


def trainable(policy: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that require a gradient, a tied one once. Raises RunFailed when there are none."""
    found = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
    if not found:
        raise RunFailed("the policy has no trainable parameters: every tensor has requires_grad=False")
    return found


def adamw(parameters: Sequence[nn.Parameter], config: LearnerConfig) -> torch.optim.AdamW:
    """AdamW of torch: the same code for all engines, and nothing to compile. The rate is set before each step."""
    return torch.optim.AdamW(
        list(parameters),
        lr=config.lr,
        betas=config.adam_betas,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )


def check_optimized(policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises RunFailed, naming them, when trainable tensors are not in the optimizer: they would never move."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    names = trainable(policy)
    lost = [name for name, parameter in names if id(parameter) not in held]
    if lost:
        raise RunFailed(
            f"{len(lost)} of {len(names)} trainable tensors are not in the optimizer: {', '.join(lost[:10])}"
        )
