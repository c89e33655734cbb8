"""What a step trains on: prompts, samples, units, minibatches, micro-batches; by the learner's own planning, with
lengths in place of rows.

How often the learner passes and steps is decided by `rlhf.learner.plan`, which is called here. Lengths are assumed,
so the number of micro-batches is that of a step whose answers have them; where groups are dropped there are fewer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.config import (
    DpoConfig,
    OnlineDpoConfig,
    RaftConfig,
    RecordKind,
    RewardModelConfig,
    RsoConfig,
    RunConfig,
)
from rlhf.experience import Row
from rlhf.learner.plan import Unit, minibatches, plan

RowLengths = tuple[int, int]  # tokens of a prompt, of its completion
UnitLengths = tuple[RowLengths, ...]  # rows that stay together


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a prompt, of a completion on average, and of the longest completion of a step."""

    prompt: int
    mean: int
    longest: int


@dataclass(frozen=True, slots=True)
class DataSize:
    """What the data has, by its rows alone: prompts of an epoch, and the answers of the row that has most (1 where
    prompts have none)."""

    prompts: int
    answers: int


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """What one optimizer step takes: sequences in it, those of the fullest rank, micro-batches that every rank makes,
    and the tokens, padding included, of the largest one."""

    sequences: int
    sequences_of_a_rank: int
    microbatches: int
    largest_microbatch: int


@dataclass(frozen=True, slots=True)
class Batches:
    """The batch arithmetic of a run. A step is one policy update, and has optimizer_steps_per_step optimizer steps.

    units_per_step, what the loss and the minibatches count (a pair is one), data rows beside samples included.
    sequences_per_optimizer_step is the global batch of the largest minibatch; microbatches_per_optimizer_step,
    the accumulation of the deepest one. prompts_in_data are those of one epoch; over the limits on length none is left
    out here, because no tokenizer is loaded.
    """

    steps: int
    prompts_per_step: int
    rows_of_data_per_step: int
    samples_per_prompt: int
    samples_per_step: int
    units_per_step: int
    sequences_per_step: int
    epochs: int
    minibatches: int
    optimizer_steps_per_step: int
    optimizer_steps: int
    sequences_per_optimizer_step: int
    ranks: int
    sequences_per_rank: int
    microbatches_per_optimizer_step: int
    microbatches_per_step: int
    largest_microbatch_tokens: int
    prompts_in_data: int
    steps_per_epoch: float
    prompts_used: int
    epochs_of_data: float


def batches(config: RunConfig, ranks: int, lengths: Lengths, data: DataSize) -> Batches:
    """The arithmetic of a run whose completions all have the mean length, and whose rows all have as many answers."""
    loop, learner, mix = config.loop, config.learner, config.mix
    beside = 0 if mix is None else mix.rows_per_step
    prompts = loop.groups_per_step - beside
    sampled, rows = step_units(config, lengths, data.answers)
    taken = optimizer_steps(config, sampled, rows, ranks, step=0)
    used = loop.num_steps * prompts
    return Batches(
        steps=loop.num_steps,
        prompts_per_step=prompts,
        rows_of_data_per_step=beside,
        samples_per_prompt=config.algorithm.samples_per_prompt,
        samples_per_step=prompts * config.algorithm.samples_per_prompt if config.records == "prompts" else 0,
        units_per_step=len(sampled) + len(rows),
        sequences_per_step=sum(len(unit) for unit in [*sampled, *rows]),
        epochs=learner.epochs,
        minibatches=learner.minibatches,
        optimizer_steps_per_step=len(taken),
        optimizer_steps=len(taken) * loop.num_steps,
        sequences_per_optimizer_step=max(step.sequences for step in taken),
        ranks=ranks,
        sequences_per_rank=max(step.sequences_of_a_rank for step in taken),
        microbatches_per_optimizer_step=max(step.microbatches for step in taken),
        microbatches_per_step=sum(step.microbatches for step in taken),
        largest_microbatch_tokens=max(step.largest_microbatch for step in taken),
        prompts_in_data=data.prompts,
        steps_per_epoch=data.prompts / prompts,
        prompts_used=used,
        epochs_of_data=used / data.prompts,
    )


