"""DPO, online DPO and RSO: who is paired, what is counted, what a micro-batch's loss is. Golden numbers, invariances.

Not covered: the equations (test_ops_preferences, test_ops_rejection), ranks as processes, whether it learns
(test_learning_online, test_learning_offline)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rlhf.algorithms import Algorithm
from rlhf.algorithms.table import build
from rlhf.blueprint import draw
from rlhf.config import DpoConfig, OnlineDpoConfig, PreferenceLossConfig, RsoConfig, RunConfig
from rlhf.experience import Group, TrainBatch, fill_in
from rlhf.judges.reference import ReferenceJudge
from rlhf.learner.collate import collate
from rlhf.learner.learner import PolicyLearner
from rlhf.learner.plan import plan, units_of
from rlhf.metrics import values
from rlhf.models.load import load_model
from rlhf.models.policy import PolicyModel
from rlhf.ops.microbatch import MicroBatch, Outputs
from rlhf.seeding import seed_for

EXTRA = {"conservative": {"label_noise": 0.1}, "robust": {"label_noise": 0.1}, "simpo": {"target_margin": 0.5}}
NAMES = [
    "sigmoid", "sigmoid_length_norm", "hinge", "slic_hinge", "ipo", "conservative", "robust", "simpo", "orpo",
    "sppo_hard",
]  # fmt: skip


def price(name: str, beta: float) -> dict[str, Any]:
    return {"name": name, "beta": beta, **EXTRA.get(name, {})}


def dpo(name: str = "sigmoid", beta: float = 0.1, **settings: Any) -> Algorithm:
    return build(DpoConfig.model_validate({"name": "dpo", "loss": price(name, beta), **settings}))


def online(name: str = "sigmoid") -> Algorithm:
    return build(OnlineDpoConfig.model_validate({"name": "online_dpo", "loss": price(name, 0.1)}))


def rso(samples: int, accept: int, rejection: Mapping[str, Any], **settings: Any) -> Algorithm:
    return build(
        RsoConfig.model_validate(
            {
                "name": "rso",
                "samples_per_prompt": samples,
                "rejection": {"beta": 0.5, "accept": accept, **rejection},
                "loss": {"beta": 0.1},
                **settings,
            }
        )
    )


def reference(lengths: Sequence[int]) -> dict[str, list[list[float]]]:
    return {"ref_logprobs": [[-2.0] * n for n in lengths]}


def as_given(group: Group, ranks: Sequence[float | None]) -> Group:
    """The group as a data set would hold it: no sampler, ranks instead of rewards."""
    samples = tuple(
        replace(
            s, behavior_logprobs=None, versions=None, sampling=None, seed=None, finish_reason="given", scores=scores
        )
        for s, scores in zip(group.samples, ({"rank": rank} for rank in ranks), strict=True)
    )
    return replace(group, samples=samples, origin="dataset")


def tokens_of(batch: TrainBatch) -> list[tuple[int, int]]:
    """(unit, length) of each row: the fixtures' samples are told apart by their lengths."""
    return [(row.unit, len(row.completion_ids)) for row in batch.rows]


def counted(batch: TrainBatch, *names: str) -> list[float]:
    measured = values(batch.metrics)
    return [measured.get(name, 0.0) for name in names]


MADE = ("pairs/made", "pairs/ties", "pairs/identical", "pairs/empty", "groups/dropped")


# --- who is paired


def test_given_pairs_are_two_adjacent_rows_at_temperature_one(make_group: Callable[..., Group]) -> None:
    """By rank, not by place, and in the order of prompt ids; no column of a sampler; the same prompt ids on both
    sides (trap 20)."""
    groups = [
        as_given(make_group(4, [0, 0], [5, 6], reference([5, 6]), {}), [1.0, 0.0]),
        as_given(make_group(2, [0, 0], [3, 4], reference([3, 4]), {}), [0.0, 1.0]),
    ]
    batch, state = dpo().prepare(groups, {})
    assert tokens_of(batch) == [(0, 3), (0, 4), (1, 6), (1, 5)]
    assert batch.normalizer == "units" and state == {}
    assert {row.temperature for row in batch.rows} == {1.0}
    assert all(set(row.tokens) == {"ref_logprobs"} for row in batch.rows)
    assert np.array_equal(batch.rows[0].prompt_ids, batch.rows[1].prompt_ids)
    assert counted(batch, *MADE) == [2, 0, 0, 0, 0]


