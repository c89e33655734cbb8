"""`algorithm.off_policy` in every policy-gradient algorithm: what it weighs, what it leaves out, what it logs, and
which settings it refuses; the KL loss is weighed as the policy's is. The maths are in test_ops_importance. Not covered:
the learner, ranks."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rlhf.algorithms.table import build
from rlhf.cli.main import main
from rlhf.config import (
    GrpoConfig,
    OffPolicyConfig,
    PpoConfig,
    ReinforceConfig,
    ReinforcePlusPlusBaselineConfig,
    ReinforcePlusPlusConfig,
    RlooConfig,
)
from rlhf.metrics import values
from rlhf.passes import needs_old_logprobs

FREE = {"coef": 0.0}
ALGORITHMS = {
    "rloo": RlooConfig,
    "reinforce": ReinforceConfig,
    "grpo": GrpoConfig,
    "reinforce_plus_plus": ReinforcePlusPlusConfig,
    "reinforce_plus_plus_baseline": ReinforcePlusPlusBaselineConfig,
    "ppo": PpoConfig,
}
# l^old - l^b of two completions of two tokens, and the token weights of a cap of 2.
DIFFERENCES = [[math.log(1.5), math.log(3.0)], [math.log(0.4), 0.0]]


def batch_of(make_group, config, *, stale):
    """The train batch of one group with rewards (3, 1); the learner's log-probs are -2 throughout."""
    columns = {"behavior_logprobs": [[-2.0 - d for d in row] for row in DIFFERENCES], "values": [[0.1, 0.2]] * 2}
    if stale:
        columns["old_logprobs"] = [[-2.0, -2.0]] * 2
    algorithm = build(config)
    state = algorithm.initial_state
    return algorithm, algorithm.prepare([make_group(0, [3.0, 1.0], [2, 2], columns, {})], state)[0]


def gradients(make_group, divided_loss, config, *, stale):
    """The gradient at each of the four tokens where the policy has not moved since the start of the step."""
    algorithm, batch = batch_of(make_group, config, stale=stale)
    logprobs = [torch.full((2,), -2.0, requires_grad=True) for _ in range(2)]
    loss, means = divided_loss(algorithm, batch, logprobs, 1000, 1)
    loss.backward()
    return np.array([row.grad.tolist() for row in logprobs]), means, values(batch.metrics)


@pytest.mark.parametrize("name", list(ALGORITHMS))
@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"weight": "none"}, [[1, 1], [1, 1]]),
        ({}, [[1.5, 2], [0.4, 1]]),
        ({"cap": 10.0}, [[1.5, 3], [0.4, 1]]),
        ({"weight": "sequence", "cap": 10.0}, [[4.5, 4.5], [0.4, 0.4]]),
        ({"weight": "sequence"}, [[2, 2], [0.4, 0.4]]),
        ({"reject": "token", "high": 2.0}, [[1.5, 0], [0, 1]]),
        ({"weight": "none", "reject": "sequence"}, [[1, 1], [0, 0]]),
        ({"weight": "none", "reject": "sequence_mean", "high": 2.0, "low": 0.7}, [[0, 0], [0, 0]]),
        ({"weight": "none", "reject": "sequence_mean", "high": 2.2, "low": 0.6}, [[1, 1], [1, 1]]),
    ],
)
def test_gradients_are_those_of_fresh_samples_times_the_weight(make_group, divided_loss, name, settings, weights):
    """Old log-probs -2, so credit is the same in all; the decoupled objective has the policy's gradient at its
    centre."""
    config = ALGORITHMS[name](name=name, kl=FREE, off_policy=settings)
    plain, _, _ = gradients(make_group, divided_loss, config, stale=False)
    found, means, measured = gradients(make_group, divided_loss, config, stale=True)
    assert np.abs(plain).min() > 0
    assert found == pytest.approx(plain * np.array(weights), abs=1e-5)
    rejected = (np.array(weights) == 0).mean()
    assert measured["off_policy/rejected_fraction"] == pytest.approx(rejected)
    assert measured["off_policy/weight_mean"] == pytest.approx(np.mean(weights), abs=1e-5)
    # The policy has not moved, so that nothing else is truncated; what is rejected is not counted as truncated, too.
    assert measured["off_policy/truncated_fraction"] == pytest.approx(means["clip/fraction"])


def test_metrics_of_a_step(make_group):
    """Worked out by hand: k3 of the four log-ratios, mean, effective share and truncation of the weights."""
    _, batch = batch_of(make_group, RlooConfig(name="rloo", kl=FREE), stale=True)
    measured = values(batch.metrics)
    ratios, weights = np.array([1.5, 3.0, 0.4, 1.0]), np.array([1.5, 2.0, 0.4, 1.0])
    assert measured["off_policy/kl"] == pytest.approx((ratios - 1 - np.log(ratios)).mean(), abs=1e-6)
    assert measured["off_policy/ess_fraction"] == pytest.approx(weights.sum() ** 2 / (4 * (weights**2).sum()))
    assert measured["off_policy/truncated_fraction"] == 0.25


