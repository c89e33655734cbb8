"""GRPO and Dr. GRPO from groups to the divided loss, and what all online algorithms do to scores on the way.

Advantages and the loss against another implementation: test_algorithm_trl. Not covered: the model, real ranks.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.algorithms.table import build
from rlhf.config import GrpoConfig, ReinforceConfig, RlooConfig
from rlhf.metrics import values

FREE = {"coef": 0.0}


def grpo(**settings):
    return build(GrpoConfig(name="grpo", **{"kl": FREE, "std_eps": 0.0, **settings}))


def advantage_of(batch):
    """One number a row, after checking that all its tokens carry the same."""
    for row in batch.rows:
        assert len(set(row.tokens["advantages"].tolist())) <= 1
    return [float(row.tokens["advantages"][0]) if len(row.completion_ids) else None for row in batch.rows]


def says(lengths, value):
    return [torch.full((length,), value, requires_grad=True) for length in lengths]


@pytest.mark.parametrize(
    ("scale", "expected"),
    [("biased_std", [1.73205, -0.57735]), ("unbiased_std", [1.5, -0.5]), ("none", [0.75, -0.25])],
)
def test_golden_advantages(make_group, scale, expected):
    """G-GRPO (1,0,0,0), beside a group of equal rewards, which has exactly 0; groups in the wrong order."""
    groups = [make_group(4, [0.35] * 4, [2] * 4, {}, {}), make_group(2, [1.0, 0.0, 0.0, 0.0], [1, 2, 3, 4], {}, {})]
    batch, state = grpo(scale=scale).prepare(groups, {})
    assert advantage_of(batch) == pytest.approx([expected[0]] + [expected[1]] * 3 + [0.0] * 4, abs=1e-5)
    assert state == {} and values(batch.metrics)["group/zero_advantage_fraction"] == 0.5


@pytest.mark.parametrize("name", ["grpo", "rloo", "raft", "reinforce_plus_plus_baseline"])
def test_one_sample_a_prompt_is_refused_where_samples_are_compared(name):
    """Trap 29, at load, naming the key; REINFORCE and REINFORCE++ accept it."""
    from pydantic import TypeAdapter

    from rlhf.config import AlgorithmConfig

    read = TypeAdapter(AlgorithmConfig).validate_python
    with pytest.raises(ValueError, match=f"samples_per_prompt must be at least 2: {name}"):
        read({"name": name, "samples_per_prompt": 1})
    for lonely in ("reinforce", "reinforce_plus_plus"):
        assert read({"name": lonely, "samples_per_prompt": 1}).samples_per_prompt == 1


def test_the_same_prompt_issued_twice_makes_two_groups(make_group):
    """Trap 28: rewards (1,0) and (5,3) under two ids; their text and tokens are equal."""
    groups = [make_group(9, [5.0, 3.0], [1, 1], {}, {}), make_group(3, [1.0, 0.0], [1, 1], {}, {})]
    batch, _ = grpo(scale="none").prepare(groups, {})
    assert advantage_of(batch) == [0.5, -0.5, 1.0, -1.0]


def test_unscorable_and_lone_samples(make_group):
    """None leaves its group; a lone scorable sample has advantage 0, not its reward; 0.0 is a score."""
    groups = [
        make_group(0, [0.0, None, 1.0], [1] * 3, {}, {}),
        make_group(1, [None, 7.0], [1] * 2, {}, {}),
        make_group(2, [None, None], [1] * 2, {}, {}),
    ]
    batch, _ = grpo().prepare(groups, {})
    assert advantage_of(batch) == [-1.0, 1.0, 0.0]
    assert values(batch.metrics)["faults/unscorable"] == 4.0


# G-AGG: token losses (1,1) and (2,2,2,2), limit 8.
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("budget", [1, 1000])
@pytest.mark.parametrize(
    ("aggregation", "expected", "per_token"),
    [
        ("token_mean", 10 / 6, (1 / 6, 1 / 6)),
        ("sequence_mean", 1.5, (1 / 4, 1 / 8)),
        ("sequence_sum", 5.0, (1 / 2, 1 / 2)),
        ("constant", 0.625, (1 / 16, 1 / 16)),
    ],
)
def test_aggregations_do_not_depend_on_micro_batches_or_ranks(
    make_group, divided_loss, aggregation, expected, per_token, budget, ranks
):
    """Trap 30: value, gradient and the logged loss; averaging means of micro-batches would give 1.5 for token_mean. A
    token's loss is -A at ratio 1, so credit (-1, -2) is put in place of the group's."""
    group = make_group(0, [3.0, 1.0], [2, 4], {}, {})
    limited = tuple(replace(s, sampling=replace(s.sampling, max_new_tokens=8)) for s in group.samples)
    algorithm = grpo(aggregation=aggregation)
    batch, _ = algorithm.prepare([replace(group, samples=limited)], {})
    rows = [
        replace(row, tokens={**row.tokens, "advantages": np.full(len(row.completion_ids), credit, np.float32)})
        for row, credit in zip(batch.rows, (-1.0, -2.0), strict=True)
    ]
    logprobs = says([2, 4], -1.0)
    loss, means = divided_loss(algorithm, replace(batch, rows=tuple(rows)), logprobs, budget, ranks)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert means["loss/policy"] == pytest.approx(expected, abs=1e-5)
    assert logprobs[0].grad.tolist() == pytest.approx([per_token[0]] * 2, abs=1e-6)
    assert logprobs[1].grad.tolist() == pytest.approx([2 * per_token[1]] * 4, abs=1e-6)


def test_logged_loss_is_the_mean_over_all_micro_batches(make_group, divided_loss):
    """Trap 46: four rows of one token with losses 1, 2, 3, 6, one a micro-batch: logged 3.0, not the last."""
    algorithm = grpo(scale="none")
    batch, _ = algorithm.prepare([make_group(0, [-1.0, -2.0, -3.0, -6.0], [1] * 4, {}, {})], {})
    rows = [
        replace(row, tokens={**row.tokens, "advantages": np.full(1, -size, np.float32)})
        for row, size in zip(batch.rows, (1.0, 2.0, 3.0, 6.0), strict=True)
    ]
    _, means = divided_loss(algorithm, replace(batch, rows=tuple(rows)), says([1] * 4, -1.0), 1, 1)
    assert means["loss/policy"] == pytest.approx(3.0)


def test_dr_grpo_needs_both_changes(make_group, divided_loss):
    """Two wrong answers of 2 and 6 tokens: 1/|y| makes the longer one cheaper a token; the constant does not."""
    group = make_group(0, [0.0, 0.0, 1.0], [2, 6, 2], {}, {})

    def push(aggregation):
        algorithm = grpo(scale="none", aggregation=aggregation)
        batch, _ = algorithm.prepare([group], {})
        logprobs = says([2, 6, 2], -1.0)
        divided_loss(algorithm, batch, logprobs, 1000, 1)[0].backward()
        return [float(said.grad[0]) for said in logprobs]

    short, long, _ = push("sequence_mean")
    assert short == pytest.approx(3 * long)
    short, long, right = push("constant")
    assert short == pytest.approx(long) and right == pytest.approx(-2 * short)


def test_empty_and_fully_masked_completions_do_not_poison(make_group, divided_loss):
    """Trap 18: lengths (4,0,3,5), the last masked throughout: no NaN, no gradient there, the others' credit as is."""
    lengths = (4, 0, 3, 5)
    group = make_group(0, [1.0, 2.0, 5.0, 8.0], lengths, {"ref_logprobs": [[-1.5] * n for n in lengths]}, {})
    masked = replace(group.samples[3], loss_mask=np.zeros(5, dtype=np.bool_))
    algorithm = grpo(scale="none", kl={"coef": 0.1})
    batch, _ = algorithm.prepare([replace(group, samples=(*group.samples[:3], masked))], {})
    assert advantage_of(batch) == [-3.0, None, 1.0, 4.0]
    logprobs = says(lengths, -1.0)
    loss, _ = divided_loss(algorithm, batch, logprobs, 10, 1)
    loss.backward()
    assert np.isfinite(loss.item()) and float(logprobs[3].grad.abs().max()) == 0.0
    assert all(np.isfinite(number) for number in values(batch.metrics).values())


