"""Rejection sampling and pairing against exact distributions, with limits, edges and controls. Not covered: speed."""

import math

import pytest
import torch
from torch import Generator

from rlhf.ops.pairing import best_against_worst, every_pair, first_round, tournament
from rlhf.ops.rejection import acceptance, exact, paper, with_replacement


def draws(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def inclusion(rewards: list[float], count: int, beta: float, times: int) -> list[float]:
    """How often each candidate is among the accepted ones, in `paper` mode."""
    generator, seen = draws(1), torch.zeros(len(rewards))
    for _ in range(times):
        seen[paper(torch.tensor(rewards), count, beta, generator).indices] += 1
    return (seen / times).tolist()


@pytest.mark.parametrize(
    ("beta", "weights", "rate"),
    [
        (1.0, (1, 0.36788, 0.13534), 0.50107),
        (0.5, (1, 0.13534, 0.01832), 0.38455),
        (2.0, (1, 0.60653, 0.36788), 0.65814),
    ],
)
def test_golden_acceptance_probabilities(beta: float, weights: tuple[float, ...], rate: float) -> None:
    """G-RSO: the weights and the expected rate; adding a constant to all rewards changes nothing."""
    found = acceptance(torch.tensor([3.0, 2.0, 1.0]), beta)
    assert found.tolist() == pytest.approx(weights, abs=1e-5)
    assert float(found.mean()) == pytest.approx(rate, abs=1e-5)
    assert torch.equal(acceptance(torch.tensor([103.0, 102.0, 101.0]), beta), found)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_exact_mode_samples_the_target(beta: float) -> None:
    """Chi-square of 20,000 draws against exp(r / beta) / sum, at the .001 level for 3 degrees of freedom; and that the
    rate of acceptance is the expected one. The control, the target of another beta, is far off."""
    rewards, times = torch.tensor([3.0, 2.0, 1.0, 2.5]), 20_000
    accepted = with_replacement(acceptance(rewards, beta), times, draws(3))
    seen = torch.bincount(accepted.indices, minlength=4).double()

    def chi_square(temperature: float) -> float:
        expected = times * torch.softmax(rewards.double() / temperature, dim=0)
        return float(((seen - expected).square() / expected).sum())

    assert chi_square(beta) < 16.27
    assert chi_square(1.3 * beta) > 100
    assert times / accepted.tries == pytest.approx(float(acceptance(rewards, beta).mean()), abs=0.01)


def test_exact_mode_one_at_a_time_is_the_same_distribution() -> None:
    """G-RSO-SCAN, exact (.57143, .28571, .14286): N of 1, through the checked entry."""
    rewards, generator = torch.tensor([1.0, 0.5, 0.25]).log(), draws(4)
    seen = torch.zeros(3)
    for _ in range(10_000):
        seen[exact(rewards, 1, 1.0, generator).indices] += 1
    assert (seen / 10_000).tolist() == pytest.approx([0.57143, 0.28571, 0.14286], abs=0.015)


def test_paper_mode_scans_in_a_shuffled_order() -> None:
    """G-RSO-SCAN (trap 43): (.66667, .22917, .10417). Best first would give (1, 0, 0), exact mode (.571, ...)."""
    found = inclusion([0.0, -math.log(2), -2 * math.log(2)], 1, 1.0, 10_000)
    assert found == pytest.approx([0.66667, 0.22917, 0.10417], abs=0.015)


def test_paper_mode_takes_each_candidate_once_and_looks_for_the_best_again() -> None:
    """G-RSO-WOR, inclusion of two of four."""
    found = inclusion([-k * math.log(2) for k in range(4)], 2, 1.0, 10_000)
    assert found == pytest.approx([0.936, 0.660, 0.273, 0.131], abs=0.016)


def test_a_hot_target_keeps_any_and_a_cold_one_the_best() -> None:
    """Trap 42: beta 1e9 keeps two of four at random (.5 +- .02); beta 0, a branch of its own, and 1e-9 the best two."""
    assert inclusion([4.0, 3.0, 2.0, 1.0], 2, 1e9, 6_000) == pytest.approx([0.5] * 4, abs=0.02)
    rewards = torch.tensor([1.0, 4.0, 2.0, 4.0])
    for mode in (paper, exact):
        assert mode(rewards, 2, 0.0, draws(0)).indices.tolist() == [1, 3]
        assert mode(rewards, 3, 0.0, draws(0)).indices.tolist() == [1, 3, 2]
    assert sorted(paper(rewards, 2, 1e-9, draws(0)).indices.tolist()) == [1, 3]
    assert set(exact(rewards, 4, 1e-9, draws(0)).indices.tolist()) <= {1, 3}


def test_candidates_go_by_index_and_repeats_are_kept() -> None:
    """Trap 42: of three equally good candidates, two of them of one text, any two can be accepted; exact mode repeats
    one. No text is an argument."""
    generator = draws(2)
    kept = {tuple(sorted(paper(torch.ones(3), 2, 1.0, generator).indices.tolist())) for _ in range(200)}
    assert kept == {(0, 1), (0, 2), (1, 2)}
    assert any(len(set(exact(torch.ones(3), 2, 1.0, generator).indices.tolist())) == 1 for _ in range(50))


@pytest.mark.parametrize("mode", [paper, exact])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_more_than_there_are_is_an_error_that_says_so(mode: object, beta: float) -> None:
    """Trap 42: N 4 of 3."""
    with pytest.raises(ValueError, match="accept 4 of 3 candidates"):
        mode(torch.ones(3), 4, beta, draws(0))
    assert sorted(paper(torch.tensor([1.0, 2.0, 3.0]), 3, beta, draws(0)).indices.tolist()) == [0, 1, 2]


@pytest.mark.parametrize("mode", [paper, exact])
def test_the_generator_decides_all(mode: object) -> None:
    """The same seed, the same candidates; another seed, others; the global generator is not touched."""
    rewards, state = torch.linspace(0, 1, 16), torch.random.get_rng_state()
    found = [mode(rewards, 8, 0.5, draws(seed)).indices.tolist() for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_extreme_rewards_end() -> None:
    """Weights that underflow to 0: only the best is ever accepted, and in paper mode the next best after it."""
    rewards = torch.tensor([0.0, 1e6, -1e6])
    assert exact(rewards, 3, 1e-3, draws(0)).indices.tolist() == [1, 1, 1]
    assert paper(rewards, 3, 1e-3, draws(0)).indices.tolist() == [1, 0, 2]


# --- pairing

DIFFERENT = torch.arange(16)


@pytest.mark.parametrize(("count", "first", "knock_out"), [(8, 4, 7), (5, 2, 4), (2, 1, 1), (1, 0, 0), (7, 3, 6)])
def test_how_many_pairs(count: int, first: int, knock_out: int) -> None:
    """floor(N/2) and N - 1; winners are better; a first round uses no completion twice; the best wins the tournament
    and each other one loses once."""
    for seed in range(20):
        scores = torch.randperm(count, generator=draws(seed)).double()
        once = first_round(scores, DIFFERENT[:count], draws(seed))
        whole = tournament(scores, DIFFERENT[:count], draws(seed))
        assert (len(once.pairs), len(whole.pairs)) == (first, knock_out)
        assert all(scores[i] > scores[j] for i, j in once.pairs + whole.pairs)
        assert len({i for pair in once.pairs for i in pair}) == 2 * first
        assert sorted(loser for _, loser in whole.pairs) == sorted(set(range(count)) - {int(scores.argmax())})


@pytest.mark.parametrize("pair_up", [first_round, tournament])
def test_order_of_pairs_does_not_follow_the_order_of_acceptance(pair_up: object) -> None:
    """Trap 43: rewards sorted as a best-first scan would leave them; over 2,000 seeds the number of a first-round pair
    does not go with the winner's reward (|r| < .05)."""
    scores = torch.arange(8, 0, -1).double()
    found = [
        (number, float(scores[winner]))
        for seed in range(2_000)
        for number, (winner, _) in enumerate(pair_up(scores, DIFFERENT[:8], draws(seed)).pairs[:4])
    ]
    assert abs(float(torch.corrcoef(torch.tensor(found).T)[0, 1])) < 0.05


def test_equal_scores_and_equal_texts_make_no_pair() -> None:
    """Trap 41: four equal rewards are 0 pairs and 6 ties; a text is never compared with itself, whatever its scores."""
    equal = torch.ones(4)
    assert best_against_worst(equal, DIFFERENT[:4]) == ([], 6, 0)
    assert every_pair(equal, DIFFERENT[:4]) == ([], 6, 0)
    assert first_round(equal, DIFFERENT[:4], draws(0)) == ([], 2, 0)
    assert tournament(equal, DIFFERENT[:4], draws(0)) == ([], 3, 0)
    noisy, same = torch.tensor([1.0, 2.0]), torch.zeros(2)
    for found in (best_against_worst(noisy, same), every_pair(noisy, same), tournament(noisy, same, draws(0))):
        assert found == ([], 0, 1)


def test_best_against_worst_and_every_pair() -> None:
    """By hand: (1, 3, 1, 2) with texts 0 and 2 alike."""
    scores, text = torch.tensor([1.0, 3.0, 1.0, 2.0]), torch.tensor([0, 1, 0, 3])
    assert best_against_worst(scores, text) == ([(1, 0)], 0, 0)
    assert every_pair(scores, text) == ([(1, 0), (3, 0), (1, 2), (1, 3), (3, 2)], 0, 1)


def test_a_tie_in_a_tournament_does_not_end_it() -> None:
    """Scores (1, 1, 5): whatever is drawn, the 5 wins once or twice, and nothing is compared more than N - 1 times."""
    for seed in range(20):
        found = tournament(torch.tensor([1.0, 1.0, 5.0]), DIFFERENT[:3], draws(seed))
        assert len(found.pairs) + found.ties == 2
        assert {winner for winner, _ in found.pairs} == {2}