def step_units(config: RunConfig, lengths: Lengths, answers: int) -> tuple[list[UnitLengths], list[UnitLengths]]:
    """The units that a step trains on, of prompts and of rows of data beside them, all of the same length. answers, of
    each row of a run on data."""
    beside = 0 if config.mix is None else config.mix.rows_per_step
    prompts = config.loop.groups_per_step - beside
    row = (lengths.prompt, lengths.mean)
    if config.records == "prompts":
        return _units_of_prompts(config, prompts, row), _units_of_rows(config.mixed_records, beside, row)
    return _units_of_data(config, prompts, row, answers), []


def optimizer_steps(
    config: RunConfig, sampled: Sequence[UnitLengths], rows: Sequence[UnitLengths], ranks: int, step: int
) -> list[OptimizerStep]:
    """The optimizer steps of a step (epochs x minibatches), for units of any lengths, in the learner's order."""
    learner, found = config.learner, []
    kinds = [_as_units(units) for units in (sampled, rows) if units]
    for epoch in range(learner.epochs):
        cut = [
            [
                [units[i] for i in members]
                for members in minibatches(len(units), learner.minibatches, config.seed, step, epoch)
            ]
            for units in kinds
        ]
        for number in range(max(map(len, cut))):
            found.append(_optimizer_step(config, [own[number] for own in cut if number < len(own)], ranks))
    return found


def _optimizer_step(config: RunConfig, drawn: Sequence[Sequence[Unit]], ranks: int) -> OptimizerStep:
    learner = config.learner
    planned = [plan(units, ranks, learner.tokens_per_microbatch, packed=learner.packing) for units in drawn]
    of_ranks = [
        sum(len(unit.rows) for held in planned for micro in held[rank] for unit in micro) for rank in range(ranks)
    ]
    sizes = [_tokens(micro, packed=learner.packing) for held in planned for micros in held for micro in micros]
    return OptimizerStep(sum(of_ranks), max(of_ranks), sum(len(held[0]) for held in planned), max(sizes))


def _units_of_prompts(config: RunConfig, prompts: int, row: RowLengths) -> list[UnitLengths]:
    """What an algorithm makes of so many prompts, when none of them is dropped and no two answers are equal."""
    algorithm = config.algorithm
    if isinstance(algorithm, OnlineDpoConfig):
        return [(row, row)] * prompts
    if isinstance(algorithm, RsoConfig):
        kept = algorithm.rejection.accept
        return [(row, row)] * (prompts * (kept // 2 if algorithm.pairing == "first_round" else kept - 1))
    if isinstance(algorithm, RaftConfig):
        return [(row,)] * prompts
    return [(row,)] * (prompts * algorithm.samples_per_prompt)


def _units_of_data(config: RunConfig, rows: int, row: RowLengths, answers: int) -> list[UnitLengths]:
    """What an algorithm makes of rows with so many answers each: a reward model scores all of them in one unit, DPO
    compares the best with the worst or each with each."""
    if isinstance(config.algorithm, RewardModelConfig):
        return [(row,) * answers] * rows
    if isinstance(config.algorithm, DpoConfig) and config.algorithm.compare == "all":
        return _units_of_rows(config.records, rows * (answers * (answers - 1) // 2), row)
    return _units_of_rows(config.records, rows, row)


def _units_of_rows(kind: RecordKind | None, rows: int, row: RowLengths) -> list[UnitLengths]:
    """Of the data: a demonstration is one sequence, a preference two; a comparison is read in both orders, as one text
    with both answers and one token behind it."""
    if kind == "comparisons":
        both = (row[0] + 2 * row[1], 1)
        return [(both, both)] * rows
    return [(row, row) if kind == "preferences" else (row,)] * rows


def _as_units(units: Sequence[UnitLengths]) -> list[Unit]:
    """Rows of zeros: only their lengths are looked at. Rows of a length share their memory."""
    made: dict[RowLengths, Row] = {}
    for lengths in {row for unit in units for row in unit}:
        prompt, completion = (np.zeros(length, dtype=np.int32) for length in lengths)
        made[lengths] = Row(0, prompt, completion, np.ones(lengths[1], dtype=np.bool_), 1.0, {})
    return [Unit(tuple(made[row] for row in unit)) for unit in units]


def _tokens(micro: Sequence[Unit], *, packed: bool) -> int:
    lengths = [length for unit in micro for length in unit.lengths]
    if not lengths:
        return 0
    return sum(lengths) if packed else len(lengths) * max(lengths)
