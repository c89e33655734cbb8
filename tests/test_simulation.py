"""The simulated pool against hand arithmetic, a simulation step by step, and its own bound; it runs the real loop.

Not covered: agreement with real engines (test_staleness_ray), engines of unequal speed, failures.
"""

import random

import pytest

from rlhf.simulation.engines import EngineCost, Timeline, finish_times
from rlhf.simulation.pool import StepCost, Workload, longest_bound, simulate

COST = EngineCost(step_s=0.01, sequence_s=0.001, prompt_token_s=0.002, max_sequences=4, continuous=True, load_s=0.5)
IN_TURN = EngineCost(step_s=0.01, sequence_s=0.001, prompt_token_s=0.002, max_sequences=4, continuous=False, load_s=0.5)
REST = StepCost(update_s=2.0, publish_s=0.25, judge_group_s=0.0, annotate_s=0.0, store_s=0.0)
LONG_TAIL = Workload(16, 4, 10, 100.0, 1.0, 2000, 7)


def step_by_step(cost, lengths, prompt_tokens):
    """An independent reference: one decoding step after the other, every sequence a counter."""
    waiting = [[group, length] for group, own in enumerate(lengths) for length in own]
    running, now, finished = [], 0.0, {}
    while waiting or running:
        while waiting and len(running) < cost.max_sequences:
            running.append(waiting.pop(0))
            now += cost.prompt_token_s * prompt_tokens[running[-1][0]]
        now += cost.step_s + cost.sequence_s * len(running)
        for sequence in running:
            sequence[1] -= 1
        running = [sequence for sequence in running if sequence[1] > 0]
        for group in range(len(lengths)):
            if group not in finished and not any(s[0] == group for s in running + waiting):
                finished[group] = now
    return [finished[group] for group in range(len(lengths))]


@pytest.mark.parametrize("seed", range(5))
def test_continuous_engine_equals_a_simulation_step_by_step(seed):
    """Random groups, more sequences than fit at once."""
    draw = random.Random(seed)
    lengths = [[draw.randint(1, 40) for _ in range(draw.randint(1, 4))] for _ in range(draw.randint(1, 6))]
    prompts = [draw.randint(1, 9) for _ in lengths]
    assert finish_times(COST, lengths, prompts) == pytest.approx(step_by_step(COST, lengths, prompts))


def test_engine_that_takes_groups_in_turn():
    """Two groups of two: longest 10, then 5, all sequences in every step: 10 x .012 + .02, then 5 x .012 + .04 more."""
    assert finish_times(IN_TURN, [[10, 3], [5, 5]], [10, 20]) == pytest.approx([0.14, 0.24])


def test_time_passes_only_when_nobody_has_anything_to_collect():
    """Results come to their owner in the order of their times, whoever is asked first."""
    timeline = Timeline()
    for at_s, owner in ((3.0, "a"), (1.0, "b"), (1.0, "a")):
        timeline.post(at_s, owner, at_s)
    assert timeline.collect("a") == [1.0] and timeline.now_s == 1.0
    assert timeline.collect("a") == [] and timeline.now_s == 1.0  # b's is waiting
    assert timeline.collect("b") == [1.0] and timeline.collect("b") == [] and timeline.now_s == 3.0
    assert timeline.collect("a") == [3.0] and timeline.collect("a") == []


def test_synchronous_steps_with_an_engine_a_group_take_the_longest_group_and_the_rest():
    """Every step, to rounding: longest + update + publishing + loading. No number of engines changes that."""
    found = simulate(16, 0, 6, LONG_TAIL, COST, REST, learner_waits=True)
    for number, step in enumerate(found.steps):
        first_load_s = COST.load_s if number == 0 else 0.0
        rest_s = REST.update_s + REST.publish_s + COST.load_s
        assert step.step_s == pytest.approx(first_load_s + step.longest_s + rest_s)
        assert step.wait_s == pytest.approx(first_load_s + step.longest_s)
    assert simulate(64, 0, 6, LONG_TAIL, COST, REST, learner_waits=True).mean_step_s == pytest.approx(found.mean_step_s)


