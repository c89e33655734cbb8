"""Which row a prompt id stands for, and rows of the data as groups."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf.buffer.offline import Completion, dataset_group
from rlhf.buffer.samplers import order
from rlhf.buffer.store import ExperienceBuffer
from rlhf.errors import BadInput
from rlhf.experience import Prompt


def make_prompt(prompt_id: int) -> Prompt:
    return Prompt(prompt_id, prompt_id % 7, prompt_id // 7, "hi", "<hi>", np.array([1, 2], np.int32), {})


def test_offline_rows_enter_through_the_same_door(tmp_path: Path, plain):
    """A preference pair with ranks 0 and 1, complete at once, and a demonstration, which lacks the rank."""
    buffer = ExperienceBuffer(tmp_path / "experience.db", frozenset({"rank"}), None, 3)
    buffer.open()
    first, second = buffer.lease(2, "data", 0)
    ids, mask = np.array([4, 5, 2], np.int32), np.array([False, True, True])
    pair = dataset_group(make_prompt(0), [Completion(ids, mask, "good", 0), Completion(ids[1:], mask[1:], "bad", 1)])
    demonstration = dataset_group(make_prompt(1), [Completion(ids, mask, "so", None)])
    assert buffer.add_group(0, first.ticket, pair) and buffer.add_group(1, second.ticket, demonstration)
    assert buffer.ready(100) == 1 and buffer.unjudged() == {1: frozenset({"rank"})}
    (back,) = buffer.take(0, 1)
    assert plain(back) == plain(pair) and back.policy_version is None
    assert [s.scores for s in back.samples] == [{"rank": 0.0}, {"rank": 1.0}]
    buffer.close()
    assert all(s.finish_reason == "given" and s.sampling is None and s.seed is None for s in back.samples)


def test_offline_rows_that_make_no_group_are_named():
    prompt = make_prompt(8)
    ids, mask = np.array([4], np.int32), np.ones(1, np.bool_)
    whole, empty = Completion(ids, mask, "a", 0), Completion(ids[:0], mask[:0], "", 1)
    for completions, message in (
        ([], "no completion"),
        ([whole, empty], "completion 1 has no tokens"),
        ([whole, replace(whole, rank=None)], "1 of 2 completions are ranked"),
    ):
        with pytest.raises(BadInput, match=rf"row 1 \(prompt 8\): {message}"):
            dataset_group(prompt, completions)


def test_row_order_visits_every_row_once_an_epoch():
    """Every epoch is a permutation, and epochs and seeds differ. The words of PCG64 are checked by a literal below."""
    places = [order(5, 10, prompt_id, shuffle=True) for prompt_id in range(40)]
    epochs = [[row for epoch, row in places if epoch == e] for e in range(4)]
    assert all(sorted(rows) == list(range(10)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 4
    assert epochs[0] != [order(6, 10, i, shuffle=True)[1] for i in range(10)]
    assert [order(5, 3, i, shuffle=False) for i in range(7)] == [(i // 3, i % 3) for i in range(7)]


def test_row_order_is_the_same_in_every_process_and_leaves_the_global_generator_alone():
    """A literal, so that a change of the rule, which would break every resumed run, is noticed."""
    before = np.random.get_state()[1].copy()
    assert [order(0, 8, i, shuffle=True)[1] for i in range(8)] == ORDER_OF_SEED_0
    assert [order(0, 8, i, shuffle=True)[1] for i in reversed(range(8))] == ORDER_OF_SEED_0[::-1]
    assert np.array_equal(before, np.random.get_state()[1])


ORDER_OF_SEED_0 = [5, 6, 4, 0, 1, 2, 7, 3]


def test_row_order_is_uniform():
    """All 6 orders of 3 rows in 6,000 epochs: chi-square below 20.5 (p = 0.001, 5 degrees of freedom); fixed seed."""
    seen: dict[tuple[int, ...], int] = {}
    for epoch in range(6000):
        rows = tuple(order(1, 3, epoch * 3 + i, shuffle=True)[1] for i in range(3))
        seen[rows] = seen.get(rows, 0) + 1
    assert len(seen) == 6 and sum((n - 1000) ** 2 / 1000 for n in seen.values()) < 20.5


def test_row_order_refuses_an_empty_data_set():
    with pytest.raises(BadInput, match="0 rows"):
        order(0, 0, 0, shuffle=True)
    with pytest.raises(ValueError, match="negative"):
        order(0, 3, -1, shuffle=True)
