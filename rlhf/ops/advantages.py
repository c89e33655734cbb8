"""From rewards to advantages: baselines. Groups go by id, never by position or text."""

import torch
from torch import Tensor


def leave_one_out(rewards: Tensor, group: Tensor) -> Tensor:
    """Advantage of each sample over the mean of the others of its group.

        A_i = R_i - 1/(n-1) sum_{j != i} R_j        arXiv 2402.14740, Eq 6 with the leave-one-out baseline

    rewards (N,) float, group (N,) int ids in any order -> (N,) float64. Groups may differ in size; raises ValueError
    for a group of one, which has no others. In each group the advantages sum to 0, do not change when a constant is
    added to its rewards, and are exactly 0 when its rewards are equal. Knows nothing of KL: subtract that from the
    reward before.
    """
    ids, row = torch.unique(group, return_inverse=True)
    size = torch.bincount(row, minlength=len(ids))
    if bool((size < 2).any()):
        raise ValueError(f"leave-one-out needs at least 2 samples a group; groups with one: {ids[size < 2].tolist()}")
    rewards = rewards.double()
    # Measured from the group's lowest reward, equal rewards are 0 and stay 0; summing them first would leave rounding
    # errors.
    lowest = rewards.new_full((len(ids),), torch.inf).scatter_reduce_(0, row, rewards, "amin")
    above = rewards - lowest[row]
    total = rewards.new_zeros(len(ids)).index_add_(0, row, above)
    return above - (total[row] - above) / (size[row] - 1)


def running_mean(total: float, count: float) -> float:
    """Moving-average baseline: the mean of all rewards of earlier batches, 0 before the first.

        b_MA = (1/S) sum_s R_s                      arXiv 2402.14740, section 2

    Only earlier batches: a baseline that contains the sample's own reward is correlated with its action and biases the
    gradient. The caller keeps total and count as run state and adds the batch afterwards.
    """
    return total / count if count else 0.0
