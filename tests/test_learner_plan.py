"""Which rows go where, over all small sizes; the learning rate's addresses. Not covered: how balanced the split is."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config import LearnerConfig
from rlhf.experience import Row
from rlhf.learner.plan import Unit, count_of, microbatches, minibatches, plan, units_of
from rlhf.learner.schedule import learning_rate


def row(unit: int, prompt: int, completion: int) -> Row:
    ids = np.zeros(completion, np.int32)
    return Row(unit, np.zeros(prompt, np.int32), ids, np.arange(completion) % 2 == 0, 1.0, {})


unit_lists = st.lists(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=3), max_size=40)


@settings(max_examples=200, deadline=None)
@given(unit_lists, st.integers(1, 8), st.integers(1, 200), st.booleans())
def test_every_unit_is_planned_once_whole_and_all_ranks_make_as_many_passes(
    lengths: list[list[tuple[int, int]]], ranks: int, budget: int, packed: bool
) -> None:
    """Traps 44 and 75, for up to 40 units on up to 8 ranks; the budget holds but for a unit that is over it alone."""
    units = [Unit(tuple(row(i, p, c) for p, c in members)) for i, members in enumerate(lengths)]
    planned = plan(units, ranks, budget, packed=packed)
    assert len(planned) == ranks
    assert len({len(batches) for batches in planned}) == 1
    flat = [unit for batches in planned for batch in batches for unit in batch]
    assert sorted(id(unit) for unit in flat) == sorted(id(unit) for unit in units)
    for batches in planned:
        for batch in batches:
            sizes = [length for unit in batch for length in unit.lengths]
            cost = (sum(sizes) if packed else len(sizes) * max(sizes)) if sizes else 0
            assert cost <= budget or len(batch) == 1


def test_five_rows_on_four_ranks_are_two_passes_each_at_most() -> None:
    """OpenRLHF's case: ceil-chunks give 2, 2, 1, 0. Here the empty places are fillers."""
    units = [Unit((row(i, 4, 6),)) for i in range(5)]
    planned = plan(units, 4, 10, packed=False)
    assert sorted(len([batch for batch in batches if batch]) for batches in planned) == [1, 1, 1, 2]
    assert {len(batches) for batches in planned} == {2}


def test_rows_of_a_unit_stay_together() -> None:
    """A pair over the budget has a micro-batch of its own."""
    rows = [row(0, 4, 6), row(0, 4, 50), row(1, 4, 6), row(3, 1, 1)]
    units = units_of(rows)
    assert [len(unit.rows) for unit in units] == [2, 1, 1]
    assert [len(batch) for batch in microbatches(units, 25, packed=False)] == [1, 2]


def test_minibatches_have_an_order_of_their_own_each_step_and_epoch() -> None:
    """A partition, repeatable from the address, different between addresses; few units make few minibatches."""
    first = minibatches(16, 4, 1, 0, 0)
    assert sorted(i for part in first for i in part) == list(range(16))
    assert first == minibatches(16, 4, 1, 0, 0)
    assert (
        len({str(minibatches(16, 4, seed, step, epoch)) for seed in (1, 2) for step in (0, 1) for epoch in (0, 1)}) == 8
    )
    assert minibatches(3, 1, 1, 5, 0) == [[0, 1, 2]]
    assert len(minibatches(3, 8, 1, 0, 0)) == 3
    assert minibatches(0, 4, 1, 0, 0) == []


def test_counts_of_units_rows_and_trained_tokens() -> None:
    """By hand: masks are true at even positions."""
    units = [Unit((row(0, 2, 5), row(0, 2, 4))), Unit((row(1, 2, 0),))]
    assert [count_of(units, by) for by in ("units", "rows", "tokens")] == [2, 3, 5]


@pytest.mark.parametrize(
    ("schedule", "last"), [("constant", 1.0), ("linear", 1 / 8), ("cosine", (1 + math.cos(math.pi * 7 / 8)) / 2)]
)
def test_rate_rises_from_above_zero_and_ends_where_the_schedule_says(schedule: str, last: float) -> None:
    """Trap 69: by address, so a resume or a skipped step cannot shift it. 2 warm-up steps of 10."""
    config = LearnerConfig.model_validate({"lr": 1.0, "schedule": schedule, "warmup_steps": 2})
    rates = [learning_rate(config, done, 10) for done in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[-1] == pytest.approx(last, abs=1e-12)
    assert all(rate > 0 for rate in rates)
