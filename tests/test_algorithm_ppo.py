"""PPO from groups to updates of policy and critic on the tiny model. GAE and the losses themselves: test_ops_gae,
test_ops_ppo_losses.

Not covered: DeepSpeed and its ranks (test_learner_deepspeed), the actors of a Ray team, bfloat16.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import TypeAdapter
from torch import Tensor

from rlhf.algorithms.table import build
from rlhf.blueprint import draw
from rlhf.config import AlgorithmConfig, PpoConfig, RunConfig
from rlhf.errors import BadInput
from rlhf.experience import ADVANTAGES, OLD_LOGPROBS, RETURNS, VALUES, Group, TrainBatch, fill_in
from rlhf.learner.collate import collate
from rlhf.learner.paired import PairedLearner
from rlhf.learner.plan import plan, units_of
from rlhf.metrics import values

ROOT = Path(__file__).parents[1]
FREE = {"coef": 0.0}


def ppo(**settings: Any):
    return build(PpoConfig(name="ppo", **{"kl": FREE, "whiten_advantages": False, **settings}))


@pytest.fixture
def golden(make_group: Callable[..., Group]) -> Group:
    """G-GAE-KL: values .5 .4 .3, log-ratios .2 -.1 .4, score 1."""
    columns = {"values": [[0.5, 0.4, 0.3]], "old_logprobs": [[-0.8, -1.1, -0.6]], "ref_logprobs": [[-1.0] * 3]}
    return make_group(0, [1.0], [3], columns, {})


def column(batch: TrainBatch, name: str) -> list[list[float]]:
    return [row.tokens[name].tolist() for row in batch.rows]


def test_golden_vectors(golden: Group) -> None:
    """Advantages and returns of the columns, with the KL paid by each token, and without it."""
    batch, state = ppo(kl={"coef": 0.05}).prepare([golden], {})
    assert column(batch, ADVANTAGES)[0] == pytest.approx([0.41345, 0.551, 0.68], abs=1e-5)
    assert column(batch, RETURNS)[0] == pytest.approx([0.91345, 0.951, 0.98], abs=1e-5)
    assert column(batch, VALUES)[0] == pytest.approx([0.5, 0.4, 0.3])
    assert batch.normalizer == "tokens" and state == {}
    for free in (ppo(), ppo(kl={"coef": 0.05, "place": "loss"})):
        batch, _ = free.prepare([golden], {})
        assert column(batch, ADVANTAGES)[0] == pytest.approx([0.43675, 0.565, 0.7], abs=1e-5)


def three_groups(make_group: Callable[..., Group]) -> list[Group]:
    lengths, random = [[3, 5], [1, 2], [4, 4]], np.random.default_rng(0)
    return [
        make_group(
            i, random.normal(size=2).tolist(), own, {"values": [random.normal(size=length) for length in own]}, {}
        )
        for i, own in enumerate(lengths)
    ]


def test_whitening_is_over_the_whole_step_and_does_not_move_returns(make_group: Callable[..., Group]) -> None:
    """Trap 34: the same returns; advantages of mean 0 and deviation 1 that are one affine map of the plain ones."""
    groups = three_groups(make_group)
    (plain, _), (white, _) = ppo().prepare(groups, {}), ppo(whiten_advantages=True).prepare(groups, {})
    assert column(plain, RETURNS) == column(white, RETURNS)
    before, after = (np.concatenate(column(batch, ADVANTAGES)) for batch in (plain, white))
    assert after.mean() == pytest.approx(0, abs=1e-6) and after.std() == pytest.approx(1, abs=1e-5)
    assert after == pytest.approx((before - before.mean()) / before.std(), abs=1e-5)


def test_scaled_rewards_keep_their_mean(make_group: Callable[..., Group]) -> None:
    """With values 0 and lambda 1 a row's first return is the sum of its rewards: over all rows it stays."""
    zero = {"values": [[0.0] * 3, [0.0] * 5]}
    group = make_group(0, [1.0, -3.0], [3, 5], zero, {})
    totals = []
    for scaled in (False, True):
        batch, _ = ppo(lam=1.0, whiten_rewards=scaled).prepare([group], {})
        totals.append([row[0] for row in column(batch, RETURNS)])
    assert sum(totals[0]) == pytest.approx(sum(totals[1]), abs=1e-5) and totals[0] != totals[1]