def test_best_against_worst_or_every_pair_of_ranked_completions(make_group: Callable[..., Group]) -> None:
    """Four completions with ranks (2, 0, 1, 1): one pair, or five and a tie."""
    group = as_given(make_group(0, [0] * 4, [2, 3, 4, 5], reference([2, 3, 4, 5]), {}), [2.0, 0.0, 1.0, 1.0])
    assert tokens_of(dpo().prepare([group], {})[0]) == [(0, 3), (0, 2)]
    batch, _ = dpo(compare="all").prepare([group], {})
    assert {(a, b) for (_, a), (_, b) in zip(tokens_of(batch)[::2], tokens_of(batch)[1::2], strict=True)} == {
        (3, 2), (4, 2), (5, 2), (3, 4), (3, 5),
    }  # fmt: skip
    assert counted(batch, *MADE) == [5, 1, 0, 0, 0]


def test_pairs_of_given_completions_by_reward(make_group: Callable[..., Group]) -> None:
    """preferred_by: reward needs that column and none of ranks."""
    algorithm = dpo(preferred_by="reward")
    batch, _ = algorithm.prepare([make_group(0, [1.0, 4.0], [2, 3], reference([2, 3]), {})], {})
    assert tokens_of(batch) == [(0, 3), (0, 2)]
    assert algorithm.needs == {"reward", "ref_logprobs"} and dpo().needs == {"rank", "ref_logprobs"}


def test_online_pairs_the_best_with_the_worst(make_group: Callable[..., Group]) -> None:
    """Unscorable samples take no part; the rows keep their sampler's temperature and log-probs."""
    group = make_group(0, [1.0, None, 5.0, 0.5], [1, 2, 3, 4], reference([1, 2, 3, 4]), {})
    batch, _ = online().prepare([group], {})
    assert tokens_of(batch) == [(0, 3), (0, 4)]
    assert {row.temperature for row in batch.rows} == {0.7}
    assert all(set(row.tokens) == {"ref_logprobs", "behavior_logprobs"} for row in batch.rows)
    measured = values(batch.metrics)
    assert measured["faults/unscorable"] == 1.0 and measured["reward/mean"] == pytest.approx(6.5 / 3)
    assert measured["kl/k1"] == pytest.approx(2.5)  # -1 against -2 at each token, 2.5 tokens on average
    assert measured["pairs/chosen_length_mean"] == 3.0 and measured["pairs/longer_chosen"] == -1.0


def test_what_makes_no_pair_is_counted(make_group: Callable[..., Group]) -> None:
    """Trap 41 (equal rewards: 0 pairs, 6 ties), equal texts, a side without a trained token, one scorable sample; the
    batch that is left is empty and its numbers finite."""
    columns = reference([2, 2])
    same = make_group(1, [1.0, 2.0], [2, 2], columns, {})
    same = replace(same, samples=tuple(replace(sample, text="same") for sample in same.samples))
    empty = make_group(2, [1.0, 2.0], [2, 2], columns, {})
    untrained = replace(empty.samples[1], loss_mask=np.zeros(2, np.bool_))
    groups = [
        make_group(0, [1.0] * 4, [2] * 4, reference([2] * 4), {}),
        same,
        replace(empty, samples=(empty.samples[0], untrained)),
        make_group(3, [1.0, None], [2, 2], columns, {}),
        make_group(4, [None, None], [2, 2], columns, {}),
    ]
    batch, _ = online().prepare(groups, {})
    assert batch.rows == ()
    assert counted(batch, *MADE, "pairs/groups_without_fraction") == [0, 6, 1, 1, 2, 1]
    assert all(np.isfinite(number) for number in values(batch.metrics).values())