def test_kl_loss_gradients(make_group, divided_loss):
    """k3 a token: beta (1 - e^-d); k2_token: beta d; k2: beta times the sequence's sum; each times 1/(n |y|)."""
    group = make_group(0, [1.0, 1.0], [2, 1], {"ref_logprobs": [[-1.5, -0.8], [-1.0]]}, {})
    d = np.array([0.5, -0.2])
    expected = {"k3": 1 - np.exp(-d), "k2_token": d, "k2": np.full(2, 0.3)}
    for estimator, pull in expected.items():
        algorithm = grpo(kl={"coef": 0.1, "loss_estimator": estimator})
        assert algorithm.needs == {"reward", "ref_logprobs"}
        batch, _ = algorithm.prepare([group], {})
        logprobs = says([2, 1], -1.0)
        divided_loss(algorithm, batch, logprobs, 1000, 1)[0].backward()
        assert logprobs[0].grad.tolist() == pytest.approx(0.1 * pull / 4, abs=1e-6), estimator


def test_kl_in_the_reward_comes_before_the_group(make_group):
    """Summed k1 (2, 0) at beta .5: R = (0, 0), so nobody is better."""
    group = make_group(0, [1.0, 0.0], [2, 2], {"ref_logprobs": [[-2.0, -2.0], [-1.0, -1.0]]}, {})
    batch, _ = grpo(kl={"coef": 0.5, "place": "reward"}).prepare([group], {})
    assert advantage_of(batch) == [0.0, 0.0]


