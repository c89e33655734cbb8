"""Token rewards and generalised advantage estimation (arXiv 1506.02438). Shapes: B rows, T positions, right-padded.

Only positions with a true mask are actions of the policy. The others (padding, tokens of tools) are skipped as if they
were not there: the value after a policy token is that of the NEXT POLICY TOKEN, not of the next column.
"""

import torch
from torch import Tensor


def token_rewards(scores: Tensor, log_ratio: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """The reward of each token: the KL paid per token, the score on the last policy token.

        r_t = -beta (l^old_t - l^ref_t) + 1[t = last policy token] score         arXiv 2203.02155, Eq 2, token by token

    scores (B,), log_ratio (B, T) = policy minus reference in nats, mask (B, T) bool -> (B, T) float64, 0 at false
    positions. In each row they sum to score - beta sum_t m_t d_t. The score is on the last policy token and not on
    the slot after it, where it would make advantages depend on the padded width. A row without a policy token gets
    nothing: there is no action to pay.
    """
    rewards = torch.where(mask, -coefficient * log_ratio.double(), 0)
    return rewards + torch.where(_is_last(mask), scores.double()[:, None], 0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each policy token.

        delta_t = r_t + gamma V_{t+1} - V_t,   V after the last = 0       arXiv 1506.02438, Eq 16
        A_t = delta_t + gamma lambda A_{t+1};   return_t = A_t + V_t

    rewards, values (B, T), mask (B, T) bool, gamma and lam in [0, 1] -> advantages, returns (B, T) float64, 0 at false
    positions. V_t is the value at the position that predicts token t (for the first token the last prompt position);
    values are read without gradient. t + 1 is the next position with a true mask; what stands at the others, NaN
    included, does not enter. Does not whiten: returns are built from the advantages as they are.
    """
    rewards, values = rewards.double(), values.detach().double()
    advantages = torch.zeros_like(rewards)
    later_advantage, later_value = rewards.new_zeros(len(rewards)), rewards.new_zeros(len(rewards))
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * later_value - values[:, t]
        here, advantage = mask[:, t], delta + gamma * lam * later_advantage
        advantages[:, t] = torch.where(here, advantage, 0)
        later_advantage = torch.where(here, advantage, later_advantage)
        later_value = torch.where(here, values[:, t], later_value)
    return advantages, torch.where(mask, advantages + values, 0)


def _is_last(mask: Tensor) -> Tensor:
    """(B, T) bool, true at the last true position of each row."""
    left = mask.flip(1).cumsum(1).flip(1)
    return mask & (left == 1)