def test_missing_columns_and_greedy_samples_are_named(make_group: Callable[..., Group]) -> None:
    """Which prompt, which sample, what there is."""
    group = make_group(3, [1.0, 2.0], [1, 1], {}, {})
    with pytest.raises(ValueError, match=r"prompt 3, sample 1: no column 'ref_logprobs'"):
        online().prepare([group], {})
    with pytest.raises(ValueError, match=r"prompt 3, sample 0: no column 'rank', only \['reward'\]"):
        dpo().prepare([group], {})
    greedy = tuple(replace(s, sampling=replace(s.sampling, temperature=0.0)) for s in group.samples)
    with pytest.raises(ValueError, match="prompt 3, sample 1 was sampled greedily"):
        online("simpo").prepare([replace(group, samples=greedy)], {})


def test_a_loss_without_a_reference_needs_none(make_group: Callable[..., Group]) -> None:
    """Which decides whether a reference model is built at all."""
    for name in ("slic_hinge", "simpo", "orpo"):
        assert online(name).needs == {"reward"} and dpo(name).needs == {"rank"}
    batch, _ = online("simpo").prepare([make_group(0, [1.0, 2.0], [1, 2], {}, {})], {})
    assert all(set(row.tokens) == {"behavior_logprobs"} for row in batch.rows)


# --- RSO


def candidates(make_group: Callable[..., Group], prompt_id: int, rewards: Sequence[float | None]) -> Group:
    """Candidates whose lengths count up from 1."""
    lengths = list(range(1, len(rewards) + 1))
    return make_group(prompt_id, rewards, lengths, reference(lengths), {})


def test_rso_keeps_the_best_at_beta_zero_and_pairs_them(make_group: Callable[..., Group]) -> None:
    """Of rewards 0..7 the best four: two disjoint pairs, or three of a tournament that the best wins."""
    group = candidates(make_group, 0, [float(i) for i in range(8)])
    batch, _ = rso(8, 4, {"beta": 0.0}).prepare([group], {})
    assert sorted(length for _, length in tokens_of(batch)) == [5, 6, 7, 8]
    assert values(batch.metrics)["rejection/accepted_reward_mean"] == 5.5
    assert "rejection/acceptance_expected" not in batch.metrics
    batch, _ = rso(8, 4, {"beta": 0.0}, pairing="tournament").prepare([group], {})
    assert counted(batch, *MADE) == [3, 0, 0, 0, 0]
    assert all(a > b for (_, a), (_, b) in zip(tokens_of(batch)[::2], tokens_of(batch)[1::2], strict=True))


def cut_short(group: Group, *indices: int) -> Group:
    samples = (replace(s, finish_reason="length") if s.index in indices else s for s in group.samples)
    return replace(group, samples=tuple(samples))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [(0, 3), (0, 2)]),
        ({"missing_eos": {"fixed_score": -1.0}}, [(0, 4), (0, 3)]),
        ({"missing_eos": {"penalty": 4.5}}, [(0, 4), (0, 2)]),
        ({"reward_clip": 2.0, "missing_eos": {"penalty": 1.5}}, [(0, 4), (0, 3)]),
    ],
)
def test_online_dpo_compares_what_is_left_of_a_score(
    make_group: Callable[..., Group], settings: dict[str, Any], expected: list[tuple[int, int]]
) -> None:
    """Trap 86: scores 1, 6, 5 by length 2, 3, 4, of which 3 has no end: 6 becomes -1, 1.5, or (clipped first) 0.5. The
    logged reward stays the judge's."""
    algorithm = build(OnlineDpoConfig.model_validate({"name": "online_dpo", "loss": {"beta": 0.1}, **settings}))
    group = cut_short(make_group(0, [1.0, 6.0, 5.0], [2, 3, 4], reference([2, 3, 4]), {}), 1)
    batch, _ = algorithm.prepare([group], {})
    assert tokens_of(batch) == expected and values(batch.metrics)["reward/mean"] == 4.0


def test_rso_rejects_by_what_is_left_of_a_score(make_group: Callable[..., Group]) -> None:
    """At beta 0 the two best are kept: of 1 to 4 (lengths 1 to 4) the fourth is not, once it lacks its end."""
    group = candidates(make_group, 0, [1.0, 2.0, 3.0, 4.0])
    kept = []
    for rule in ({}, {"missing_eos": {"fixed_score": -1.0}}):
        batch, _ = rso(4, 2, {"beta": 0.0}, **rule).prepare([cut_short(group, 3)], {})
        kept.append({length for _, length in tokens_of(batch)})
    assert kept == [{3, 4}, {2, 3}]


