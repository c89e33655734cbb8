"""One rank of the critic: a trunk of its own with a scalar head. All ranks are called with the same arguments, in the
same order.

It shares nothing with the policy's learner but what both read: the settings of the learner section, the groups, and
the batch with its minibatches and the count that both losses are divided by. So it may be in the same process or on
another machine, on another number of ranks, and learn before, after or while the policy does, with the same result.
As the policy's learner it draws no random numbers.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from rlhf import metrics
from rlhf.algorithms import ActorCriticAlgorithm
from rlhf.chaos.points import point
from rlhf.config import PpoConfig, RunConfig
from rlhf.errors import BadInput
from rlhf.experience import VALUES, Columns, Group, TrainBatch
from rlhf.learner.annotate import Share
from rlhf.learner.build import build_critic_engine
from rlhf.learner.collate import collate
from rlhf.learner.plan import Unit, count_of, minibatches, plan, units_of
from rlhf.learner.reach import GradientReach
from rlhf.learner.schedule import steps_before
from rlhf.learner.state import CRITIC_FOLDER, LEARNER_FILE
from rlhf.learner.step import optimizer_step
from rlhf.metrics import Metrics


class CriticLearner:
    """V_t, what is still to come before token t, learnt from the returns.

    meeting_point, host:port of rank 0 for world_size > 1. Every public method is collective.
    """

    def __init__(
        self,
        config: RunConfig,
        algorithm: ActorCriticAlgorithm,
        rank: int,
        world_size: int,
        meeting_point: str | None,
    ) -> None:
        if not isinstance(config.algorithm, PpoConfig):
            raise TypeError(f"algorithm.name={config.algorithm.name} has no critic")
        self._config, self._value_loss = config, algorithm.value_loss
        self._rank, self._world_size, self._meeting_point = rank, world_size, meeting_point
        self._settings = config.learner.model_copy(update={"lr": config.algorithm.critic.lr})
        self._version = 0

    @property
    def version(self) -> int:
        """Updates so far, skipped ones included: the policy's version, which it learns from."""
        return self._version

    def setup(self) -> None:
        """Loads the model, starts the engine. Raises BadInput for a model that cannot have a scalar head."""
        settings = self._settings
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self._engine = build_critic_engine(self._config, settings, self._rank, self._world_size, self._meeting_point)
        self._reach = GradientReach(self._engine, updates=1)

    def annotate_share(self, groups: Sequence[Group]) -> list[Columns]:
        """Values for this rank's share of the groups: V_t (T,) a sample, read at the token before t."""
        share = Share(groups, self._rank, self._world_size)
        values = share.read(self._engine, self._settings)
        point("critic: values read")
        return share.columns({VALUES: values})

    def update(self, batch: TrainBatch) -> Metrics:
        """The policy's epochs x minibatches; every optimizer step divides its summed loss once, by the policy's count.

        A minibatch without tokens is no step, and counted by the policy's learner. Rows of data beside the samples
        have no returns and are left out. Metrics are pieces: merged over ranks they are exact.
        """
        point("critic: update begun")
        settings, units, parts = self._settings, units_of(batch.rows), []
        for epoch in range(settings.epochs):
            drawn = minibatches(len(units), settings.minibatches, self._config.seed, self._version, epoch)
            for number, members in enumerate(drawn):
                done = steps_before(settings, self._version, epoch, number)
                parts.append(self._optimize([units[i] for i in members], batch, done))
        self._version += 1
        point("critic: update done")
        return metrics.merge(parts)

    def save(self, folder: Path) -> None:
        """Writes parameters and optimizer state into trainer/critic/ of a checkpoint; its version is the policy's."""
        own = folder / "trainer" / CRITIC_FOLDER
        own.mkdir(parents=True, exist_ok=True)
        self._engine.save(own)
        point("critic: state written")

    def load(self, folder: Path) -> None:
        """Goes on where `save` stopped, whatever engine and number of ranks wrote it.

        Raises BadInput for a checkpoint without a critic, or with that of another model."""
        trainer = folder / "trainer"
        if not (trainer / CRITIC_FOLDER).is_dir():
            raise BadInput(
                f"{trainer} was saved by another algorithm: it has no {CRITIC_FOLDER}/, and "
                f"{self._config.algorithm.name} has a critic. Start a new run with model.name={folder / 'policy'}"
            )
        self._engine.load(trainer / CRITIC_FOLDER)
        self._version = json.loads((trainer / LEARNER_FILE).read_text())["version"]

    def offload(self) -> None:
        """As the policy's."""
        self._engine.offload()

    def reload(self) -> None:
        self._engine.reload()

    def close(self) -> None:
        """Leaves the process group, where it is its own, and drops gradients."""
        self._engine.close()

    def _optimize(self, units: Sequence[Unit], batch: TrainBatch, done: int) -> Metrics:
        """One optimizer step over these units on all ranks."""
        count, columns = count_of(units, batch.normalizer), sorted(batch.rows[0].tokens)
        if count == 0:
            return {}
        settings = self._settings
        planned = plan(units, self._world_size, settings.tokens_per_microbatch, packed=settings.packing)
        parts = [self._accumulate(micro, columns, count) for micro in planned[self._rank]]
        stepped = optimizer_step(self._engine, self._reach, settings, done, self._config.loop.num_steps, "value/")
        if stepped is None:
            return {"faults/nonfinite_step": metrics.total(1)} if self._rank == 0 else {}
        if self._rank == 0:
            parts.append(stepped)
        return metrics.merge(parts)

    def _accumulate(self, micro: Sequence[Unit], columns: Sequence[str], count: int) -> Metrics:
        """Adds one micro-batch's gradient, divided by the global count, and says what was seen on the way."""
        collated = collate(micro, columns, packed=self._settings.packing).to(self._engine.device)
        sums = self._value_loss(collated.scores(*self._engine.forward(collated.inputs)), collated.batch)
        self._engine.backward(sums.loss / count)
        return {name: metrics.mean(float(value), float(over)) for name, (value, over) in sums.means.items()}
