"""RLOO's credit assignment and loss: golden numbers, invariances, controls. Not covered: the learner, the model,
ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.algorithms.table import build
from rlhf.config import KlConfig, RlooConfig
from rlhf.metrics import values
from rlhf.ops.microbatch import MicroBatch, Outputs


def rloo(coef, place="reward", loss_estimator="k2"):
    kl = KlConfig(coef=coef, place=place, loss_estimator=loss_estimator)
    return build(RlooConfig(name="rloo", kl=kl))


def advantage_of(batch):
    """One number a row, after checking that all its tokens carry the same."""
    for row in batch.rows:
        assert len(set(row.tokens["advantages"].tolist())) <= 1
    return [float(row.tokens["advantages"][0]) if len(row.completion_ids) else None for row in batch.rows]


def collate(rows, names, padding):
    """Right-padded tensors, whatever stands at padding being `padding`; the order of rows is that given."""
    width = max((len(row.completion_ids) for row in rows), default=0) + 2
    tokens = {name: torch.full((len(rows), width), padding) for name in names}
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        mask[i, : len(row.loss_mask)] = torch.from_numpy(row.loss_mask.copy())
        for name in names:
            tokens[name][i, : len(row.completion_ids)] = torch.from_numpy(row.tokens[name].copy())
    return MicroBatch(mask, torch.ones(len(rows)), torch.tensor([row.unit for row in rows]), tokens)


def outputs_like(batch, value):
    logprobs = torch.full(batch.mask.shape, value, requires_grad=True)
    return Outputs(logprobs, torch.zeros(batch.mask.shape))


def test_golden_advantages_without_kl(make_group):
    """G-RLOO. Two prompts given in the wrong order, whose rows come out by id; the prompts' tokens are the same."""
    groups = [make_group(4, [5.0, 3.0], [2, 1], {}, {}), make_group(2, [1.0, 2.0, 5.0, 8.0], [1, 2, 3, 4], {}, {})]
    batch, state = rloo(0.0).prepare(groups, {})
    assert advantage_of(batch) == pytest.approx([-4.0, -2.66667, 1.33333, 5.33333, 2.0, -2.0], abs=1e-5)
    assert [row.unit for row in batch.rows] == [0, 1, 2, 3, 4, 5]
    assert batch.normalizer == "rows" and state == {}
    assert all(row.temperature == 0.7 for row in batch.rows)


def sequence_kl_group(make_group):
    """Four samples whose summed k1 is 10, 0, 5, -5."""
    kls = [10.0, 0.0, 5.0, -5.0]
    return make_group(
        0,
        [1.0, 2.0, 5.0, 8.0],
        [2] * 4,
        {"behavior_logprobs": [[-1.0, -2.0]] * 4, "ref_logprobs": [[-1.0 - kl / 4, -2.0 - 3 * kl / 4] for kl in kls]},
        {},
    )


def test_kl_comes_off_the_reward_before_the_baseline(make_group):
    """G-RLOO-KL: sum 0. Baseline first would give (-4.5, -2.66667, 1.08333, 5.58333); the wrong sign (-3.5, ...)."""
    batch, _ = rloo(0.05).prepare([sequence_kl_group(make_group)], {})
    assert advantage_of(batch) == pytest.approx([-4.5, -2.5, 1.16667, 5.83333], abs=1e-5)


def test_kl_is_measured_per_sequence_with_its_sign(make_group):
    """kl/k1 and kl/k3 are sums over a sequence, averaged over sequences; the score stays unshaped in reward/mean."""
    batch, _ = rloo(0.05).prepare([sequence_kl_group(make_group)], {})
    measured = values(batch.metrics)
    parts = [d for kl in (10.0, 0.0, 5.0, -5.0) for d in (kl / 4, 3 * kl / 4)]
    assert measured["kl/k1"] == pytest.approx(2.5)
    assert measured["kl/k3"] == pytest.approx(sum(np.exp(-d) - 1 + d for d in parts) / 4)
    assert measured["kl/k3_clamped_fraction"] == 0.0
    assert measured["reward/mean"] == pytest.approx(4.0)
    assert measured["reward/std"] == pytest.approx(7.5**0.5)
    assert measured["advantage/abs_mean"] == pytest.approx(3.5)