def test_rso_draws_by_address(make_group: Callable[..., Group]) -> None:
    """Whatever the order of groups and whatever else is in the step, a prompt's pairs are the same (raw units); two
    prompts with the same rewards and seeds of samples draw differently."""
    algorithm = rso(8, 4, {"reward_units": "raw"})
    rewards = [float(i % 5) for i in range(8)]
    groups = [candidates(make_group, i, rewards) for i in range(6)]
    whole = tokens_of(algorithm.prepare(groups, {})[0])
    assert whole == tokens_of(algorithm.prepare(groups[::-1], {})[0])
    alone = [[length for _, length in tokens_of(algorithm.prepare([group], {})[0])] for group in groups]
    assert [length for part in alone for length in part] == [length for _, length in whole]
    assert len({tuple(part) for part in alone}) > 1


def test_rso_draws_anew_for_each_run_seed_prompt_and_issue(make_group: Callable[..., Group]) -> None:
    """The seeds of samples are addresses in a run, of its seed and of a prompt's id, which a step never issues twice.
    All else equal, other addresses keep other candidates (a hot target), and pair the same ones otherwise (beta 0
    keeps the best four); the same address draws the same."""

    def issued(run_seed: int, prompt_id: int) -> Group:
        group = candidates(make_group, prompt_id, [float(i) for i in range(8)])
        seeds = [seed_for(run_seed, "sample", prompt_id, index) for index in range(8)]
        return replace(group, samples=tuple(replace(s, seed=n) for s, n in zip(group.samples, seeds, strict=True)))

    def drawn(rejection: Mapping[str, Any], run_seed: int, prompt_id: int) -> tuple[frozenset[int], tuple[int, ...]]:
        """The completions that take part in a pair, and the pairs, by length."""
        batch, _ = rso(8, 4, rejection).prepare([issued(run_seed, prompt_id)], {})
        lengths = tuple(length for _, length in tokens_of(batch))
        return frozenset(lengths), lengths

    for addresses in ([(run_seed, 3) for run_seed in range(6)], [(1, prompt_id) for prompt_id in range(6)]):
        kept = [drawn({"beta": 5.0}, *address)[0] for address in addresses]
        assert len(set(kept)) > 2 and kept == [drawn({"beta": 5.0}, *address)[0] for address in addresses]
        pairs = [drawn({"beta": 0.0}, *address) for address in addresses]
        assert {best for best, _ in pairs} == {frozenset({5, 6, 7, 8})}
        assert len({pair for _, pair in pairs}) > 2


def test_beta_counts_standard_deviations_or_the_rewards_own_units(make_group: Callable[..., Group]) -> None:
    """Standardised, rewards of another scale give the same pairs and acceptance; beta is logged in the reward's units.
    G-RSO: rewards (3, 2, 1) at beta 1 are expected to be accepted with .50107. Raw, another scale changes both."""
    few, scaled = [3.0, 2.0, 1.0], [310.0, 210.0, 110.0]
    raw = [rso(3, 2, {"beta": 1.0, "reward_units": "raw"}).prepare([candidates(make_group, 0, r)], {})[0] for r in
           (few, scaled)]  # fmt: skip
    assert values(raw[0].metrics)["rejection/acceptance_expected"] == pytest.approx(0.50107, abs=1e-5)
    assert values(raw[1].metrics)["rejection/acceptance_expected"] == pytest.approx(1 / 3)
    assert [values(batch.metrics)["rejection/beta"] for batch in raw] == [1.0, 1.0]
    algorithm = rso(3, 2, {"beta": 0.5})
    same = [algorithm.prepare([candidates(make_group, 0, r)], {})[0] for r in (few, scaled)]
    deviation = (2 / 3) ** 0.5
    assert [values(batch.metrics)["rejection/beta"] for batch in same] == pytest.approx(
        [0.5 * deviation, 50 * deviation]
    )
    assert tokens_of(same[0]) == tokens_of(same[1])
    expected = [values(batch.metrics)["rejection/acceptance_expected"] for batch in same]
    assert expected[0] == pytest.approx(expected[1])


