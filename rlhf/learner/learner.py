"""One rank of the policy's owner. All ranks are called with the same arguments, in the same order.

It knows the algorithm as two functions and the engine as a protocol. It draws no random numbers but the seeded order of
minibatches and the seeded start of adapters, so there is no generator to save.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf import metrics
from rlhf.algorithms import ActorCriticAlgorithm, Algorithm, RunState, ScoreAlgorithm, mix
from rlhf.chaos.points import point
from rlhf.config import RunConfig
from rlhf.errors import BadInput
from rlhf.experience import (
    BEHAVIOR_LOGPROBS,
    OLD_LOGPROBS,
    REF_LOGPROBS,
    Columns,
    Floats,
    Group,
    MixedBatch,
    TrainBatch,
)
from rlhf.learner.annotate import Share
from rlhf.learner.build import build_engine
from rlhf.learner.collate import Collated, collate
from rlhf.learner.export import published_tensors, save_adapter, save_policy
from rlhf.learner.judged import judged
from rlhf.learner.mismatch import mismatch, staleness
from rlhf.learner.plan import Unit, count_of, minibatches, plan, units_of
from rlhf.learner.reach import GradientReach
from rlhf.learner.schedule import steps_before
from rlhf.learner.state import CRITIC_FOLDER, LEARNER_FILE
from rlhf.learner.step import optimizer_step
from rlhf.metrics import Metrics
from rlhf.models.load import load_tokenizer
from rlhf.models.policy import PolicyModel, probe_inputs
from rlhf.ops.microbatch import LossSums, MicroBatch, Outputs
from rlhf.passes import needs_old_logprobs
from rlhf.weights import Probe, Weights, pack, probe_ids


class _Pass(NamedTuple):
    """A micro-batch that went through the model."""

    batch: MicroBatch
    outputs: Outputs | None  # None of a model with a scalar head
    loss: Tensor
    measured: Metrics


_Loss = Callable[[Collated], tuple[Outputs | None, LossSums]]


class _Drawn(NamedTuple):
    """Units that take part in an optimizer step, the batch that they are of, their loss and its weight."""

    units: Sequence[Unit]
    batch: TrainBatch
    loss: _Loss
    coef: float

    @property
    def divisor(self) -> int:
        """What their summed loss is divided by."""
        return count_of(self.units, self.batch.normalizer)

    def minibatches(self, parts: int, run_seed: int, step: int, epoch: int) -> list["_Drawn"]:
        chosen = minibatches(len(self.units), parts, run_seed, step, epoch)
        return [self._replace(units=[self.units[i] for i in members]) for members in chosen]


class PolicyLearner:
    """Trains the policy: old log-probs, credit assignment, optimizer steps, publication, checkpoints.

    It trains no critic (`rlhf/learner/critic.py`). meeting_point, host:port of rank 0 for world_size > 1. Every public
    method but `prepare` is collective.
    """

    def __init__(
        self,
        config: RunConfig,
        algorithm: Algorithm | ActorCriticAlgorithm | ScoreAlgorithm,
        rank: int,
        world_size: int,
        meeting_point: str | None,
    ) -> None:
        self._config, self._algorithm = config, algorithm
        self._rank, self._world_size, self._meeting_point = rank, world_size, meeting_point
        self._version = 0
        self._state: RunState = algorithm.initial_state
        self._next_state: RunState = self._state
        self._measured: Metrics = {}
        self._mix = mix.build(config)
        self._fills_old = not isinstance(algorithm, ScoreAlgorithm) and needs_old_logprobs(config)
        self._fills_reference = config.model.lora is not None and REF_LOGPROBS in algorithm.needs

    @property
    def version(self) -> int:
        """Updates so far, skipped ones included."""
        return self._version

    def setup(self) -> None:
        """Loads model and tokenizer, starts the engine. Raises BadInput for a model or setting that cannot work."""
        config = self._config
        if config.learner.threads is not None:
            torch.set_num_threads(config.learner.threads)
        self._tokenizer = load_tokenizer(config.model.name, trust_remote_code=config.model.trust_remote_code)
        self._engine = build_engine(config, self._rank, self._world_size, self._meeting_point)
        self._reach = GradientReach(self._engine, updates=1 if config.model.lora is None else 2)

    def annotate_share(self, groups: Sequence[Group]) -> list[Columns]:
        """Columns for this rank's share of the groups: old log-probs and LoRA's reference log-probs, where needed."""
        self._measured = {}
        if not (self._fills_old or self._fills_reference):
            return []
        share = Share(groups, self._rank, self._world_size)
        filled: dict[str, dict[int, list[Floats]]] = {}
        if self._fills_old:
            filled[OLD_LOGPROBS] = share.read(self._engine, self._config.learner)
            self._measured = share.mismatch(filled[OLD_LOGPROBS], self._version)
        if self._fills_reference:
            with self._policy.without_adapter():
                filled[REF_LOGPROBS] = share.read(self._engine, self._config.learner)
        point("annotate: done")
        return share.columns(filled)

    def prepare(self, groups: Sequence[Group]) -> TrainBatch:
        """The algorithm's credit assignment; what it carries to the next step takes effect with the next `update`."""
        sampled, rows = (groups, []) if self._mix is None else mix.apart(groups)
        batch, self._next_state = self._algorithm.prepare(sampled, self._state)
        measured = {**batch.metrics, **staleness(groups, self._version), **judged(groups)}
        if self._mix is None:
            return replace(batch, metrics=measured)
        beside = self._mix.prepare(rows)
        return MixedBatch(batch.rows, batch.normalizer, {**measured, **beside.metrics}, beside)

    def update(self, batch: TrainBatch) -> Metrics:
        """Epochs x minibatches; every optimizer step divides its summed loss once, by a count over all ranks.

        Metrics are pieces: merged over ranks they are exact. The version counts up even when a step was skipped.
        """
        point("update: begun")
        settings = self._config.learner
        batches = [_Drawn(units_of(batch.rows), batch, self._loss, 1.0)]
        if isinstance(batch, MixedBatch) and self._mix is not None:
            batches.append(_Drawn(units_of(batch.beside.rows), batch.beside, self._loss_of_rows, self._mix.coef))
        parts = [self._measured, batch.metrics if self._rank == 0 else {}]
        if not any(drawn.units for drawn in batches) and self._rank == 0:
            parts.append({"faults/empty_minibatch": metrics.total(1)})
        for epoch in range(settings.epochs):
            cut = [
                drawn.minibatches(settings.minibatches, self._config.seed, self._version, epoch) for drawn in batches
            ]
            for number in range(max(map(len, cut))):
                done = steps_before(settings, self._version, epoch, number)
                drawn = [own[number] for own in cut if number < len(own)]
                parts.append(self._optimize(drawn, done))
        self._version += 1
        self._state = self._next_state
        self._measured = {}
        point("update: done")
        return metrics.merge(parts)

    def evaluate(self, groups: Sequence[Group]) -> Metrics:
        """What the loss measures of these groups under the current weights, merged over ranks by the caller.

        Nothing is trained and no state changes. The groups must have all columns that the algorithm needs.
        """
        batch, _ = self._algorithm.prepare(groups, self._state)
        settings, columns = self._config.learner, sorted(batch.rows[0].tokens) if batch.rows else []
        planned = plan(units_of(batch.rows), self._world_size, settings.tokens_per_microbatch, packed=settings.packing)
        parts = [dict(batch.metrics) if self._rank == 0 else {}]
        with torch.no_grad():
            parts += [self._measure(micro, columns, self._loss).measured for micro in planned[self._rank]]
        return metrics.merge(parts)

    def publish(self) -> Weights | None:
        """The current version, with the learner's own log-probs (or scores) of the probe; None on ranks above 0."""
        logprobs = self._probe()
        if self._rank > 0:
            for _ in published_tensors(self._engine):
                pass
            return None
        vocabulary = self._engine.policy.base.config.vocab_size
        weights = pack(self._version, published_tensors(self._engine), Probe(probe_ids(vocabulary), logprobs))
        point("publish: packed")
        return weights

    def save(self, folder: Path) -> None:
        """Writes policy/ (loads with from_pretrained), adapter/ (LoRA) and trainer/ into an existing folder.

        trainer/critic/ is the critic's own."""
        save_policy(self._engine, self._tokenizer, folder / "policy", write=self._rank == 0)
        save_adapter(self._engine, folder / "adapter", write=self._rank == 0)
        point("save: policy written")
        trainer = folder / "trainer"
        trainer.mkdir(exist_ok=True)
        self._engine.save(trainer)
        if self._rank == 0:
            (trainer / LEARNER_FILE).write_text(
                json.dumps(
                    {"version": self._version, "run_state": dict(self._state), "saved_by": self._layout}, indent=1
                )
            )

    def load(self, folder: Path) -> None:
        """Goes on where `save` stopped, whatever engine and number of ranks wrote it.

        Bitwise with the same layout; with another one sums are taken in another order. Raises BadInput for the state
        of another model or algorithm.
        """
        trainer = folder / "trainer"
        state = json.loads((trainer / LEARNER_FILE).read_text())
        carried = self._algorithm.initial_state.keys()
        has_critic = isinstance(self._algorithm, ActorCriticAlgorithm)
        if state["run_state"].keys() != carried or (trainer / CRITIC_FOLDER).is_dir() != has_critic:
            raise BadInput(
                f"{trainer} was saved by another algorithm: it carries {sorted(state['run_state'])} from step to step, "
                f"{self._config.algorithm.name} carries {sorted(carried)} and has "
                f"{'a' if has_critic else 'no'} critic. Start a new run with "
                f"model.name={folder / 'policy'}"
            )
        self._engine.load(trainer)
        self._version, self._state = state["version"], state["run_state"]
        self._next_state, self._measured = self._state, {}

    def offload(self) -> None:
        """Gives the GPU up: until `reload` model and optimizer are in the host's memory, and nothing else works."""
        self._engine.offload()

    def reload(self) -> None:
        """Takes the GPU back, bit for bit."""
        self._engine.reload()

    def close(self) -> None:
        """Leaves the process group and drops gradients."""
        self._engine.close()

    @property
    def _layout(self) -> dict[str, int | str]:
        """For people who look into a checkpoint; loading does not depend on it."""
        learner = self._config.learner
        stage = {"zero_stage": learner.zero_stage} if learner.engine == "deepspeed" else {}
        return {"engine": learner.engine, "ranks": self._world_size, "dtype": learner.dtype, **stage}

    @property
    def _policy(self) -> PolicyModel:
        if not isinstance(self._engine.policy, PolicyModel):
            raise TypeError(f"a {type(self._engine.policy).__name__} has no log-probabilities")
        return self._engine.policy

    def _loss(self, collated: Collated) -> tuple[Outputs | None, LossSums]:
        """One forward pass and the algorithm's sums; a model with a scalar head has no log-probabilities to show."""
        answers = self._engine.forward(collated.inputs)
        if isinstance(self._algorithm, ScoreAlgorithm):
            return None, self._algorithm.loss(collated.scores(*answers), collated.batch)
        outputs = collated.outputs(*answers)
        return outputs, self._algorithm.loss(outputs, collated.batch)

    def _loss_of_rows(self, collated: Collated) -> tuple[None, LossSums]:
        """The same for rows of data beside the samples; entropy and mismatch are the samples' alone."""
        assert self._mix is not None  # only a run that mixes has such rows
        return None, self._mix.loss(collated.outputs(*self._engine.forward(collated.inputs)), collated.batch)

    def _probe(self) -> Floats:
        inputs = probe_inputs(self._engine.policy.base.config)
        with torch.no_grad():
            answers = self._engine.forward(inputs.to(self._engine.device))
        return answers[0].cpu().numpy().astype(np.float32)

    def _optimize(self, batches: Sequence["_Drawn"], done: int) -> Metrics:
        """One optimizer step over these units on all ranks: each batch's summed loss over its own count."""
        settings = self._config.learner
        counted = [drawn for drawn in batches if drawn.divisor]
        if not counted:
            return {"faults/empty_minibatch": metrics.total(1)} if self._rank == 0 else {}
        first_pass = done % (settings.epochs * settings.minibatches) == 0 and not self._fills_old
        parts = []
        for drawn in counted:
            planned = plan(drawn.units, self._world_size, settings.tokens_per_microbatch, packed=settings.packing)
            parts += [self._accumulate(micro, drawn, measure=first_pass) for micro in planned[self._rank]]
        stepped = optimizer_step(self._engine, self._reach, settings, done, self._config.loop.num_steps, "")
        if stepped is None:
            return {"faults/nonfinite_step": metrics.total(1)} if self._rank == 0 else {}
        if self._rank == 0:
            parts.append(stepped)
        return metrics.merge(parts)

    def _accumulate(self, micro: Sequence[Unit], drawn: "_Drawn", *, measure: bool) -> Metrics:
        """Adds one micro-batch's gradient, divided by the global count, and says what was seen on the way."""
        columns = sorted(drawn.batch.rows[0].tokens)
        batch, outputs, loss, measured = self._measure(micro, columns, drawn.loss)
        self._engine.backward(drawn.coef * loss / drawn.divisor)
        measured["tokens/trained"] = metrics.total(int(batch.mask.sum()))
        if measure and outputs is not None and BEHAVIOR_LOGPROBS in columns:
            measured |= mismatch(outputs.logprobs, batch.tokens[BEHAVIOR_LOGPROBS], batch.mask)
        return measured

    def _measure(self, micro: Sequence[Unit], columns: Sequence[str], loss: "_Loss") -> _Pass:
        """One forward pass: the micro-batch as tensors, its summed loss, and what was seen on the way."""
        collated = collate(micro, columns, packed=self._config.learner.packing).to(self._engine.device)
        batch = collated.batch
        outputs, sums = loss(collated)
        measured = {name: metrics.mean(float(value), float(over)) for name, (value, over) in sums.means.items()}
        if outputs is not None:
            measured["entropy"] = metrics.mean(float(outputs.entropy[batch.mask].sum()), int(batch.mask.sum()))
        return _Pass(batch, outputs, sums.loss, measured)