def test_kl_uses_the_learners_old_logprobs_where_they_are(make_group):
    """Stale samples are priced under the current weights, not under those that sampled them."""
    group = make_group(0, [0.0, 0.0], [1, 1], {"ref_logprobs": [[-3.0], [-3.0]], "old_logprobs": [[-1.0], [-2.0]]}, {})
    batch, _ = rloo(1.0).prepare([group], {})
    assert advantage_of(batch) == pytest.approx([-1.0, 1.0])


def test_kl_of_masked_tokens_is_free(make_group):
    """A tool's tokens have no price and no weight in the length."""
    group = make_group(0, [0.0, 0.0], [3, 3], {"ref_logprobs": [[-1.0, -9.0, -2.0], [-1.0, -1.0, -1.0]]}, {})
    first = replace(group.samples[0], loss_mask=np.array([True, False, True]))
    batch, _ = rloo(1.0).prepare([replace(group, samples=(first, group.samples[1]))], {})
    assert advantage_of(batch) == pytest.approx([-1.0, 1.0])
    assert values(batch.metrics)["completion/length_mean"] == 2.5


def test_unscorable_samples_leave_their_group_and_zero_stays(make_group):
    """G-RLOO-NAN and (0.0, None, 1.0): None is not 0, and 0.0 is not missing."""
    groups = [make_group(0, [1.0, None, 3.0, 5.0], [2] * 4, {}, {}), make_group(1, [0.0, None, 1.0], [2] * 3, {}, {})]
    batch, _ = rloo(0.0).prepare(groups, {})
    assert advantage_of(batch) == pytest.approx([-3.0, 0.0, 3.0, -1.0, 1.0])
    measured = values(batch.metrics)
    assert measured["faults/unscorable"] == 2.0
    assert measured["reward/mean"] == pytest.approx(2.0)


def test_a_lone_scorable_sample_has_no_advantage(make_group):
    """Its raw reward would be one without a baseline. The group counts as one that teaches nothing."""
    groups = [make_group(0, [None, 7.0], [1, 1], {}, {}), make_group(1, [1.0, 0.0], [1, 1], {}, {})]
    batch, _ = rloo(0.0).prepare(groups, {})
    assert advantage_of(batch) == [0.0, 1.0, -1.0]
    assert values(batch.metrics)["group/zero_advantage_fraction"] == 0.5


def test_nothing_scorable_gives_an_empty_batch_and_no_invented_numbers(make_group):
    """No row, no reward metric, all samples counted as unscorable."""
    batch, _ = rloo(0.0).prepare([make_group(0, [None, None], [1, 1], {}, {})], {})
    measured = values(batch.metrics)
    assert batch.rows == ()
    assert measured["faults/unscorable"] == 2.0
    assert not {"reward/mean", "reward/std", "advantage/abs_mean"} & set(measured)


def test_empty_and_fully_masked_completions_do_not_poison(make_group):
    """Lengths (4, 0, 3, 5), the last one masked throughout: the others get the documented advantages; loss and
    gradient finite."""
    group = make_group(0, [1.0, 2.0, 5.0, 8.0], [4, 0, 3, 5], {"ref_logprobs": [[-1.0] * n for n in (4, 0, 3, 5)]}, {})
    masked = replace(group.samples[3], loss_mask=np.zeros(5, dtype=np.bool_))
    algorithm = rloo(0.05, place="loss", loss_estimator="k3")
    batch, _ = algorithm.prepare([replace(group, samples=(*group.samples[:3], masked))], {})
    assert advantage_of(batch) == [pytest.approx(-4.0, abs=1e-5), None, pytest.approx(4 / 3), pytest.approx(16 / 3)]
    micro = collate(batch.rows, batch.rows[0].tokens, 0.0)
    outputs = outputs_like(micro, -1.0)
    sums = algorithm.loss(outputs, micro)
    sums.loss.backward()
    assert sums.loss.item() == pytest.approx(-(4 * -4 * -1 + 3 * 4 / 3 * -1), abs=1e-5)
    assert outputs.logprobs.grad[1].abs().max().item() == 0.0
    assert outputs.logprobs.grad[3].abs().max().item() == 0.0
    assert all(np.isfinite(number) for number in values(batch.metrics).values())