def test_clip_flags_are_logged_as_shares_of_tokens(make_group, divided_loss):
    """Policy moved by (ln 1.5, 0) on a winner, (ln .5, ln 5) on a loser: one above, one below, one over dual 3."""
    group = make_group(0, [1.0, 0.0], [2, 2], {"old_logprobs": [[-1.0, -1.0]] * 2}, {})
    algorithm = grpo(clip={"dual": 3.0})
    batch, _ = algorithm.prepare([group], {})
    moved = [torch.tensor([np.log(1.5), 0.0]) - 1, torch.tensor([np.log(0.5), np.log(5.0)]) - 1]
    _, means = divided_loss(algorithm, batch, [m.float() for m in moved], 1, 1)
    assert [means[f"clip/{name}_fraction"] for name in ("above", "below", "dual")] == [0.25, 0.25, 0.25]
    assert means["clip/log_ratio_held_fraction"] == 0.0


# The bandit of G-OFF: what the sampler, the learner and the judge say of three actions.
SAMPLER, POLICY, REWARDS = (0.7, 0.2, 0.1), (0.4, 0.35, 0.25), (0.0, 1.0, 2.0)
WHOLE = {
    "reinforce": lambda cap: ReinforceConfig(name="reinforce", baseline="none", kl=FREE, off_policy={"cap": cap}),
    "grpo": lambda cap: GrpoConfig(
        name="grpo", scale="none", kl=FREE, off_policy={"cap": cap}, aggregation="sequence_sum"
    ),
}


def expected_gradient(make_group, divided_loss, config, *, stale):
    """By enumeration: each action weighted by the sampler's probability; stale says whether old log-probs are there."""
    logits = torch.tensor(POLICY).log().requires_grad_()
    columns = {"behavior_logprobs": [[float(np.log(p))] for p in SAMPLER]}
    if stale:
        columns["old_logprobs"] = [[float(np.log(p))] for p in POLICY]
    algorithm = build(config)
    batch, _ = algorithm.prepare([make_group(0, list(REWARDS), [1] * 3, columns, {})], {})
    said = logits.log_softmax(0)
    for action, probability in enumerate(SAMPLER):
        row = batch.rows[action]
        credit = {**row.tokens, "advantages": np.full(1, REWARDS[action], np.float32)}
        single = replace(batch, rows=(replace(row, unit=0, tokens=credit),))
        loss, _ = divided_loss(algorithm, single, [said[action : action + 1]], 1000, 1)
        (probability * loss).backward(retain_graph=True)
    return (-logits.grad).tolist()


