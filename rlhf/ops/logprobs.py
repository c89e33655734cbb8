"""Log-probabilities of the tokens that were sampled, without a batch x length x vocabulary tensor."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    project: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, temperature: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of next tokens, `chunk` positions at a time.

        l_i = log softmax(project(h_i) / temperature_i)[target_i],     H_i = -sum_v p_iv log p_iv

    Args: project, the output head, (c, H) -> (c, V); hidden (N, H), the states at the positions that predict the
    targets (for the first completion token the last prompt position); targets (N,) int64; temperature (N,) > 0, the
    sampling temperature of each row. Logits are divided by it before the log-softmax; both are float32 whatever the
    dtype of the head.

    Returns: logprobs (N,) float32 with gradient, entropy (N,) float32 without. No tensor larger than chunk x V
    exists; in the backward pass each chunk's logits are computed again. Raises ValueError for a chunk below 1 or a
    temperature not above 0 (greedy samples have no log-probabilities). Does not shift, pad or mask.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least one position")
    if not bool((temperature > 0).all()):
        raise ValueError(
            f"temperature {float(temperature.min())} found, expected > 0: greedy samples have no log-probability"
        )

    def selected(states: Tensor, ids: Tensor, heat: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = torch.log_softmax(project(states).float() / heat.float().unsqueeze(1), dim=-1)
        chosen = logprobs.gather(1, ids.unsqueeze(1)).squeeze(1)
        with torch.no_grad():  # last, so that the recomputation in the backward pass stops before it
            entropy = torch.special.entr(logprobs.exp()).sum(dim=-1)
        return chosen, entropy

    # No positions still make one empty chunk, so that the head stays in the graph (a rank without tokens must not
    # hang).
    starts = range(0, max(len(targets), 1), chunk)
    parts = [
        checkpoint(
            selected,
            hidden[start : start + chunk],
            targets[start : start + chunk],
            temperature[start : start + chunk],
            use_reentrant=False,
        )
        for start in starts
    ]
    return torch.cat([chosen for chosen, _ in parts]), torch.cat([entropy for _, entropy in parts])


def sequence_logprob(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each completion, a sum and not a mean: L = sum_t m_t l_t; (B, T), (B, T) bool -> (B,)."""
    return torch.where(mask, logprobs, 0).sum(dim=1)