def test_missing_columns_are_named(make_group):
    """Which prompt, which sample, which column, what there is instead."""
    group = make_group(3, [1.0, 2.0], [1, 1], {}, {})
    with pytest.raises(ValueError, match=r"prompt 3, sample 0: no column 'ref_logprobs'"):
        rloo(0.05).prepare([group], {})
    bare = replace(group, samples=tuple(replace(sample, scores={}) for sample in group.samples))
    with pytest.raises(ValueError, match=r"prompt 3, sample 0: no column 'reward'"):
        rloo(0.0).prepare([bare], {})


def test_given_completions_are_refused(make_group):
    """A data set's completions were not sampled by the policy: the policy gradient does not hold for them."""
    group = make_group(3, [1.0, 2.0], [1, 1], {}, {})
    given = tuple(replace(sample, behavior_logprobs=None, versions=None) for sample in group.samples)
    with pytest.raises(ValueError, match="prompt 3, sample 0: not sampled by a policy"):
        rloo(0.0).prepare([replace(group, samples=given)], {})


@pytest.mark.parametrize(("coef", "expected"), [(0.0, {"reward"}), (0.05, {"reward", "ref_logprobs"})])
def test_a_free_kl_needs_no_reference(coef, expected):
    """Which decides whether a reference model is built at all."""
    assert rloo(coef).needs == expected


def test_loss_gradient_is_minus_advantage_at_every_trained_token(make_group):
    """The EOS (a row's last token) is trained; padding, though its columns hold rubbish, is not."""
    algorithm = rloo(0.0)
    batch, _ = algorithm.prepare([make_group(0, [3.0, 1.0], [3, 1], {}, {})], {})
    micro = collate(batch.rows, batch.rows[0].tokens, float("nan"))
    outputs = outputs_like(micro, -1.0)
    sums = algorithm.loss(outputs, micro)
    sums.loss.backward()
    assert outputs.logprobs.grad.tolist() == [[-2.0, -2.0, -2.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0, 0.0]]
    assert sums.means["loss/policy"] == (sums.loss.detach(), torch.tensor(2.0))


def test_fresh_samples_weigh_exactly_one_and_stale_ones_their_truncated_ratio(make_group):
    """Old minus behavior is (ln 1.5, ln 3) and the policy has not moved yet: weights 1.5 and the cap 2, which is
    counted."""
    lengths, behavior = [2, 1], [[-2.0, -2.0], [-2.0]]
    old = [[-2.0 + np.log(1.5), -2.0 + np.log(3.0)], [-2.0]]
    fresh = make_group(0, [3.0, 1.0], lengths, {"behavior_logprobs": behavior}, {})
    stale = make_group(0, [3.0, 1.0], lengths, {"behavior_logprobs": behavior, "old_logprobs": old}, {})
    gradients = []
    for group in (fresh, stale):
        batch, _ = rloo(0.0).prepare([group], {})
        micro = collate(batch.rows, batch.rows[0].tokens, 0.0)
        current = micro.tokens.get("old_logprobs", micro.tokens["behavior_logprobs"])
        outputs = Outputs(current.clone().requires_grad_(), torch.zeros_like(current))
        sums = rloo(0.0).loss(outputs, micro)
        sums.loss.backward()
        gradients.append((outputs.logprobs.grad[micro.mask].tolist(), sums.means["clip/fraction"][0].item()))
    assert gradients[0] == ([-2.0, -2.0, 2.0], 0)
    assert gradients[1][0] == pytest.approx([-3.0, -4.0, 2.0], abs=1e-5)
    assert gradients[1][1] == 1