def test_repeats_of_exact_mode_are_never_paired_with_themselves(make_group: Callable[..., Group]) -> None:
    """Beta so cold that only the best is accepted: four copies, no pair, two comparisons counted as identical."""
    group = candidates(make_group, 0, [9.0, 1.0, 2.0, 3.0])
    batch, _ = rso(4, 4, {"mode": "exact", "beta": 1e-9, "reward_units": "raw"}).prepare([group], {})
    assert batch.rows == () and counted(batch, *MADE) == [0, 0, 2, 0, 0]


def test_candidates_of_equal_text_all_count(make_group: Callable[..., Group]) -> None:
    """Trap 42: "a", "a", "b" by index, all three kept in paper mode; "a" is compared with "b" only."""
    group = candidates(make_group, 0, [1.0, 1.0, 2.0])
    texts = [replace(sample, text=text) for sample, text in zip(group.samples, ("a", "a", "b"), strict=True)]
    batch, _ = rso(3, 3, {}, pairing="tournament").prepare([replace(group, samples=tuple(texts))], {})
    made, ties, identical, _, _ = counted(batch, *MADE)
    assert made + identical == 2 and made >= 1 and ties == 0


def test_too_few_scorable_candidates_drop_the_prompt_and_equal_rewards_make_no_pair(
    make_group: Callable[..., Group],
) -> None:
    """Counted both; no NaN from a spread of 0."""
    groups = [candidates(make_group, 0, [1.0, None, 1.0, 1.0]), candidates(make_group, 1, [1.0] * 4)]
    batch, _ = rso(4, 4, {}).prepare(groups, {})
    assert batch.rows == () and counted(batch, *MADE) == [0, 2, 0, 0, 1]
    assert all(np.isfinite(number) for number in values(batch.metrics).values())


def test_the_sampler_as_reference(make_group: Callable[..., Group]) -> None:
    """Trap 8 of RSO: the rows' reference is what the candidates were sampled with, and no reference model is asked."""
    group = make_group(0, [1.0, 2.0], [1, 2], {"behavior_logprobs": [[-0.5], [-0.25, -4.0]]}, {})
    algorithm = rso(2, 2, {}, reference="sampler")
    batch, _ = algorithm.prepare([group], {})
    assert algorithm.needs == {"reward"}
    assert [row.tokens["ref_logprobs"].tolist() for row in batch.rows] == [[-0.25, -4.0], [-0.5]]
    assert rso(2, 2, {}).needs == {"reward", "ref_logprobs"}


def test_rso_refuses_given_completions(make_group: Callable[..., Group]) -> None:
    """They have no address of randomness, and are no samples of the policy."""
    group = as_given(candidates(make_group, 5, [1.0, 2.0]), [0.0, 1.0])
    group = replace(group, samples=tuple(replace(s, scores={"reward": float(s.index)}) for s in group.samples))
    with pytest.raises(ValueError, match="prompt 5: not sampled by a policy"):
        rso(2, 2, {}).prepare([group], {})


# --- the loss of a micro-batch


