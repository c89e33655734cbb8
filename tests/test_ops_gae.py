"""Token rewards and GAE against golden vectors, the quadratic definition, and batches that must not matter.

Not covered: where values come from (the learner), whitening (ops.masked has its own tests; that returns do not move
with it: test_algorithm_ppo).
"""

import torch
from torch import Tensor

from rlhf.ops.gae import gae, token_rewards
from rlhf.ops.masked import whiten

VALUES = torch.tensor([[0.5, 0.4, 0.3]])
ALL = torch.ones(1, 3, dtype=torch.bool)
END = torch.tensor([[0.0, 0.0, 1.0]])


def close(found: Tensor, expected: list[float]) -> bool:
    return torch.allclose(found, torch.tensor([expected], dtype=torch.float64), atol=1e-5)


def by_definition(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = sum_{k >= t} (gamma lambda)^(k - t) delta_k over the policy tokens alone, a loop in a loop."""
    result = torch.zeros_like(rewards, dtype=torch.float64)
    for b in range(len(rewards)):
        places = mask[b].nonzero()[:, 0].tolist()
        r, v = rewards[b, places].double().tolist(), [*values[b, places].double().tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(places))]
        for t, place in enumerate(places):
            result[b, place] = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(places)))
    return result


def test_golden_vectors() -> None:
    """G-GAE: four settings of gamma and lambda."""
    for gamma, lam, expected in [
        (1.0, 0.95, [0.43675, 0.565, 0.7]),
        (1.0, 1.0, [0.5, 0.6, 0.7]),
        (1.0, 0.0, [-0.1, -0.1, 0.7]),
        (0.9, 0.95, [0.260568, 0.4685, 0.7]),
    ]:
        assert close(gae(END, VALUES, ALL, gamma, lam)[0], expected)
    assert close(gae(END, VALUES, ALL, 1.0, 0.95)[1], [0.93675, 0.965, 1.0])


def test_golden_vectors_with_a_kl_price() -> None:
    """G-GAE-KL: the KL is paid by each token, the score by the last."""
    rewards = token_rewards(torch.tensor([1.0]), torch.tensor([[0.2, -0.1, 0.4]]), ALL, 0.05)
    assert close(rewards, [-0.01, 0.005, 0.98])
    advantages, returns = gae(rewards, VALUES, ALL, 1.0, 0.95)
    assert close(advantages, [0.41345, 0.551, 0.68]) and close(returns, [0.91345, 0.951, 0.98])


def test_padding_and_the_slot_after_the_end_do_not_matter() -> None:
    """Trap 35, G-GAE-POS: widths 3, 4 and 8, value 0.2 (then NaN) in the slot after EOS."""
    for width in (3, 4, 8):
        mask = torch.zeros(1, width, dtype=torch.bool)
        mask[0, :3] = True
        values, ratio = torch.full((1, width), 0.2), torch.zeros(1, width)
        values[0, :3] = VALUES
        values[0, 4:] = torch.nan
        advantages, returns = gae(token_rewards(torch.tensor([1.0]), ratio, mask, 0.05), values, mask, 1.0, 0.95)
        assert close(advantages[:, :3], [0.43675, 0.565, 0.7]) and close(returns[:, :3], [0.93675, 0.965, 1.0])
        assert not advantages[:, 3:].any() and not returns[:, 3:].any()


def test_tool_tokens_are_skipped() -> None:
    """Trap 36, G-GAE-SKIP: policy, policy, tool, tool, policy; zeroed values there would give 0.34737 first."""
    mask = torch.tensor([[True, True, False, False, True]])
    values = torch.tensor([[0.5, 0.4, 7.0, torch.nan, 0.3]])
    rewards = token_rewards(torch.tensor([1.0]), torch.tensor([[0.0, 0.0, 9.0, 9.0, 0.0]]), mask, 0.5)
    advantages, returns = gae(rewards, values, mask, 1.0, 0.95)
    assert close(advantages, [0.43675, 0.565, 0.0, 0.0, 0.7]) and close(returns, [0.93675, 0.965, 0.0, 0.0, 1.0])


def test_equals_the_quadratic_definition() -> None:
    """Random rewards, values and masks, a row without a policy token among them."""
    random = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(6, 11, generator=random), torch.randn(6, 11, generator=random)
    mask = torch.rand(6, 11, generator=random) < 0.6
    mask[3] = False
    for gamma, lam in [(1.0, 0.95), (0.9, 0.8), (0.0, 0.5), (1.0, 1.0)]:
        advantages, returns = gae(rewards, values, mask, gamma, lam)
        expected = by_definition(rewards, values, mask, gamma, lam)
        assert torch.allclose(advantages, expected, atol=1e-12)
        assert torch.allclose(returns[mask], (expected + values.double())[mask], atol=1e-12)


def test_token_rewards_sum_to_the_shaped_reward() -> None:
    """sum_t r_t = score - beta sum_t m_t d_t for each length; a row without a policy token gets nothing."""
    random = torch.Generator().manual_seed(1)
    scores, ratio = torch.randn(5, generator=random), torch.randn(5, 7, generator=random)
    mask = torch.arange(7)[None] < torch.tensor([7, 1, 4, 0, 3])[:, None]
    sums = token_rewards(scores, ratio, mask, 0.3).sum(1)
    expected = scores.double() - 0.3 * torch.where(mask, ratio, 0).sum(1).double()
    assert torch.allclose(sums[[0, 1, 2, 4]], expected[[0, 1, 2, 4]], atol=1e-6) and sums[3] == 0


def test_one_token_and_constant_rewards() -> None:
    """T = 1 gives A = r - V; equal rewards on perfect values give 0, and whitening them no NaN."""
    assert close(gae(torch.tensor([[2.0]]), torch.tensor([[0.5]]), torch.tensor([[True]]), 1.0, 0.95)[0], [1.5])
    advantages, _ = gae(END.expand(4, 3), torch.ones(4, 3), ALL.expand(4, 3), 1.0, 0.95)
    assert not advantages.any() and not whiten(advantages, ALL.expand(4, 3)).any()