@pytest.mark.parametrize("name", list(WHOLE))
def test_stale_samples_are_corrected(make_group, divided_loss, name):
    """G-OFF, trap 38: the true gradient, that of a cap of 2, and the control without correction, which is another."""
    true, capped, uncorrected = [-0.34, 0.0525, 0.2875], [-0.3, 0.0875, 0.2125], [-0.16, 0.06, 0.1]
    far, near = WHOLE[name](1e6), WHOLE[name](2.0)
    assert expected_gradient(make_group, divided_loss, far, stale=True) == pytest.approx(true, abs=1e-5)
    assert expected_gradient(make_group, divided_loss, near, stale=True) == pytest.approx(capped, abs=1e-5)
    control = expected_gradient(make_group, divided_loss, far, stale=False)
    assert control == pytest.approx(uncorrected, abs=1e-5)
    assert control != pytest.approx(true, abs=0.05)


# What every online algorithm does to scores before it assigns credit.


def test_reward_clip_comes_before_the_baseline(make_group):
    """Trap 37: (20,0,0,0) within 10, leave-one-out: (10,-3.33,...), not (10,-6.67,...). The logged reward stays raw."""
    algorithm = build(RlooConfig(name="rloo", kl=FREE, reward_clip=10.0))
    batch, _ = algorithm.prepare([make_group(0, [20.0, 0.0, 0.0, 0.0], [1] * 4, {}, {})], {})
    assert advantage_of(batch) == pytest.approx([10.0] + [-10 / 3] * 3, abs=1e-5)
    assert values(batch.metrics)["reward/mean"] == 5.0


@pytest.mark.parametrize(
    ("rule", "expected"),
    [({}, [2.0, 3.0]), ({"fixed_score": -1.0}, [2.0, -1.0]), ({"penalty": 1.0}, [2.0, 2.0])],
)
def test_missing_eos(make_group, rule, expected):
    """Trap 86: scores 2 with and 3 without an EOS; both rules, and none by default. The share is counted."""
    group = make_group(0, [2.0, 3.0], [1, 1], {}, {})
    cut = replace(group.samples[1], finish_reason="length")
    config = ReinforceConfig(name="reinforce", baseline="none", kl=FREE, missing_eos=rule)
    batch, _ = build(config).prepare([replace(group, samples=(group.samples[0], cut))], {})
    assert advantage_of(batch) == expected
    measured = values(batch.metrics)
    assert measured["reward/mean"] == 2.5 and measured["completion/unfinished_fraction"] == 0.5


@pytest.mark.parametrize(
    ("rule", "expected"),
    [({}, [10.0, -10.0]), ({"penalty": 3.0}, [7.0, -13.0]), ({"fixed_score": -20.0}, [-20.0, -20.0])],
)
def test_reward_clip_is_applied_before_the_rule_for_a_missing_end(make_group, rule, expected):
    """Scores 25 and -25, cut both, held within 10: what the rule says comes off the held score, and is not held."""
    group = make_group(0, [25.0, -25.0], [1, 1], {}, {})
    cut = replace(group, samples=tuple(replace(sample, finish_reason="length") for sample in group.samples))
    config = ReinforceConfig(name="reinforce", baseline="none", kl=FREE, reward_clip=10.0, missing_eos=rule)
    assert advantage_of(build(config).prepare([cut], {})[0]) == expected


def test_missing_eos_does_not_score_what_the_judge_could_not(make_group):
    """None stays None; and the two rules exclude each other, with both keys in the message."""
    group = make_group(0, [2.0, None], [1, 1], {}, {})
    cut = replace(group.samples[1], finish_reason="length")
    config = ReinforceConfig(name="reinforce", baseline="none", kl=FREE, missing_eos={"fixed_score": -1.0})
    batch, _ = build(config).prepare([replace(group, samples=(group.samples[0], cut))], {})
    assert advantage_of(batch) == [2.0]
    with pytest.raises(ValueError, match="fixed_score and penalty"):
        ReinforceConfig(name="reinforce", missing_eos={"fixed_score": -1.0, "penalty": 1.0})