def test_scaled_rewards_are_divided_by_their_deviation_around_their_mean(make_group: Callable[..., Group]) -> None:
    """By hand: the rewards of four tokens are 4 | 0 0 4, mean 2 and deviation 2, so 3 | 1 1 3; padding is no token.
    With a price of .5 and d = 2, 0, 0, -4 they are 3 | 0 0 6, mean 2.25 and deviation sqrt(6.1875). Lambda 1 and
    values 0: returns are what is still to come, and so are advantages."""
    columns = {
        "values": [[0.0], [0.0] * 3],
        "old_logprobs": [[-1.0], [-1.0] * 3],
        "ref_logprobs": [[-3.0], [-1.0, -1.0, 3.0]],
    }
    group = make_group(0, [4.0, 4.0], [1, 3], columns, {})
    low, middle, high = (2.25 + (reward - 2.25) / 6.1875**0.5 for reward in (0.0, 3.0, 6.0))
    for kl, expected in [
        (FREE, [[3.0], [5.0, 4.0, 3.0]]),
        ({"coef": 0.5}, [[middle], [2 * low + high, low + high, high]]),
    ]:
        batch, _ = ppo(lam=1.0, whiten_rewards=True, kl=kl).prepare([group], {})
        for name in (RETURNS, ADVANTAGES):
            assert [x for row in column(batch, name) for x in row] == pytest.approx(
                [x for row in expected for x in row], abs=1e-5
            )


def test_a_row_does_not_depend_on_the_others(make_group: Callable[..., Group]) -> None:
    """Trap 35: alone, or padded beside longer rows, in any order of groups: the same columns."""
    groups = three_groups(make_group)
    alone = [ppo().prepare([group], {})[0] for group in groups]
    batch, _ = ppo().prepare(list(reversed(groups)), {})
    for name in (ADVANTAGES, RETURNS):
        assert column(batch, name) == [row for one in alone for row in column(one, name)]


def test_masked_tokens_are_skipped_and_unscorable_samples_left_out(make_group: Callable[..., Group]) -> None:
    """G-GAE-SKIP; a sample without a reward is no row, an empty or fully masked completion is one without credit."""
    group = make_group(
        0, [1.0, None, 1.0, 1.0], [5, 2, 0, 1], {"values": [[0.5, 0.4, 7.0, 8.0, 0.3], [0.0] * 2, [], [1.0]]}, {}
    )
    masks = [np.array([1, 1, 0, 0, 1], bool), np.ones(2, bool), np.ones(0, bool), np.zeros(1, bool)]
    samples = tuple(replace(s, loss_mask=m) for s, m in zip(group.samples, masks, strict=True))
    batch, _ = ppo().prepare([replace(group, samples=samples)], {})
    first, empty, masked = column(batch, ADVANTAGES)
    assert first == pytest.approx([0.43675, 0.565, 0.0, 0.0, 0.7], abs=1e-5) and empty == [] and masked == [0.0]
    nothing, _ = ppo(whiten_advantages=True, whiten_rewards=True).prepare([make_group(0, [None], [1], {}, {})], {})
    assert nothing.rows == ()


def test_what_is_measured_of_the_critic(make_group: Callable[..., Group]) -> None:
    """Explained variance: 1 for values that are the returns, 0 for one number, nothing where all returns are equal."""
    for said, expected in [([2.0, 2.0], 1.0), ([0.5, 0.5], 0.0)]:
        rows = [said, [-1.0 if expected else 0.5]]
        batch, _ = ppo(lam=1.0).prepare([make_group(0, [2.0, -1.0], [2, 1], {"values": rows}, {})], {})
        assert values(batch.metrics)["value/explained_variance"] == pytest.approx(expected)
    batch, _ = ppo(lam=1.0).prepare([make_group(0, [2.0], [2], {"values": [[0.0, 1.0]]}, {})], {})
    assert "value/explained_variance" not in values(batch.metrics)
    with pytest.raises(ValueError, match="no column 'values'"):
        ppo().prepare([make_group(0, [2.0], [2], {}, {})], {})