def test_later_minibatches_are_weighted_by_how_far_the_policy_has_moved(make_group):
    """Old equals behavior; the policy moved by (ln 1.25, ln .5, ln 8): weights 1.25, .5 and the cap 2."""
    group = make_group(0, [3.0, 1.0], [2, 1], {"old_logprobs": [[-1.0, -1.0], [-1.0]]}, {})
    batch, _ = rloo(0.0).prepare([group], {})
    micro = collate(batch.rows, batch.rows[0].tokens, 0.0)
    moved = micro.tokens["old_logprobs"].clone()
    moved[micro.mask] += torch.tensor([1.25, 0.5, 8.0]).log()
    outputs = Outputs(moved.requires_grad_(), torch.zeros_like(moved))
    rloo(0.0).loss(outputs, micro).loss.backward()
    assert outputs.logprobs.grad[micro.mask].tolist() == pytest.approx([-2.5, -1.0, 4.0], abs=1e-5)


def test_mixed_batch_of_fresh_and_stale_samples(make_group):
    """Only one group has old log-probs: all rows get the column, and the fresh rows' weight is exactly 1."""
    stale = make_group(0, [3.0, 1.0], [1, 1], {"old_logprobs": [[-0.5], [-1.5]]}, {})
    fresh = make_group(1, [3.0, 1.0], [1, 1], {"behavior_logprobs": [[-0.7], [-0.8]]}, {})
    batch, _ = rloo(0.0).prepare([stale, fresh], {})
    old = [row.tokens["old_logprobs"].tolist() for row in batch.rows]
    assert old == [[pytest.approx(-0.5)], [pytest.approx(-1.5)], [pytest.approx(-0.7)], [pytest.approx(-0.8)]]


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_as_a_loss(make_group, estimator):
    """Advantages stay those of the plain score; the gradient gets beta S (k2) or beta (1 - e^-d) (k3) a token."""
    algorithm = rloo(0.1, place="loss", loss_estimator=estimator)
    group = make_group(0, [3.0, 1.0], [2, 1], {"ref_logprobs": [[-1.5, -0.8], [-1.0]]}, {})
    batch, _ = algorithm.prepare([group], {})
    assert advantage_of(batch) == [2.0, -2.0]
    micro = collate(batch.rows, batch.rows[0].tokens, 0.0)
    outputs = outputs_like(micro, -1.0)
    sums = algorithm.loss(outputs, micro)
    sums.loss.backward()
    d = np.array([0.5, -0.2, 0.0])
    pull = np.array([0.3, 0.3, 0.0]) if estimator == "k2" else 1 - np.exp(-d)
    assert outputs.logprobs.grad[micro.mask].tolist() == pytest.approx(
        np.array([-2.0, -2.0, 2.0]) + 0.1 * pull, abs=1e-5
    )
    kl = 0.5 * 0.3**2 if estimator == "k2" else float((np.exp(-d) - 1 + d).sum())
    assert sums.means["loss/kl"][0].item() == pytest.approx(kl, abs=1e-6)
    assert sums.loss.item() == pytest.approx(sums.means["loss/policy"][0].item() + 0.1 * kl, abs=1e-5)


