"""One rank of the policy's owner. All ranks are called with the same arguments, in the same order.

It knows the algorithm as two functions and the engine as a protocol. It draws no random numbers but the seeded order of
minibatches and the seeded start of adapters, so there is no generator to save.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf import metrics
from rlhf.algorithms import ActorCriticAlgorithm, Algorithm, RunState, ScoreAlgorithm
from rlhf.blueprint import needs_old_logprobs
from rlhf.config import RunConfig
from rlhf.errors import BadInput
from rlhf.experience import BEHAVIOR_LOGPROBS, OLD_LOGPROBS, REF_LOGPROBS, VALUES, Columns, Floats, Group, TrainBatch
from rlhf.learner.annotate import Share
from rlhf.learner.build import build_engine
from rlhf.learner.collate import Collated, collate
from rlhf.learner.critic import Critic
from rlhf.learner.export import published_tensors, save_adapter, save_policy
from rlhf.learner.mismatch import mismatch, staleness
from rlhf.learner.plan import Unit, count_of, minibatches, plan, units_of
from rlhf.learner.reach import GradientReach
from rlhf.learner.schedule import learning_rate
from rlhf.metrics import Metrics
from rlhf.models.load import load_tokenizer
from rlhf.models.policy import PolicyModel, probe_inputs
from rlhf.ops.microbatch import LossSums, MicroBatch, Outputs
from rlhf.weights import Probe, Weights, pack, probe_ids

STATE_FILE = "learner.json"


class _Pass(NamedTuple):
    """A micro-batch that went through the model."""

    batch: MicroBatch
    outputs: Outputs | None  # None of a model with a scalar head
    loss: Tensor
    measured: Metrics


class PolicyLearner:
    """Trains the policy, and its critic: old log-probs, credit assignment, optimizer steps, publication, checkpoints.

    meeting_point, host:port of rank 0 for world_size > 1. Every public method but `prepare` is collective.
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
        self._critic = None
        if isinstance(self._algorithm, ActorCriticAlgorithm):
            self._critic = Critic(config, self._algorithm.value_loss, self._rank, self._world_size)

    def annotate_share(self, groups: Sequence[Group]) -> list[Columns]:
        """Columns for this rank's share of the groups: old log-probs, LoRA's reference log-probs, and values, where
        needed."""
        self._measured = {}
        if not (self._fills_old or self._fills_reference or self._critic is not None):
            return []
        share = Share(groups, self._rank, self._world_size)
        filled: dict[str, dict[int, list[Floats]]] = {}
        if self._fills_old:
            filled[OLD_LOGPROBS] = share.read(self._engine, self._config.learner)
            self._measured = share.mismatch(filled[OLD_LOGPROBS], self._version)
        if self._fills_reference:
            with self._policy.without_adapter():
                filled[REF_LOGPROBS] = share.read(self._engine, self._config.learner)
        if self._critic is not None:
            filled[VALUES] = self._critic.values(share)
        return [
            Columns(groups[number].prompt.id, {}, {name: arrays[number] for name, arrays in filled.items()})
            for number in share.numbers
        ]

    def prepare(self, groups: Sequence[Group]) -> TrainBatch:
        """The algorithm's credit assignment; what it carries to the next step takes effect with the next `update`."""
        batch, self._next_state = self._algorithm.prepare(groups, self._state)
        return replace(batch, metrics={**batch.metrics, **staleness(groups, self._version)})

    def update(self, batch: TrainBatch) -> Metrics:
        """Epochs x minibatches; every optimizer step divides its summed loss once, by a count over all ranks.

        Metrics are pieces: merged over ranks they are exact. The version counts up even when a step was skipped.
        """
        settings = self._config.learner
        units = units_of(batch.rows)
        parts = [self._measured, batch.metrics if self._rank == 0 else {}]
        if not units and self._rank == 0:
            parts.append({"faults/empty_minibatch": metrics.total(1)})
        for epoch in range(settings.epochs):
            chosen = minibatches(len(units), settings.minibatches, self._config.seed, self._version, epoch)
            for number, members in enumerate(chosen):
                done = (self._version * settings.epochs + epoch) * settings.minibatches + number
                drawn = [units[i] for i in members]
                parts.append(self._optimize(drawn, batch, done))
                if self._critic is not None:
                    parts.append(self._critic.optimize(drawn, batch, done))
        self._version += 1
        self._state = self._next_state
        self._measured = {}
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
            parts += [self._measure(micro, columns).measured for micro in planned[self._rank]]
        return metrics.merge(parts)

    def publish(self) -> Weights | None:
        """The current version, with the learner's own log-probs (or scores) of the probe; None on ranks above 0."""
        logprobs = self._probe()
        if self._rank > 0:
            for _ in published_tensors(self._engine):
                pass
            return None
        vocabulary = self._engine.policy.base.config.vocab_size
        return pack(self._version, published_tensors(self._engine), Probe(probe_ids(vocabulary), logprobs))

    def save(self, folder: Path) -> None:
        """Writes policy/ (loads with from_pretrained), adapter/ (LoRA) and trainer/ into an existing folder."""
        save_policy(self._engine, self._tokenizer, folder / "policy", write=self._rank == 0)
        save_adapter(self._engine, folder / "adapter", write=self._rank == 0)
        trainer = folder / "trainer"
        trainer.mkdir(exist_ok=True)
        self._engine.save(trainer)
        if self._critic is not None:
            self._critic.save(trainer)
        if self._rank == 0:
            state = {"version": self._version, "run_state": dict(self._state), "world_size": self._world_size}
            (trainer / STATE_FILE).write_text(json.dumps(state | {"engine": self._config.learner.engine}, indent=1))

    def load(self, folder: Path) -> None:
        """Goes on where `save` stopped. Raises BadInput when it was saved by another engine or number of ranks."""
        trainer = folder / "trainer"
        state = json.loads((trainer / STATE_FILE).read_text())
        found = (state["engine"], state["world_size"])
        if found != (self._config.learner.engine, self._world_size):
            raise BadInput(
                f"{trainer} was saved by the {found[0]} engine on {found[1]} ranks; this run has "
                f"learner.engine={self._config.learner.engine} on {self._world_size}. Go on with the same, or start a "
                f"new run with model.name={folder / 'policy'}"
            )
        self._engine.load(trainer)
        if self._critic is not None:
            self._critic.load(trainer)
        self._version, self._state = state["version"], state["run_state"]
        self._next_state = self._state

    def close(self) -> None:
        """Leaves the process group and drops gradients."""
        if self._critic is not None:
            self._critic.close()
        self._engine.close()

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

    def _probe(self) -> Floats:
        inputs = probe_inputs(self._engine.policy.base.config.vocab_size)
        with torch.no_grad():
            answers = self._engine.forward(inputs.to(self._engine.device))
        return answers[0].cpu().numpy().astype(np.float32)

    def _optimize(self, units: Sequence[Unit], batch: TrainBatch, done: int) -> Metrics:
        """One optimizer step over these units on all ranks."""
        settings, columns = self._config.learner, sorted(batch.rows[0].tokens)
        count = count_of(units, batch.normalizer)
        if count == 0:
            return {"faults/empty_minibatch": metrics.total(1)} if self._rank == 0 else {}
        planned = plan(units, self._world_size, settings.tokens_per_microbatch, packed=settings.packing)
        first_pass = done % (settings.epochs * settings.minibatches) == 0 and not self._fills_old
        parts = [self._accumulate(micro, columns, count, measure=first_pass) for micro in planned[self._rank]]
        lr = learning_rate(settings, done, self._config.loop.num_steps * settings.epochs * settings.minibatches)
        step = self._engine.step(lr)
        if not step.applied:
            return {"faults/nonfinite_step": metrics.total(1)} if self._rank == 0 else {}
        self._reach.check(step.grad_norm)
        if self._rank == 0:
            parts.append({"grad_norm": metrics.mean(step.grad_norm, 1), "lr": metrics.last(lr)})
        return metrics.merge(parts)

    def _accumulate(self, micro: Sequence[Unit], columns: Sequence[str], count: int, *, measure: bool) -> Metrics:
        """Adds one micro-batch's gradient, divided by the global count, and says what was seen on the way."""
        batch, outputs, loss, measured = self._measure(micro, columns)
        self._engine.backward(loss / count)
        measured["tokens/trained"] = metrics.total(int(batch.mask.sum()))
        if measure and outputs is not None and BEHAVIOR_LOGPROBS in columns:
            measured |= mismatch(outputs.logprobs, batch.tokens[BEHAVIOR_LOGPROBS], batch.mask)
        return measured

    def _measure(self, micro: Sequence[Unit], columns: Sequence[str]) -> _Pass:
        """One forward pass: the micro-batch as tensors, its summed loss, and what was seen on the way."""
        collated = collate(micro, columns, packed=self._config.learner.packing).to(self._engine.device)
        batch = collated.batch
        outputs, sums = self._loss(collated)
        measured = {name: metrics.mean(float(value), float(over)) for name, (value, over) in sums.means.items()}
        if outputs is not None:
            measured["entropy"] = metrics.mean(float(outputs.entropy[batch.mask].sum()), int(batch.mask.sum()))
        return _Pass(batch, outputs, sums.loss, measured)