@pytest.mark.parametrize(
    "bad",
    [
        {"gamma": 1.1},
        {"lam": -0.1},
        {"critic": {"lr": 0.0}},
        {"critic": {"value_clip": 0.0}},
        {"clip": {"dual": 1.0}},
        {"aggregation": "token_mean"},
        {"critic": {"model": "x"}},
    ],
)
def test_settings_that_cannot_work_are_refused(bad: dict[str, Any]) -> None:
    """By their key; one sample a prompt is enough, and no bound on the values is a choice."""
    read = TypeAdapter(AlgorithmConfig).validate_python
    with pytest.raises(ValueError, match=next(iter(bad))):
        read({"name": "ppo", **bad})
    fine = read({"name": "ppo", "samples_per_prompt": 1, "critic": {"value_clip": None}})
    assert fine.samples_per_prompt == 1 and fine.critic.value_clip is None


@pytest.fixture
def make(tiny_run: Callable[..., RunConfig]) -> Callable[..., PairedLearner]:
    def build_one(learner: Mapping[str, Any], model: Mapping[str, Any], algorithm: Mapping[str, Any]) -> PairedLearner:
        plain = tiny_run(model, {"lr": 1e-3, **learner}, {}, {})
        settings = {"name": "ppo", "samples_per_prompt": 4, "kl": FREE, "critic": {"lr": 1e-3}, **algorithm}
        config = RunConfig.model_validate({**plain.model_dump(exclude_unset=True), "algorithm": settings})
        made = PairedLearner(config, build(config.algorithm), 0, 1, None)
        made.setup()
        return made

    return build_one


@pytest.fixture
def groups(sampled_groups: Callable[..., list[Group]]) -> list[Group]:
    return sampled_groups(0, 4, 4, 0, 1.0)


def prepared(learner: PairedLearner, groups: Sequence[Group]) -> TrainBatch:
    return learner.prepare(fill_in(groups, learner.annotate_share(groups)))