@pytest.mark.parametrize(("place", "estimator"), [("reward", "k2"), ("loss", "k2"), ("loss", "k3")])
def test_loss_sums_do_not_depend_on_micro_batches(make_group, place, estimator):
    """Rows one by one, with another padding width each, add up to the whole batch: loss, means and gradient."""
    algorithm, draw = rloo(0.1, place=place, loss_estimator=estimator), np.random.default_rng(0)
    lengths = [4, 1, 3, 2]
    columns = {
        name: [-draw.random(n) for n in lengths] for name in ("behavior_logprobs", "old_logprobs", "ref_logprobs")
    }
    batch, _ = algorithm.prepare([make_group(0, list(draw.random(4)), lengths, columns, {})], {})

    def totals(micro):
        outputs = outputs_like(micro, -0.4)
        sums = algorithm.loss(outputs, micro)
        sums.loss.backward()
        found = {name: torch.stack([a.double(), b.double()]) for name, (a, b) in sums.means.items()}
        return found, [g[: int(m.sum())].tolist() for g, m in zip(outputs.logprobs.grad, micro.mask, strict=True)]

    names = list(batch.rows[0].tokens)
    whole, gradient = totals(collate(batch.rows, names, 0.0))
    parts = [totals(collate([row], names, 0.0)) for row in batch.rows]
    assert [g for _, part in parts for g in part] == [pytest.approx(g, abs=1e-6) for g in gradient]
    for name, expected in whole.items():
        assert torch.allclose(sum(found[name] for found, _ in parts), expected, atol=1e-5), name


def test_a_filler_row_adds_nothing(make_group):
    """Weight 0 and an all-false mask: no loss, no count."""
    algorithm = rloo(0.1, place="loss", loss_estimator="k3")
    batch, _ = algorithm.prepare([make_group(0, [3.0, 1.0], [2, 1], {"ref_logprobs": [[-1.5, -0.8], [-1.0]]}, {})], {})
    micro = collate(batch.rows, batch.rows[0].tokens, 0.0)
    filler = micro._replace(mask=torch.zeros_like(micro.mask), weight=torch.zeros(2))
    outputs = outputs_like(filler, -7.0)
    sums = algorithm.loss(outputs, filler)
    sums.loss.backward()
    assert sums.loss.item() == 0.0 and outputs.logprobs.grad.abs().max().item() == 0.0
    assert all(total.item() == 0.0 and count.item() == 0.0 for total, count in sums.means.values())


def test_unfinished_completions_are_counted(make_group):
    """Half of the samples ran into the length limit."""
    group = make_group(0, [3.0, 1.0], [2, 1], {}, {})
    cut = replace(group.samples[0], finish_reason="length")
    batch, _ = rloo(0.0).prepare([replace(group, samples=(cut, group.samples[1]))], {})
    assert values(batch.metrics)["completion/unfinished_fraction"] == 0.5


def test_a_bandit_learns_and_with_shuffled_rewards_does_not(make_group):
    """Thirty exact RLOO steps on a three-armed bandit raise its best arm; control: rewards dealt to random samples."""

    def best_arm_after(shuffled):
        draw = np.random.default_rng(5)
        logits = torch.zeros(3, requires_grad=True)
        algorithm = rloo(0.0)
        for step in range(30):
            policy = logits.detach().double().softmax(0).numpy()
            arms = draw.choice(3, size=16, p=policy / policy.sum())
            rewards = (arms == 2).astype(float)
            rewards = draw.permutation(rewards) if shuffled else rewards
            batch, _ = algorithm.prepare([make_group(step, rewards.tolist(), [1] * 16, {}, {})], {})
            logprobs = logits.log_softmax(0)[torch.from_numpy(arms)].unsqueeze(1)
            micro = collate(batch.rows, batch.rows[0].tokens, 0.0)
            micro = micro._replace(mask=micro.mask[:, :1], tokens={k: v[:, :1] for k, v in micro.tokens.items()})
            loss = algorithm.loss(Outputs(logprobs, torch.zeros(16, 1)), micro).loss / 16
            (gradient,) = torch.autograd.grad(loss, logits)
            logits = (logits - 1.0 * gradient).detach().requires_grad_()
        return logits.detach().softmax(0)[2].item()

    assert best_arm_after(False) > 0.85
    assert best_arm_after(True) < 0.6
