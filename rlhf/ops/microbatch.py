"""What a loss sees and what it gives back. Shapes: B rows, T completion positions, right-padded."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class MicroBatch(NamedTuple):
    """Some rows of a train batch as tensors.

    mask (B, T) bool, true at the tokens to train on: false at padding, at tokens of tools, and all over a filler row.
    weight (B,) float, 1 for a row and 0 for a filler that only keeps ranks in step. unit (B,) int64, rows that belong
    together are adjacent. tokens, the (B, T) columns that `prepare` gave, zero at padding.
    """

    mask: Tensor
    weight: Tensor
    unit: Tensor
    tokens: Mapping[str, Tensor]


class Outputs(NamedTuple):
    """What the model says about a micro-batch.

    logprobs (B, T) float32 with gradient, of the completion tokens at the sampling temperature; entropy (B, T) float32
    without gradient, of the whole next-token distribution at each position. Both are 0 at padding.
    """

    logprobs: Tensor
    entropy: Tensor


class Scores(NamedTuple):
    """What a model with a scalar head says about a micro-batch: values (B, T) float32 with gradient, 0 at padding."""

    values: Tensor


class LossSums(NamedTuple):
    """A loss summed over the micro-batch, never averaged: the learner divides once by a global count.

    loss, a scalar with gradient. means, a name to (sum, count), both scalars without gradient.
    """

    loss: Tensor
    means: Mapping[str, tuple[Tensor, Tensor]]
