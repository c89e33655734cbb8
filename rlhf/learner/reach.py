"""Does the gradient reach every trainable tensor? Watched over the first updates, then never again."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.errors import RunFailed
from rlhf.learner.engine import Engine, trainable


class GradientReach:
    """Notes which trainable tensors have had a gradient that is not zero. `updates` is how many updates that may take.

    A tensor that requires a gradient and never gets one stands still for the whole run without a word. Low-rank
    adapters need two updates: A has no gradient while B is 0. Updates in which no tensor has one (all advantages 0)
    do not count.
    """

    def __init__(self, engine: Engine, updates: int) -> None:
        self._engine = engine
        self._left = updates
        self._names = [name for name, _ in trainable(engine.policy)]
        self._reached = torch.zeros(len(self._names), dtype=torch.bool)
        self._hooks = [
            parameter.register_hook(self._note(i))  # type: ignore[no-untyped-call]
            for i, (_, parameter) in enumerate(trainable(engine.policy))
        ]

    def check(self, grad_norm: float) -> None:
        """Call after each step, on every rank. Raises RunFailed with the names of tensors that no gradient reached."""
        if self._left == 0 or grad_norm == 0:
            return
        self._left -= 1
        reached = self._engine.any_rank(self._reached)
        if bool(reached.all()):
            self._left = 0
        elif self._left == 0:
            still = [name for name, here in zip(self._names, reached.tolist(), strict=True) if not here]
            raise RunFailed(
                f"no gradient reached {len(still)} of {len(self._names)} trainable tensors, so they will never move: "
                f"{', '.join(still[:10])}. Freeze them (requires_grad=False) or bring them into the loss"
            )
        if self._left == 0:
            for hook in self._hooks:
                hook.remove()

    def _note(self, i: int) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if not self._reached[i]:
                self._reached[i] = bool((gradient != 0).any())

        return hook
