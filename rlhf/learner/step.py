"""The end of an optimizer step, the policy's and the critic's alike."""

from rlhf import metrics
from rlhf.config import LearnerConfig
from rlhf.learner.engine import Engine
from rlhf.learner.reach import GradientReach
from rlhf.learner.schedule import learning_rate
from rlhf.metrics import Metrics


def optimizer_step(
    engine: Engine, reach: GradientReach, settings: LearnerConfig, done: int, updates: int, prefix: str
) -> Metrics | None:
    """Clips, steps with the rate of the `done`-th optimizer step of a run of so many updates, and checks that gradients
    reach what is trained.

    The norm and the rate under prefix; None where the engine skipped the step for a gradient that is not finite."""
    lr = learning_rate(settings, done, updates * settings.epochs * settings.minibatches)
    step = engine.step(lr)
    if not step.applied:
        return None
    reach.check(step.grad_norm)
    return {f"{prefix}grad_norm": metrics.mean(step.grad_norm, 1), f"{prefix}lr": metrics.last(lr)}