def test_what_a_judge_the_log_probabilities_and_the_ledger_cost_is_part_of_a_step():
    """One group a step on one engine: judged for .3 s, stored and its verdict stored for .05 s each, annotated for
    .7 s. Four groups that are finished at once are stored one after the other, before their last verdict comes."""
    one, four = (Workload(groups, 4, 10, 100.0, 0.0, 2000, 7) for groups in (1, 4))
    rest = StepCost(update_s=2.0, publish_s=0.25, judge_group_s=0.3, annotate_s=0.7, store_s=0.05)
    plain, found = (simulate(1, 0, 6, one, COST, costs, learner_waits=True) for costs in (REST, rest))
    for before, step in zip(plain.steps, found.steps, strict=True):
        assert step.step_s == pytest.approx(before.step_s + 0.3 + 0.7 + 2 * 0.05)
        assert step.wait_s == pytest.approx(before.wait_s + 0.3 + 2 * 0.05)
    storing = StepCost(update_s=2.0, publish_s=0.25, judge_group_s=0.0, annotate_s=0.0, store_s=0.05)
    plain, found = (simulate(4, 0, 6, four, COST, costs, learner_waits=True) for costs in (REST, storing))
    for before, step in zip(plain.steps, found.steps, strict=True):
        assert step.step_s == pytest.approx(before.step_s + 2 * 4 * 0.05)


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
@pytest.mark.parametrize("engines", [1, 3, 16, 128])
@pytest.mark.parametrize("learner_waits", [True, False])
def test_no_mean_step_is_below_its_bound_and_no_sample_above_its_age(engines, staleness, learner_waits):
    found = simulate(engines, staleness, 12, LONG_TAIL, COST, REST, learner_waits=learner_waits)
    assert found.mean_step_s > longest_bound(found.mean_longest_s, REST.update_s, staleness)
    assert max(step.staleness_max for step in found.steps) <= staleness
    assert 0 < found.busy_fraction <= 1


def test_staleness_buys_step_time_where_the_tail_is_long_and_the_pool_large():
    """At k = 0 the step is at least its longest sequence; at k = 4 the mean step is shorter than that."""
    fresh, stale = (simulate(64, k, 20, LONG_TAIL, COST, REST, learner_waits=True).settled(5, 5) for k in (0, 4))
    assert fresh.mean_step_s > fresh.mean_longest_s
    assert stale.mean_step_s < stale.mean_longest_s
    assert max(step.staleness_max for step in stale.steps) > 0


def test_a_learner_that_does_not_wait_for_busy_engines_comes_nearer_to_the_bound():
    """At k = 4 the wait in each sync is for the longest task; at k = 0 no engine is busy then, and nothing changes."""
    waits, goes_on = (
        simulate(64, 4, 25, LONG_TAIL, COST, REST, learner_waits=waiting).settled(5, 5) for waiting in (True, False)
    )
    bound_s = longest_bound(goes_on.mean_longest_s, REST.update_s, 4)
    assert bound_s < goes_on.mean_step_s < 0.75 * waits.mean_step_s
    fresh = [simulate(8, 0, 6, LONG_TAIL, COST, REST, learner_waits=waiting) for waiting in (True, False)]
    assert fresh[0].mean_step_s == pytest.approx(fresh[1].mean_step_s)


def test_one_engine_gains_the_update_only():
    """It is never idle but while weights are published and loaded: staleness hides updates, not work."""
    fresh, stale = (simulate(1, k, 20, LONG_TAIL, COST, REST, learner_waits=True).settled(4, 2) for k in (0, 1))
    assert fresh.mean_step_s * 0.75 < stale.mean_step_s < fresh.mean_step_s


def test_lengths_are_addressed_cut_and_long_tailed():
    """The same prompt has the same lengths in every pool; log-normal with the given median."""
    drawn = sorted(n for prompt in range(500) for n in LONG_TAIL.lengths(prompt))
    assert LONG_TAIL.lengths(3) == LONG_TAIL.lengths(3) != LONG_TAIL.lengths(4)
    assert drawn[0] >= 1 and drawn[-1] <= 2000
    assert drawn[len(drawn) // 2] == pytest.approx(100, rel=0.1)
    assert drawn[int(0.841 * len(drawn))] == pytest.approx(100 * 2.718, rel=0.15)


def test_a_simulation_is_repeatable():
    assert simulate(5, 2, 6, LONG_TAIL, COST, REST, learner_waits=True) == simulate(
        5, 2, 6, LONG_TAIL, COST, REST, learner_waits=True
    )