def test_fresh_samples_have_no_such_metrics(make_group):
    """A number of 1 or 0 would be read as a measurement."""
    _, batch = batch_of(make_group, RlooConfig(name="rloo", kl=FREE), stale=False)
    assert not [name for name in batch.metrics if name.startswith("off_policy/")]


def test_the_coupled_centre_clips_the_ratio_to_the_sampler(make_group, divided_loss):
    """Ratios (1.5, 3, .4, 1) with positive credit for the first row: above 1.2 no gradient, below .8 none for the
    loser; decoupled, every token has one."""
    coupled = GrpoConfig(name="grpo", kl=FREE, off_policy={"weight": "none"}, clip={"centre": "behavior"})
    found, means, _ = gradients(make_group, divided_loss, coupled, stale=True)
    assert (found == 0).tolist() == [[True, True], [True, False]]
    assert means["clip/above_fraction"] == 0.5 and means["clip/below_fraction"] == 0.25
    decoupled = GrpoConfig(name="grpo", kl=FREE)
    assert (gradients(make_group, divided_loss, decoupled, stale=True)[0] != 0).all()


def test_the_drift_within_a_step_is_weighed_at_the_same_level(make_group, divided_loss):
    """RLOO in a later minibatch: the policy moved by (ln 1.5, ln 2) at the first row, so its tokens weigh 3 each."""
    config = RlooConfig(name="rloo", kl=FREE, off_policy={"weight": "sequence", "cap": 10.0})
    group = make_group(0, [3.0, 1.0], [2, 2], {"old_logprobs": [[-1.0, -1.0]] * 2}, {})
    algorithm = build(config)
    batch, _ = algorithm.prepare([group], {})
    moved = [torch.tensor([-1 + math.log(1.5), -1 + math.log(2.0)], requires_grad=True), torch.full((2,), -1.0)]
    divided_loss(algorithm, batch, moved, 1000, 1)[0].backward()
    assert moved[0].grad.tolist() == pytest.approx([-3.0, -3.0], abs=1e-5)


# --- the KL as a loss: equal rewards give no credit, so that its gradient is alone

OLD, REF = -2.0, np.array([[-2.3, -1.5], [-1.8, -2.9]])
DRIFT = np.array([[math.log(1.2), math.log(0.5)], [0.0, math.log(1.25)]])  # of the policy, since the start of the step
PRICED = {"rloo": ({"name": "rloo"}, 2), "grpo": ({"name": "grpo", "aggregation": "token_mean"}, 4)}  # divided by


def kl_gradients(make_group, divided_loss, name, kl, settings):
    """The gradient at each of the four stale tokens, times what the learner divides by."""
    keys, divisor = PRICED[name]
    config = ALGORITHMS[name](**keys, kl={"place": "loss", **kl}, off_policy=settings)
    columns = {"behavior_logprobs": [[OLD - d for d in row] for row in DIFFERENCES], "old_logprobs": [[OLD] * 2] * 2}
    algorithm = build(config)
    batch, _ = algorithm.prepare([make_group(0, [1.0, 1.0], [2, 2], {**columns, "ref_logprobs": REF}, {})], {})
    logprobs = [torch.tensor(row, dtype=torch.float32, requires_grad=True) for row in OLD + DRIFT]
    divided_loss(algorithm, batch, logprobs, 1000, 1)[0].backward()
    return divisor * np.array([row.grad.tolist() for row in logprobs])


