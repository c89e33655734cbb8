"""From rewards to advantages: baselines, spreads, returns. Groups go by id, never by position or text."""

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
    above, total = _above_lowest(rewards, row, len(ids))
    return above - (total[row] - above) / (size[row] - 1)


def group_deviation(rewards: Tensor, group: Tensor) -> Tensor:
    """Distance of each reward from the mean of its group: the advantage of Dr. GRPO, and of REINFORCE++-baseline before
    it is whitened.

        A_i = R_i - 1/n sum_j R_j                   arXiv 2503.20783; arXiv 2501.03262, Eq 6

    rewards (N,) float, group (N,) int ids in any order -> (N,) float64. In each group they sum to 0; equal rewards, and
    a group of one, give exactly 0. The mean contains the sample's own reward, so the expected gradient is (n-1)/n times
    the true one: the same direction.
    """
    ids, row = torch.unique(group, return_inverse=True)
    size = torch.bincount(row, minlength=len(ids))
    above, total = _above_lowest(rewards, row, len(ids))
    return above - (total / size)[row]


def group_standardized(rewards: Tensor, group: Tensor, *, unbiased: bool, eps: float) -> Tensor:
    """GRPO's advantage: distance from the group's mean in units of the group's standard deviation.

        A_i = (R_i - mean) / (std + eps)            arXiv 2402.03300, section 4.1.2

    std is over n, or over n - 1 when unbiased: the paper does not say which. Shapes as in `group_deviation`. Equal
    rewards, and a group of one, give exactly 0, with eps 0 too. Unchanged by r -> a r + c with a > 0 up to eps; with
    n = 2 all magnitudes are lost. Two passes in float64: a small spread beside a large mean is not rounded away.
    """
    ids, row = torch.unique(group, return_inverse=True)
    deviation = group_deviation(rewards, group)
    size = torch.bincount(row, minlength=len(ids)) - int(unbiased)
    squares = deviation.new_zeros(len(ids)).index_add_(0, row, deviation.square())
    spread = torch.sqrt(squares / size.clamp(min=1))[row] + eps
    return torch.where(deviation == 0, 0.0, deviation / spread)


def returns_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    """What each token and those after it are paid, undiscounted: G_t = sum_{s >= t} m_s r_s.

    rewards (..., T), mask (..., T) bool -> (..., T) float64; 0 at false positions, whose rewards are not paid.
    """
    paid = torch.where(mask, rewards, 0).double()
    return torch.where(mask, paid.flip(-1).cumsum(-1).flip(-1), 0.0)


def running_mean(total: float, count: float) -> float:
    """Moving-average baseline: the mean of all rewards of earlier batches, 0 before the first.

        b_MA = (1/S) sum_s R_s                      arXiv 2402.14740, section 2

    Only earlier batches: a baseline that contains the sample's own reward is correlated with its action and biases the
    gradient. The caller keeps total and count as run state and adds the batch afterwards.
    """
    return total / count if count else 0.0


def _above_lowest(rewards: Tensor, row: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Rewards (N,) measured from the lowest of their group, and the sums of those (groups,); float64.

    Equal rewards are then 0 and stay 0; summing them as they are would leave rounding errors.
    """
    rewards = rewards.double()
    lowest = rewards.new_full((groups,), torch.inf).scatter_reduce_(0, row, rewards, "amin")
    above = rewards - lowest[row]
    return above, rewards.new_zeros(groups).index_add_(0, row, above)