def micro_batch(lengths: Sequence[int], reference_logprob: float) -> MicroBatch:
    """Rows of these lengths, two a unit, padded by two places that hold rubbish."""
    width = max(lengths) + 2
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    column = torch.where(mask, reference_logprob, torch.nan)
    return MicroBatch(mask, torch.ones(len(lengths)), torch.arange(len(lengths)) // 2, {"ref_logprobs": column})


def policy_says(batch: MicroBatch, sums: Sequence[float]) -> Outputs:
    """Log-probs that add up to these sums, in equal parts, 0 at padding."""
    share = torch.tensor(sums) / batch.mask.sum(dim=1)
    logprobs = torch.where(batch.mask, share.unsqueeze(1), 0.0).requires_grad_()
    return Outputs(logprobs, torch.zeros_like(logprobs))


def preference_loss(name: str, beta: float, **settings: Any) -> Algorithm:
    config = {"name": "dpo", "loss": {**price(name, beta), **settings}}
    return build(DpoConfig.model_validate(config))


@pytest.mark.parametrize(
    ("name", "beta", "expected"),
    [
        ("sigmoid", 0.1, 0.55436),
        ("hinge", 0.1, 0.7),
        ("ipo", 0.1, 18.49),
        ("conservative", 0.1, 0.58436),
        ("robust", 0.1, 0.51686),
        ("sppo_hard", 0.1, 25.0),
        ("sigmoid_length_norm", 0.1, 0.65876),
        ("simpo", 2.0, 0.47408),
        ("orpo", 0.1, 2.54612),
        ("slic_hinge", 0.25, 0.0),
        ("slic_hinge", 0.125, 0.375),
    ],
)
def test_golden_losses_of_a_micro_batch(name: str, beta: float, expected: float) -> None:
    """G-PREF from token columns: each name is wired to its equation, its reference and its lengths."""
    batch = micro_batch([4, 5], 0.0)
    batch.tokens["ref_logprobs"][0, :4], batch.tokens["ref_logprobs"][1, :5] = -12 / 4, -14 / 5
    sums = preference_loss(name, beta).loss(policy_says(batch, [-10.0, -15.0]), batch)
    assert sums.loss.item() == pytest.approx(expected, abs=1e-4)
    assert sums.means["loss/preference"][0].item() == pytest.approx(expected, abs=1e-4)


def test_metrics_have_trls_meaning() -> None:
    """rewards/* are beta times the sums of log-ratios; margins, accuracies with the strict sign, logps are sums. The
    longer completion is preferred in one of two pairs: agreement 0."""
    batch = micro_batch([2, 4, 3, 1, 2, 2], -1.0)
    outputs = policy_says(batch, [-1.0, -5.0, -2.0, -2.0, -2.0, -2.0])
    means = preference_loss("sigmoid", 0.1).loss(outputs, batch).means
    found = {name: (float(total), float(count)) for name, (total, count) in means.items()}
    assert {count for _, count in found.values()} == {3.0}
    expected = {
        "rewards/chosen": 0.2, "rewards/rejected": -0.2, "rewards/margins": 0.4, "rewards/accuracies": 2.0,
        "logps/chosen": -5.0, "logps/rejected": -9.0, "rewards/longer_agreement": 0.0,
    }  # fmt: skip
    assert {name: found[name][0] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("per", "expected"), [("token", 10 / 4 + 3 / 2), ("sequence", 13.0)])
def test_nll_of_chosen_completions(per: str, expected: float) -> None:
    """RPO's mean over tokens, SLiC's sum; the rejected completion has no part in it."""
    batch = micro_batch([4, 5, 2, 1], -1.0)
    outputs = policy_says(batch, [-10.0, -15.0, -3.0, -7.0])
    plain = preference_loss("sigmoid", 0.1).loss(outputs, batch)
    more = preference_loss("sigmoid", 0.1, nll=0.3, nll_per=per).loss(outputs, batch)
    assert (more.loss - plain.loss).item() == pytest.approx(0.3 * expected, abs=1e-5)
    assert more.means["loss/nll"][0].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_padding_fillers_and_the_cut_into_micro_batches_change_nothing(name: str) -> None:
    """Rubbish (NaN) in the reference's padding enters nothing; pairs one by one add up to all; a filler adds 0."""
    lengths, sums = [4, 5, 2, 7, 3, 3], [-4.0, -9.0, -3.0, -5.0, -2.5, -1.0]
    algorithm = preference_loss(name, 0.5)

    def total(rows: slice) -> tuple[float, list[float]]:
        batch = micro_batch(lengths[rows], -1.2)
        outputs = policy_says(batch, sums[rows])
        result = algorithm.loss(outputs, batch)
        result.loss.backward()
        assert outputs.logprobs.grad is not None
        return result.loss.item(), outputs.logprobs.grad[batch.mask].tolist()

    whole, gradient = total(slice(0, 6))
    parts = [total(slice(i, i + 2)) for i in (0, 2, 4)]
    assert sum(part for part, _ in parts) == pytest.approx(whole, abs=1e-5)
    assert [g for _, part in parts for g in part] == pytest.approx(gradient, abs=1e-6)
    assert np.isfinite(gradient).all()

    filler = micro_batch([1], 0.0)._replace(weight=torch.zeros(1), mask=torch.zeros(1, 3, dtype=torch.bool))
    outputs = policy_says(filler._replace(mask=torch.ones(1, 3, dtype=torch.bool)), [-3.0])
    nothing = algorithm.loss(outputs, filler)
    nothing.loss.backward()
    assert nothing.loss.item() == 0.0 and float(outputs.logprobs.grad.abs().max()) == 0.0
    assert all(float(a) == 0.0 and float(b) == 0.0 for a, b in nothing.means.values())


def test_a_split_pair_is_refused() -> None:
    """Half a pair, a pair of two units, and two pairs of one number."""
    batch = micro_batch([2, 2, 2, 2], -1.0)
    for units in ([0, 1, 1, 2], [0, 0, 0, 0]):
        broken = batch._replace(unit=torch.tensor(units))
        with pytest.raises(ValueError, match="two adjacent rows of one unit"):
            preference_loss("sigmoid", 0.1).loss(policy_says(broken, [-1.0] * 4), broken)
    half = micro_batch([2], -1.0)
    with pytest.raises(ValueError, match="two adjacent rows of one unit"):
        preference_loss("sigmoid", 0.1).loss(policy_says(half, [-1.0]), half)


# --- settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "robust", "beta": 0.1}, "label_noise is required by conservative and robust"),
        ({"name": "sigmoid", "beta": 0.1, "label_noise": 0.1}, "label_noise is a key of conservative and robust"),
        ({"name": "robust", "beta": 0.1, "label_noise": 0.5}, "expected < 0.5"),
        ({"name": "simpo", "beta": 2.0}, "target_margin is required by simpo"),
        ({"name": "ipo", "beta": 0.1, "target_margin": 1.0}, "target_margin is a key of simpo"),
        ({"name": "orpo", "beta": 0.1, "nll": 0.1}, "orpo has the negative log-likelihood"),
        ({"name": "sigmoid"}, "beta"),
    ],
)
def test_keys_that_would_be_ignored_or_are_missing_are_refused(settings: dict[str, Any], said: str) -> None:
    """A loss has no default beta: no value is safe for all of them."""
    with pytest.raises(ValidationError, match=said):
        PreferenceLossConfig.model_validate(settings)


