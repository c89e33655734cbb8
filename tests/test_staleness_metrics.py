"""How the age of samples and the idle time of engines are measured, logged and drawn. Not covered: TensorBoard's files
(every metric is a scalar there), engines on Ray."""

import re
from dataclasses import replace

import numpy as np
import pytest

from rlhf.admission import IdleClock
from rlhf.experience import Group
from rlhf.learner.mismatch import AGES, staleness
from rlhf.metrics import merge, values
from rlhf.ui.report import page


def aged(rollout, versions):
    """A group whose samples were drawn at these versions, the last token of each by the newest of them."""
    group = rollout(0, 0, len(versions), 3, {})
    samples = [
        replace(sample, versions=np.append(np.full(len(sample.token_ids) - 1, version), max(versions)).astype(np.int32))
        for sample, version in zip(group.samples, versions, strict=True)
    ]
    return replace(group, samples=tuple(samples))


def test_histogram_by_the_oldest_token(rollout):
    """Ages 0, 1, 1, 2, 4, 8, 9, 20 fall into their bins; a sample is as old as its oldest token (trap 56)."""
    ages = [0, 1, 1, 2, 4, 8, 9, 20]
    measured = values(staleness([aged(rollout, [30 - age for age in ages])], 30))
    assert [measured[name] for _, _, name in AGES] == [1 / 8, 2 / 8, 1 / 8, 1 / 8, 1 / 8, 2 / 8]
    assert measured["staleness/mean"] == np.mean(ages) and measured["staleness/max"] == 20


def test_shares_of_every_age_add_up_to_one_and_merge_by_samples(rollout):
    """No age falls between two bins. Two ranks with 1 and 3 samples: shares of all four."""
    for age in range(40):
        measured = values(staleness([aged(rollout, [50 - age])], 50))
        assert sum(measured[name] for _, _, name in AGES) == 1
    parts = [staleness([aged(rollout, versions)], 5) for versions in ([5], [4, 4, 3])]
    assert values(merge(parts))["staleness/fraction_1"] == 0.5


def test_data_that_no_policy_sampled_has_no_age(rollout):
    group = rollout(0, 0, 2, 3, {})
    given = tuple(replace(sample, versions=None, behavior_logprobs=None) for sample in group.samples)
    assert staleness([Group(group.prompt, given, "dataset")], 7) == {}


def test_idle_seconds_add_up_although_work_is_booked_when_it_is_handed_in():
    """Two engines for 10 s each interval; one works 30 s on end, handed in at its end in the third interval."""
    clock = IdleClock()
    assert clock.read(100.0, 2, 0.0) == 0.0
    found = [clock.read(100.0 + 10 * n, 2, busy) for n, busy in enumerate((0.0, 0.0, 30.0, 0.0), start=1)]
    assert found == [20.0, 20.0, 0.0, 10.0]
    assert sum(found) == 4 * 2 * 10 - 30


def rows(shares):
    names = [name for _, _, name in AGES]
    return [{"step": step, **dict(zip(names, row, strict=True))} for step, row in enumerate(shares)]


def test_report_draws_the_ages_as_bands_that_fill_the_figure():
    """Two bins are seen, so two bands: the upper edge of the lower is the lower edge of the upper."""
    text = page("run", rows([[1, 0, 0, 0, 0, 0], [0.25, 0.75, 0, 0, 0, 0]]), [], "", {})
    bands = re.findall(r'<polygon class="(g\d)" points="([^"]+)"', text)
    assert [css for css, _ in bands] == ["g0", "g1"]
    edges = [[tuple(map(float, point.split(","))) for point in points.split()] for _, points in bands]
    assert edges[0][:2] == edges[1][:1:-1]
    top, bottom = min(y for _, y in edges[1]), max(y for _, y in edges[0])
    assert edges[0][1][1] == pytest.approx(bottom - 0.25 * (bottom - top), abs=0.1)


def test_report_of_a_run_without_stale_samples_has_no_such_chart():
    assert "Age of samples" not in page("run", rows([[1, 0, 0, 0, 0, 0]] * 3), [], "", {})