def copies(engine: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in engine.policy.named_parameters()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_ratio_of_the_first_minibatch_is_exactly_one(
    make: Callable[..., PairedLearner], groups: list[Group]
) -> None:
    """Old log-probs are always filled in, also for one step on fresh samples; then nothing is clipped, and the values
    of the first pass are the old ones. Control: a second epoch moves both."""
    learner = make({}, {}, {})
    batch = prepared(learner, groups)
    (micros,) = plan(units_of(batch.rows), 1, 128, packed=False)
    with torch.no_grad():
        for micro in micros:
            made = collate(micro, [OLD_LOGPROBS, VALUES], packed=False)
            logprobs = made.outputs(*learner.policy._engine.forward(made.inputs)).logprobs
            scores = made.scores(*learner.critic._engine.forward(made.inputs)).values
            assert torch.equal((logprobs - made.batch.tokens[OLD_LOGPROBS]).exp(), torch.ones_like(logprobs))
            assert torch.equal(scores, made.batch.tokens[VALUES])
    measured = values(learner.update(batch))
    clipped = {name: value for name, value in measured.items() if name.startswith("clip/") and name != "clip/fraction"}
    assert len(clipped) == 5 and not any(clipped.values())
    again = make({"epochs": 3, "lr": 1e-2}, {}, {"critic": {"lr": 1e-2, "value_clip": 0.01}})
    moved = values(again.update(prepared(again, groups)))
    assert moved["clip/above_fraction"] + moved["clip/below_fraction"] > 0 and moved["clip/value_fraction"] > 0


def vanilla() -> dict[str, Any]:
    """The algorithm of its run file, without a price of the KL."""
    content = yaml.safe_load((ROOT / "configs" / "vanilla_pg_tiny.yaml").read_text())
    return {**content["algorithm"], "kl": FREE}


@pytest.mark.parametrize("whitened", [True, False])
def test_vanilla_policy_gradient_is_reinforce_with_the_critics_baseline(
    make: Callable[..., PairedLearner], groups: list[Group], whitened: bool
) -> None:
    """The gradient that reaches the policy's optimizer against autograd of -mean_t A_t log pi_t on the transformers
    model, with A = GAE(1) of the same critic: what is still to be paid, the score, less V; whitened as the run file
    says. Control: lambda .95 is another gradient."""
    settings = {**vanilla(), "whiten_advantages": whitened, "off_policy": {"weight": "none"}}

    def reached(algorithm: dict[str, Any]) -> dict[str, Tensor]:
        learner = make({}, {}, algorithm)
        engine, step = learner.policy._engine, learner.policy._engine.step
        found: dict[str, Tensor] = {}

        def note(lr: float) -> Any:
            found.update({name: p.grad.clone() for name, p in engine.policy.base.named_parameters()})
            return step(lr)

        engine.step = note
        learner.update(prepared(learner, groups))
        return found

    learner = make({}, {}, settings)
    policy, critic = learner.policy._engine.policy.base, learner.critic._engine.policy.base
    said, credit = [], []
    for group in groups:
        for sample in group.samples:
            ids = torch.from_numpy(np.append(group.prompt.token_ids, sample.token_ids).astype(np.int64))
            before = slice(len(group.prompt.token_ids) - 1, len(ids) - 1)
            logprobs = (policy(input_ids=ids[None]).logits[0] / 0.7).log_softmax(-1)
            said.append(logprobs[before].gather(1, torch.from_numpy(sample.token_ids.astype(np.int64))[:, None])[:, 0])
            with torch.no_grad():
                values_of = critic.score(critic.model(input_ids=ids[None]).last_hidden_state)[0, before, 0]
            score = sample.scores["reward"]
            assert score is not None
            credit.append(score - values_of)
    advantages = torch.cat(credit)
    if whitened:
        advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    (-(advantages * torch.cat(said)).mean()).backward()
    found, other = reached(settings), reached({**settings, "lam": 0.95})
    expected = {name: parameter.grad for name, parameter in policy.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert all(torch.allclose(found[name], expected[name], atol=1e-5 * max(1, largest)) for name in expected)
    assert any(not torch.allclose(other[name], expected[name], atol=1e-3 * largest) for name in expected)


def test_vanilla_policy_gradient_clips_nothing_however_far_the_ratio_is(
    make_group: Callable[..., Group], divided_loss: Callable[..., Any]
) -> None:
    """Ratios e^5 and e^-5 with credit of both signs: the slope of every token is -A rho / 4. PPO's clip of .2, the
    control, leaves no gradient at two of them."""
    old = [[-6.0] * 2] * 2
    columns = {"values": [[0.0] * 2] * 2, "old_logprobs": old, "behavior_logprobs": old}
    group = make_group(0, [1.0, -1.0], [2, 2], columns, {})

    def slopes(settings: dict[str, Any]) -> list[float]:
        algorithm = ppo(**{key: value for key, value in settings.items() if key not in ("name", "whiten_advantages")})
        moved = [torch.tensor([-1.0, -11.0], requires_grad=True) for _ in range(2)]
        divided_loss(algorithm, algorithm.prepare([group], {})[0], moved, 1000, 1)[0].backward()
        return [x for row in moved for x in row.grad.tolist()]

    up, down = np.exp(5.0), np.exp(-5.0)
    assert slopes(vanilla()) == pytest.approx([-up / 4, -down / 4, up / 4, down / 4], rel=1e-4)
    clipped = slopes({"lam": 1.0})
    assert [x == 0 for x in clipped] == [True, False, False, True]


def test_values_are_read_before_the_token_and_packing_does_not_matter(
    make: Callable[..., PairedLearner], groups: list[Group]
) -> None:
    """Other last tokens leave all values as they are, other first tokens all but the first; packed rows to 1e-5."""
    learner = make({}, {}, {})

    def read(one: PairedLearner, given: Sequence[Group]) -> list[np.ndarray]:
        return [array for columns in one.critic.annotate_share(given) for array in columns.tokens[VALUES]]

    def with_token(place: int) -> list[Group]:
        changed = []
        for group in groups:
            ids = [sample.token_ids.copy() for sample in group.samples]
            for own in ids:
                own[place] = 7
            samples = tuple(replace(s, token_ids=own) for s, own in zip(group.samples, ids, strict=True))
            changed.append(replace(group, samples=samples))
        return changed

    plain, packed = read(learner, groups), read(make({"packing": True}, {}, {}), groups)
    for mine, theirs in zip(plain, packed, strict=True):
        assert np.abs(mine - theirs).max() <= 1e-5
    for mine, last, first in zip(plain, read(learner, with_token(-1)), read(learner, with_token(0)), strict=True):
        assert np.array_equal(mine, last) and mine[0] == first[0]
        assert len(mine) == 1 or (mine[1:] != first[1:]).any()


def test_policy_and_critic_do_not_touch_each_other(make: Callable[..., PairedLearner], groups: list[Group]) -> None:
    """The critic's step leaves the policy as it was to the bit, and the other way round; each moves all its tensors."""
    learner = make({}, {}, {})
    batch = prepared(learner, groups)
    policy, critic = copies(learner.policy._engine), copies(learner.critic._engine)
    learner.critic.update(batch)
    assert same(copies(learner.policy._engine), policy)
    after = copies(learner.critic._engine)
    assert all(not torch.equal(critic[name], after[name]) for name in critic)
    assert all(parameter.grad is None for parameter in learner.policy._engine.policy.parameters())
    learner.policy.update(batch)
    assert same(copies(learner.critic._engine), after) and not same(copies(learner.policy._engine), policy)


def test_the_critics_gradient_does_not_depend_on_how_the_batch_is_cut(
    make: Callable[..., PairedLearner], groups: list[Group]
) -> None:
    """One row a micro-batch or all at once: the same gradient norm and loss, so one division by the global count."""
    found = []
    for budget in (1, 4096):
        learner = make({"tokens_per_microbatch": budget}, {}, {})
        measured = values(learner.update(prepared(learner, groups)))
        found.append([measured["value/grad_norm"], measured["loss/value"]])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_critic_learns_what_was_paid(
    make: Callable[..., PairedLearner], sampled_groups: Callable[..., list[Group]]
) -> None:
    """The same rewarded groups again and again, with lambda 1: the explained variance rises from below .1 to .8."""
    learner = make({"lr": 1e-9}, {}, {"lam": 1.0, "critic": {"lr": 3e-3, "value_clip": None}})
    explained = []
    for version in range(40):
        batch = prepared(learner, sampled_groups(0, 4, 4, version, 1.0))
        explained.append(values(batch.metrics)["value/explained_variance"])
        learner.update(batch)
    assert explained[0] < 0.1 and explained[-1] > 0.8


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_going_on_from_a_checkpoint_equals_never_stopping(
    make: Callable[..., PairedLearner],
    sampled_groups: Callable[..., list[Group]],
    tmp_path: Path,
    lora: dict[str, int] | None,
) -> None:
    """Trap 63, bitwise, for the policy and the critic; a checkpoint without a critic is refused."""
    settings = {"minibatches": 2, "schedule": "linear"}

    def go(learner: PairedLearner, steps: range) -> PairedLearner:
        for step in steps:
            learner.update(prepared(learner, sampled_groups(step, 4, 4, step, 1.0)))
        return learner

    whole = go(make(settings, {"lora": lora}, {}), range(4))
    go(make(settings, {"lora": lora}, {}), range(2)).save(tmp_path)
    second = make(settings, {"lora": lora}, {})
    second.load(tmp_path)
    go(second, range(2, 4))
    assert same(copies(whole.critic._engine), copies(second.critic._engine))
    assert same(copies(whole.policy._engine), copies(second.policy._engine))
    (tmp_path / "trainer" / "critic").rename(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="and has a critic"):
        second.load(tmp_path)


def test_the_learner_and_nobody_else_fills_the_values(make: Callable[..., PairedLearner]) -> None:
    """Judges give the reward, and the reference where it has a price; the learner annotates in any case."""
    for coef, judged in [(0.0, {"reward"}), (0.1, {"reward", "ref_logprobs"})]:
        plan_of = draw(make({}, {}, {"kl": {"coef": coef}}).policy._config)
        assert plan_of.judged == judged and plan_of.learner_annotates