def all_wrong_and_one_right(make_group):
    """Raw (1,0,0,0), and raw (0,0,0,0) whose samples differ after the missing-EOS penalty."""
    right, wrong = make_group(0, [1.0, 0.0, 0.0, 0.0], [1] * 4, {}, {}), make_group(1, [0.0] * 4, [1] * 4, {}, {})
    cut = tuple(replace(s, finish_reason="length" if s.index < 2 else "stop") for s in wrong.samples)
    return [right, replace(wrong, samples=cut)]


@pytest.mark.parametrize("config", [GrpoConfig(name="grpo", kl=FREE), RlooConfig(name="rloo", kl=FREE)])
def test_groups_without_variance_are_dropped_whole_by_their_raw_score(make_group, config):
    """Trap 27: the lone winner's group is kept whole; the all-wrong one is dropped and counted, though shaped rewards
    differ. It still counts in the reward's mean. Off by default."""
    config = config.model_copy(update={"missing_eos": type(config.missing_eos)(penalty=0.1)})
    groups = all_wrong_and_one_right(make_group)
    kept, _ = build(config).prepare(groups, {})
    assert len(kept.rows) == 8 and values(kept.metrics)["groups/equal_dropped"] == 0.0
    dropped, _ = build(config.model_copy(update={"drop_equal_groups": True})).prepare(groups, {})
    measured = values(dropped.metrics)
    assert len(dropped.rows) == 4 and advantage_of(dropped)[0] > 0
    assert measured["groups/equal_dropped"] == 1.0 and measured["reward/mean"] == 0.125


def test_a_batch_whose_groups_are_all_dropped_is_empty(make_group):
    """Which the learner counts as a minibatch without tokens; no invented numbers."""
    batch, _ = grpo(drop_equal_groups=True).prepare([make_group(0, [1.0, 1.0], [1, 1], {}, {})], {})
    assert batch.rows == () and "advantage/abs_mean" not in values(batch.metrics)
    assert values(batch.metrics)["groups/equal_dropped"] == 1.0


def test_batch_mean_baseline(make_group):
    """REINFORCE over two prompts: rewards (1,3,8) minus 4, and equal rewards exactly 0; the baseline is logged."""
    algorithm = build(ReinforceConfig(name="reinforce", baseline="batch_mean", kl=FREE))
    groups = [make_group(0, [1.0, 3.0], [1, 1], {}, {}), make_group(1, [8.0], [1], {}, {})]
    batch, state = algorithm.prepare(groups, {})
    assert advantage_of(batch) == [-3.0, -1.0, 4.0] and state == {}
    assert values(batch.metrics)["reward/baseline"] == 4.0
    equal, _ = algorithm.prepare([make_group(0, [0.35] * 7, [1] * 7, {}, {})], {})
    assert advantage_of(equal) == [0.0] * 7


def test_batch_mean_gradient_is_the_true_one_times_n_minus_one_over_n(make_group, divided_loss):
    """Both samples of every batch of two enumerated on a three-armed bandit: half of the true gradient."""
    algorithm = build(ReinforceConfig(name="reinforce", baseline="batch_mean", kl=FREE))
    logits = torch.tensor(POLICY).log().requires_grad_()
    said = logits.log_softmax(0)
    for i, first in enumerate(POLICY):
        for j, second in enumerate(POLICY):
            batch, _ = algorithm.prepare([make_group(0, [REWARDS[i], REWARDS[j]], [1, 1], {}, {})], {})
            loss, _ = divided_loss(algorithm, batch, [said[i : i + 1], said[j : j + 1]], 1000, 1)
            (first * second * loss).backward(retain_graph=True)
    assert (-logits.grad).tolist() == pytest.approx([-0.17, 0.02625, 0.14375], abs=1e-5)