def test_sizes_that_cannot_work_are_refused() -> None:
    """More kept than sampled, fewer than a pair, a sampler's reference that the loss would not read."""
    with pytest.raises(ValidationError, match=r"rejection\.accept=5 of samples_per_prompt=4 candidates"):
        rso(4, 5, {})
    with pytest.raises(ValidationError, match=r"rejection\.accept=1"):
        rso(4, 1, {})
    with pytest.raises(ValidationError, match="loss slic_hinge has no reference"):
        rso(4, 2, {}, loss={"name": "slic_hinge", "beta": 1.0}, reference="sampler")
    with pytest.raises(ValidationError, match="at least 2"):
        OnlineDpoConfig.model_validate({"name": "online_dpo", "samples_per_prompt": 1, "loss": {"beta": 0.1}})


# --- with the learner


@pytest.fixture
def online_run(tiny_run: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """A run file of online DPO on the tiny model."""

    def build_one(learner: Mapping[str, Any], name: str) -> RunConfig:
        plain = tiny_run({}, learner, {}, {}).model_dump(exclude_unset=True)
        algorithm = {"name": "online_dpo", "samples_per_prompt": 4, "loss": price(name, 0.1)}
        return RunConfig.model_validate({**plain, "algorithm": algorithm})

    return build_one


def with_reference(config: RunConfig, groups: Sequence[Group]) -> list[Group]:
    """Groups with texts of their own, and what the frozen model says of their tokens."""
    told = [
        replace(group, samples=tuple(replace(sample, text=str(sample.token_ids)) for sample in group.samples))
        for group in groups
    ]
    judge = ReferenceJudge(config)
    judge.setup()
    filled = fill_in(told, [judge.judge(group) for group in told])
    judge.close()
    return filled


def test_at_step_zero_policy_and_reference_agree_and_afterwards_the_pairs_are_told_apart(
    online_run: Callable[..., RunConfig], sampled_groups: Callable[..., list[Group]]
) -> None:
    """Traps 15 and 40: |h| <= 1e-4 and a loss of ln 2 in the first update, no accuracy by the strict sign; then the
    policy moves and the reference does not."""
    config = online_run({"lr": 1e-3}, "sigmoid")
    groups = with_reference(config, sampled_groups(0, 4, 4, 0, 1.0))
    learner = PolicyLearner(config, build(config.algorithm), 0, 1, None)
    learner.setup()
    first, second = (values(learner.update(learner.prepare(groups))) for _ in range(2))
    assert abs(first["rewards/margins"]) <= 1e-5 and abs(first["rewards/chosen"]) <= 1e-5
    assert first["loss/preference"] == pytest.approx(np.log(2), abs=1e-5)
    assert second["rewards/margins"] > 0.01 and second["rewards/accuracies"] == 1.0
    assert second["logps/chosen"] > first["logps/chosen"]
    assert first["mismatch/logprob_abs_mean"] > 0  # the fixture's log-probs are made up, so there is one to be seen
    again = with_reference(config, sampled_groups(0, 4, 4, 0, 1.0))
    for one, other in zip(groups, again, strict=True):
        for left, right in zip(one.samples, other.samples, strict=True):
            assert np.array_equal(left.tokens["ref_logprobs"], right.tokens["ref_logprobs"])


def gradient_of(batch: TrainBatch, algorithm: Algorithm, ranks: int, budget: int) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradient as the learner's plan cuts the batch: summed over ranks and micro-batches, divided once."""
    config = RunConfig.model_validate(
        {
            "model": {"name": "tiny"}, "algorithm": {"name": "rloo"}, "data": {"path": "unused"},
            "loop": {"num_steps": 1, "groups_per_step": 1}, "generation": {"max_new_tokens": 1},
            "reward": {"function": "unused:unused"},
        }
    )  # fmt: skip
    policy = PolicyModel(load_model(config.model, "float32"), 512)
    units, total = units_of(batch.rows), 0.0
    for share in plan(units, ranks, budget, packed=False):
        for micro in share:
            assert sum(len(unit.rows) for unit in micro) % 2 == 0
            collated = collate(micro, sorted(batch.rows[0].tokens), packed=False)
            outputs = collated.outputs(*policy(*collated.inputs))
            loss = algorithm.loss(outputs, collated.batch).loss / len(units)
            loss.backward()
            total += loss.item()
    return total, [p.grad.clone() for p in policy.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_is_never_split(
    online_run: Callable[..., RunConfig], sampled_groups: Callable[..., list[Group]], name: str
) -> None:
    """Trap 44: 5 pairs on 2 ranks with room for 3 rows a micro-batch (one pair, and a filler on the rank that has
    fewer): loss and gradient are those of one batch of 10 rows, for each loss."""
    config = online_run({}, name)
    algorithm = build(config.algorithm)
    batch, _ = algorithm.prepare(with_reference(config, sampled_groups(1, 5, 4, 0, 1.0)), {})
    assert len(batch.rows) == 10
    room = 3 * min(len(row.prompt_ids) + len(row.completion_ids) for row in batch.rows)
    cut = plan(units_of(batch.rows), 2, room, packed=False)
    assert [] in cut[0] + cut[1]
    whole, gradient = gradient_of(batch, algorithm, 1, 10**6)
    parts, summed = gradient_of(batch, algorithm, 2, room)
    assert parts == pytest.approx(whole, abs=1e-5)
    scale = max(1.0, max(float(g.abs().max()) for g in gradient))
    assert max(float((a - b).abs().max()) for a, b in zip(gradient, summed, strict=True)) <= 1e-5 * scale


def test_preference_losses_need_no_old_logprobs(online_run: Callable[..., RunConfig]) -> None:
    """Several optimizer steps on fresh samples cost no extra pass over the candidates; there is no ratio to form."""
    assert not draw(online_run({"epochs": 2, "minibatches": 2}, "sigmoid")).learner_annotates
    assert draw(online_run({}, "sigmoid")).judged == {"reward", "ref_logprobs"}
    assert not draw(online_run({}, "simpo")).reference_judge
