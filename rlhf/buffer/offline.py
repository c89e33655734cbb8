"""Rows that no policy of this run sampled, as groups: a preference pair is a group of two with ranks, a demonstration
a group of one. They enter the buffer through the same door as rollouts (`lease`, then `add_group`) and never age.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.errors import BadInput
from rlhf.experience import RANK, Group, Ids, Mask, Prompt, Sample


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """An answer found in the data: token_ids (T,) int32 with the EOS where it ends, loss_mask (T,) bool, true where
    it is trained; rank, 0 is preferred to 1, None where the data does not rank.
    """

    token_ids: Ids
    loss_mask: Mask
    text: str
    rank: float | None


def dataset_group(prompt: Prompt, completions: Sequence[Completion]) -> Group:
    """A group of origin "dataset": samples in the given order, without behavior_logprobs, versions, sampling and seed.

    Ranks become the column "rank" when every completion has one. Raises BadInput, naming the row, when there is no
    completion, one has no tokens, or only some have ranks. Does not tokenize and does not make the loss mask.
    """
    where = f"row {prompt.row} (prompt {prompt.id})"
    if not completions:
        raise BadInput(f"{where}: no completion, expected at least one")
    ranked = [completion.rank is not None for completion in completions]
    if any(ranked) and not all(ranked):
        raise BadInput(f"{where}: {sum(ranked)} of {len(ranked)} completions are ranked, expected all or none")
    for index, completion in enumerate(completions):
        if len(completion.token_ids) == 0:
            raise BadInput(f"{where}: completion {index} has no tokens, expected at least one")
    samples = tuple(
        Sample(
            index=index,
            token_ids=completion.token_ids,
            loss_mask=completion.loss_mask,
            text=completion.text,
            finish_reason="given",
            behavior_logprobs=None,
            versions=None,
            sampling=None,
            seed=None,
            scores={} if completion.rank is None else {RANK: float(completion.rank)},
            tokens={},
        )
        for index, completion in enumerate(completions)
    )
    return Group(prompt, samples, "dataset")
