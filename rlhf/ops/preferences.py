"""Preference losses, one number a pair and never reduced. Shapes: B pairs.

    L = sum_t m_t l_t        log-probability of a completion: a SUM over its trained tokens, n of them
    a, b = L - L_ref         log-ratio of the chosen and of the rejected completion;   h = a - b

Arguments called `chosen` and `rejected` are log-ratios where a loss has a reference and log-probabilities where it has
none: each docstring says which. Nothing here shifts, masks, averages over pairs or detaches a reference: its column
carries no gradient. No exponential of a sum is taken, so long completions stay finite.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# ORPO's odds p / (1 - p) need p < 1: a mean log-probability above this enters them as this, without gradient.
HIGHEST_MEAN_LOGPROB = -1e-6


def sigmoid(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """DPO: -log sigma(beta h), arXiv 2305.18290 Eq 7; RSO's "sigmoid-norm", arXiv 2309.06657.

    chosen, rejected (B,) log-ratios a, b -> (B,). ln 2 at h = 0; the gradient in h is -beta sigma(-beta h).
    """
    return -logsigmoid(beta * (chosen - rejected))


def sigmoid_length_norm(
    chosen: Tensor, rejected: Tensor, chosen_length: Tensor, rejected_length: Tensor, beta: float
) -> Tensor:
    """Length-normalised DPO: -log sigma(beta (a / n_w - b / n_l)), arXiv 2411.15124 (Tulu 3).

    chosen, rejected (B,) log-ratios, lengths (B,) trained tokens -> (B,). Unchanged when a length doubles at the same
    mean.
    """
    return sigmoid(per_token(chosen, chosen_length), per_token(rejected, rejected_length), beta)


def hinge(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """RSO's "hinge-norm": max(0, 1 - beta h), arXiv 2309.06657.

    chosen, rejected (B,) log-ratios -> (B,). 1 at h = 0, and no gradient beyond h = 1 / beta.
    """
    return torch.relu(1 - beta * (chosen - rejected))


def slic_hinge(chosen: Tensor, rejected: Tensor, gamma: float) -> Tensor:
    """SLiC's calibration loss: max(0, 1 - gamma (L_w - L_l)), arXiv 2309.06657; no reference.

    chosen, rejected (B,) log-probabilities L -> (B,). With gamma = 1 / delta it is max(0, delta - L_w + L_l) / delta,
    arXiv 2305.10425, in units of its margin.
    """
    return torch.relu(1 - gamma * (chosen - rejected))


def ipo(chosen: Tensor, rejected: Tensor, chosen_length: Tensor, rejected_length: Tensor, tau: float) -> Tensor:
    """IPO: (a / n_w - b / n_l - 1 / (2 tau))^2, arXiv 2310.12036 Eq 17 with PER-TOKEN MEANS.

    chosen, rejected (B,) log-ratios, lengths (B,) trained tokens -> (B,). The paper writes sums; its authors confirmed
    the means, and with sums the target 1 / (2 tau) would ask less a token of long completions. 1 / (4 tau^2) at h = 0.
    """
    difference = per_token(chosen, chosen_length) - per_token(rejected, rejected_length)
    return (difference - 1 / (2 * tau)).square()


def conservative(chosen: Tensor, rejected: Tensor, beta: float, label_noise: float) -> Tensor:
    """Conservative DPO: -(1 - e) log sigma(beta h) - e log sigma(-beta h), arXiv 2305.18290 with labels smoothed by e.

    chosen, rejected (B,) log-ratios -> (B,). Its minimum is at sigma(beta h) = 1 - e, not at infinity.
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_noise) * logsigmoid(margin) - label_noise * logsigmoid(-margin)


def robust(chosen: Tensor, rejected: Tensor, beta: float, label_noise: float) -> Tensor:
    """Robust DPO: [-(1 - e) log sigma(beta h) + e log sigma(-beta h)] / (1 - 2e), arXiv 2403.00409.

    chosen, rejected (B,) log-ratios -> (B,). Averaged over labels that are flipped at the rate e it is the loss of the
    clean labels; for one pair it may be negative. Raises ValueError unless 0 <= e < 1/2.
    """
    if not 0 <= label_noise < 0.5:
        raise ValueError(f"label_noise is {label_noise}; robust DPO needs 0 <= label_noise < 0.5")
    margin = beta * (chosen - rejected)
    unscaled = -(1 - label_noise) * logsigmoid(margin) + label_noise * logsigmoid(-margin)
    return unscaled / (1 - 2 * label_noise)


def simpo(
    chosen: Tensor, rejected: Tensor, chosen_length: Tensor, rejected_length: Tensor, beta: float, target_margin: float
) -> Tensor:
    """SimPO: -log sigma(beta L_w / n_w - beta L_l / n_l - gamma), arXiv 2405.14734; no reference.

    chosen, rejected (B,) log-probabilities L, lengths (B,) trained tokens, target_margin gamma -> (B,).
    """
    difference = per_token(chosen, chosen_length) - per_token(rejected, rejected_length)
    return -logsigmoid(beta * difference - target_margin)


def orpo(chosen: Tensor, rejected: Tensor, chosen_length: Tensor, rejected_length: Tensor, weight: float) -> Tensor:
    """ORPO: -L_w / n_w - lambda log sigma(lo_w - lo_l), lo = log p / (1 - p), log p = L / n; arXiv 2403.07691.

    chosen, rejected (B,) log-probabilities L, lengths (B,) trained tokens, weight lambda -> (B,). No reference.
    """
    mean_chosen, mean_rejected = per_token(chosen, chosen_length), per_token(rejected, rejected_length)
    return -mean_chosen - weight * logsigmoid(_log_odds(mean_chosen) - _log_odds(mean_rejected))


def sppo_hard(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """SPPO with a certain winner: (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2, arXiv 2405.00675 Eq 4.7.

    chosen, rejected (B,) log-ratios -> (B,).
    """
    target = 1 / (2 * beta)
    return (chosen - target).square() + (rejected + target).square()


def per_token(total: Tensor, length: Tensor) -> Tensor:
    """The mean over trained tokens: (B,), (B,) -> (B,); 0 for a completion without any."""
    return total / length.clamp(min=1)


def _log_odds(mean_logprob: Tensor) -> Tensor:
    held = mean_logprob.clamp(max=HIGHEST_MEAN_LOGPROB)
    return held - torch.log(-torch.expm1(held))
