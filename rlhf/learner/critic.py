"""One rank of the critic: a trunk of its own with a scalar head, in the process of the policy's learner.

It has its own engine and optimizer; nothing of it is shared with the policy but the settings of the learner section,
the minibatches and the count that their losses are divided by. As the policy's learner it draws no random numbers.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf import metrics
from rlhf.config import PpoConfig, RunConfig
from rlhf.experience import Floats, TrainBatch
from rlhf.learner.annotate import Share
from rlhf.learner.build import build_critic_engine
from rlhf.learner.collate import collate
from rlhf.learner.plan import Unit, count_of, plan
from rlhf.learner.reach import GradientReach
from rlhf.learner.schedule import learning_rate
from rlhf.metrics import Metrics
from rlhf.ops.microbatch import LossSums, MicroBatch, Scores

FOLDER = "critic"


class Critic:
    """V_t, what is still to come before token t, learnt from the returns. Every public method is collective.

    Loads its model at construction, after the policy's engine has joined the process group. Raises BadInput for a model
    that cannot have a scalar head.
    """

    def __init__(
        self, config: RunConfig, value_loss: Callable[[Scores, MicroBatch], LossSums], rank: int, world_size: int
    ) -> None:
        if not isinstance(config.algorithm, PpoConfig):
            raise TypeError(f"algorithm.name={config.algorithm.name} has no critic")
        self._settings = config.learner.model_copy(update={"lr": config.algorithm.critic.lr})
        self._total = config.loop.num_steps * config.learner.epochs * config.learner.minibatches
        self._value_loss = value_loss
        self._rank, self._world_size = rank, world_size
        self._engine = build_critic_engine(config, self._settings, world_size)
        self._reach = GradientReach(self._engine, updates=1)

    def values(self, share: Share) -> dict[int, list[Floats]]:
        """For each group of this rank V_t (T,) a sample, read where token t is predicted: at the token before it."""
        return share.read(self._engine, self._settings)

    def optimize(self, units: Sequence[Unit], batch: TrainBatch, done: int) -> Metrics:
        """One optimizer step over these units on all ranks, the summed loss divided once by their global count.

        done, the optimizer steps before it. No tokens: no step, which the policy's learner has counted.
        """
        count, columns = count_of(units, batch.normalizer), sorted(batch.rows[0].tokens)
        if count == 0:
            return {}
        settings = self._settings
        planned = plan(units, self._world_size, settings.tokens_per_microbatch, packed=settings.packing)
        parts = [self._accumulate(micro, columns, count) for micro in planned[self._rank]]
        lr = learning_rate(settings, done, self._total)
        step = self._engine.step(lr)
        if not step.applied:
            return {"faults/nonfinite_step": metrics.total(1)} if self._rank == 0 else {}
        self._reach.check(step.grad_norm)
        if self._rank == 0:
            parts.append({"value/grad_norm": metrics.mean(step.grad_norm, 1), "value/lr": metrics.last(lr)})
        return metrics.merge(parts)

    def save(self, trainer: Path) -> None:
        """Writes parameters and optimizer state into a folder of its own in the trainer's."""
        folder = trainer / FOLDER
        folder.mkdir(exist_ok=True)
        self._engine.save(folder)

    def load(self, trainer: Path) -> None:
        """Goes on where `save` stopped."""
        self._engine.load(trainer / FOLDER)

    def close(self) -> None:
        self._engine.close()

    def _accumulate(self, micro: Sequence[Unit], columns: Sequence[str], count: int) -> Metrics:
        collated = collate(micro, columns, packed=self._settings.packing).to(self._engine.device)
        sums = self._value_loss(collated.scores(*self._engine.forward(collated.inputs)), collated.batch)
        self._engine.backward(sums.loss / count)
        return {name: metrics.mean(float(value), float(over)) for name, (value, over) in sums.means.items()}