@pytest.mark.parametrize("name", list(PRICED))
@pytest.mark.parametrize("estimator", ["k2", "k2_token", "k3"])
@pytest.mark.parametrize(
    ("settings", "age", "drift"),
    [
        ({"weight": "none"}, [[1, 1], [1, 1]], [[1, 1], [1, 1]]),
        ({}, [[1.5, 2], [0.4, 1]], [[1.2, 0.5], [1, 1.25]]),
        ({"cap": 10.0}, [[1.5, 3], [0.4, 1]], [[1.2, 0.5], [1, 1.25]]),
        ({"weight": "sequence"}, [[2, 2], [0.4, 0.4]], [[0.6, 0.6], [1.25, 1.25]]),
        ({"reject": "token", "high": 2.0}, [[1.5, 0], [0, 1]], [[1.2, 0.5], [1, 1.25]]),
        ({"weight": "none", "reject": "sequence"}, [[1, 1], [0, 0]], [[1, 1], [1, 1]]),
    ],
)
def test_the_kl_loss_weighs_a_token_by_its_age_and_its_drift(
    make_group, divided_loss, name, estimator, settings, age, drift
):
    """Slopes by hand: S (k2 of the sum), d (of the token) and 1 - e^-d (k3), times both weights and the price."""
    distance = OLD + DRIFT - REF
    slopes = {
        "k2": np.repeat(distance.sum(1, keepdims=True), 2, axis=1),
        "k2_token": distance,
        "k3": 1 - np.exp(-distance),
    }
    found = kl_gradients(make_group, divided_loss, name, {"coef": 0.3, "loss_estimator": estimator}, settings)
    assert found == pytest.approx(0.3 * np.array(age) * np.array(drift) * slopes[estimator], abs=1e-5)
    assert kl_gradients(make_group, divided_loss, name, {"coef": 0.0}, settings) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("name", list(PRICED))
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_loss_of_stale_samples_has_the_policys_own_kl_gradient(make_group, divided_loss, name, estimator):
    """Three actions drawn by a sampler (.7,.2,.1), the policy is (.4,.35,.25): in expectation the gradient is that of
    the policy's exact KL, reverse for k2 and forward for k3, by autograd. Control: fresh samples of it would give
    another."""
    sampler, policy = (torch.tensor(p, dtype=torch.float64) for p in ([0.7, 0.2, 0.1], [0.4, 0.35, 0.25]))
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    logits = policy.log().requires_grad_()
    own = logits.log_softmax(0)
    forward = (reference * (reference.log() - own)).sum()
    exact = forward if estimator == "k3" else (own.exp() * (own - reference.log())).sum()
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)

    def found(cap: float) -> list[float]:
        kl = {"place": "loss", "coef": 1.0, "loss_estimator": estimator}
        config = ALGORITHMS[name](**PRICED[name][0], kl=kl, off_policy={"cap": cap})
        told = {"behavior_logprobs": sampler, "old_logprobs": policy, "ref_logprobs": reference}
        columns = {key: p.log()[:, None].tolist() for key, p in told.items()}
        algorithm = build(config)
        batch, _ = algorithm.prepare([make_group(0, [1.0] * 3, [1] * 3, columns, {})], {})
        logprobs = [torch.tensor([float(p.log())], requires_grad=True) for p in policy]
        divided_loss(algorithm, batch, logprobs, 1000, 1)[0].backward()
        # Three rows, or three tokens, is what the sum was divided by.
        slopes = 3 * torch.tensor([float(row.grad) for row in logprobs], dtype=torch.float64)
        return torch.autograd.grad((sampler * slopes * own).sum(), logits, retain_graph=True)[0].tolist()

    assert found(10.0) == pytest.approx(expected.tolist(), abs=1e-6)
    assert found(1e-6) != pytest.approx(expected.tolist(), abs=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"high": 3.0}, "high would do nothing"),
        ({"weight": "none", "cap": 3.0}, "cap would do nothing"),
        ({"reject": "token", "low": 5.0}, "low=5.0 must be below high=5.0"),
        ({"weight": "none", "fresh_too": True}, "fresh_too would do nothing"),
        ({"weight": "tokens"}, "'token', 'sequence' or 'none'"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        OffPolicyConfig(**settings)


def test_a_resolved_run_file_is_accepted_again():
    """Every key is set there, with its default."""
    for settings in ({}, {"reject": "token"}, {"weight": "none"}):
        config = RlooConfig(name="rloo", off_policy=settings)
        assert RlooConfig.model_validate(config.model_dump()) == config


def test_the_coupled_centre_with_a_weight_is_refused():
    """It would correct twice."""
    with pytest.raises(ValidationError, match=r"set off_policy\.weight to none"):
        GrpoConfig(name="grpo", clip={"centre": "behavior"})


def test_correcting_fresh_samples_makes_the_learner_compute_its_own_logprobs(tiny_run):
    """Synchronous, one optimizer step: nothing else would need them."""
    config = tiny_run({}, {}, {}, {})
    assert not needs_old_logprobs(config)
    algorithm = config.algorithm.model_copy(update={"off_policy": OffPolicyConfig(fresh_too=True)})
    assert needs_old_logprobs(config.model_copy(update={"algorithm": algorithm}))


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ([], True),
        (["algorithm.off_policy.fresh_too=true"], False),
        (["loop.max_staleness=1"], False),
        (["learner.minibatches=2"], False),
    ],
)
def test_a_rejection_that_could_reject_nothing_is_refused(settings, refused, capsys):
    """Where all samples are fresh and trained in one optimizer step there are no ratios to reject by."""
    config = str(Path(__file__).parents[1] / "configs" / "rloo_tiny.yaml")
    code = main(["plan", config, "algorithm.off_policy.reject=token", *settings])
    said = capsys.readouterr().err
    assert (code == 2) == refused and ("algorithm.off_policy.reject=token would do nothing" in said) == refused
