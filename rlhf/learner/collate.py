"""Rows to tensors: what the model reads, where its answers go, and what the loss reads.

Masks come from the rows and from lengths, never from token ids: padding may be any id, EOS included.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf.experience import Row
from rlhf.learner.plan import Unit
from rlhf.models.policy import ModelInputs
from rlhf.ops.microbatch import MicroBatch, Outputs, Scores

PAD_ID = 0  # never seen: attention and loss masks are false there


class Collated(NamedTuple):
    """A micro-batch: inputs of N predictions, their places (N,) in the flat B x T of `batch`."""

    inputs: ModelInputs
    batch: MicroBatch
    slots: Tensor

    def to(self, device: torch.device) -> "Collated":
        batch = self.batch
        return Collated(
            self.inputs.to(device),
            MicroBatch(
                batch.mask.to(device),
                batch.weight.to(device),
                batch.unit.to(device),
                {name: column.to(device) for name, column in batch.tokens.items()},
            ),
            self.slots.to(device),
        )

    def outputs(self, logprobs: Tensor, entropy: Tensor) -> Outputs:
        """The model's answers (N,) put at their places in (B, T), 0 at padding."""
        return Outputs(self._placed(logprobs), self._placed(entropy))

    def scores(self, values: Tensor) -> Scores:
        """The same for a scalar head."""
        return Scores(self._placed(values))

    def _placed(self, values: Tensor) -> Tensor:
        flat = values.new_zeros(self.batch.mask.numel()).index_put((self.slots,), values)
        return flat.view(self.batch.mask.shape)


def collate(units: Sequence[Unit], columns: Sequence[str], *, packed: bool) -> Collated:
    """Tensors of some units, padded on the right, or packed one behind the other; no units: a filler of weight 0.

    In the packed form position_ids start at 0 with each row and there is no attention mask: transformers then builds
    one that keeps rows apart.
    """
    rows = [row for unit in units for row in unit.rows]
    if not rows:
        filler = collate([_filler(columns)], columns, packed=packed)
        return filler._replace(batch=filler.batch._replace(weight=torch.zeros(1)))
    lengths = [len(row.prompt_ids) + len(row.completion_ids) for row in rows]
    starts = [0, *np.cumsum(lengths)[:-1].tolist()] if packed else [i * max(lengths) for i in range(len(rows))]
    width = max(len(row.completion_ids) for row in rows)
    slots = [i * width + np.arange(len(row.completion_ids)) for i, row in enumerate(rows)]
    inputs = _inputs(rows, lengths, starts, packed)
    return Collated(inputs, _batch(rows, columns, width), torch.from_numpy(np.concatenate(slots)))


def _inputs(rows: Sequence[Row], lengths: Sequence[int], starts: Sequence[int], packed: bool) -> ModelInputs:
    size = sum(lengths) if packed else len(rows) * max(lengths)
    ids, positions = np.full(size, PAD_ID, dtype=np.int64), np.zeros(size, dtype=np.int64)
    attended = np.zeros(size, dtype=np.int64)
    for row, start, length in zip(rows, starts, lengths, strict=True):
        here = slice(start, start + length)
        ids[here] = np.concatenate([row.prompt_ids, row.completion_ids])
        positions[here] = np.arange(length)
        attended[here] = 1
    shape = (1, size) if packed else (len(rows), max(lengths))
    # The state at a token predicts the next one: the first completion token comes from the LAST PROMPT position.
    predictors = [
        s + len(row.prompt_ids) - 1 + np.arange(len(row.completion_ids)) for row, s in zip(rows, starts, strict=True)
    ]
    temperatures = [np.full(len(row.completion_ids), row.temperature, dtype=np.float32) for row in rows]
    return ModelInputs(
        input_ids=torch.from_numpy(ids.reshape(shape)),
        attention_mask=None if packed else torch.from_numpy(attended.reshape(shape)),
        position_ids=torch.from_numpy(positions.reshape(shape)),
        predictors=torch.from_numpy(np.concatenate(predictors)),
        targets=torch.from_numpy(np.concatenate([row.completion_ids for row in rows]).astype(np.int64)),
        temperature=torch.from_numpy(np.concatenate(temperatures)),
    )


def _batch(rows: Sequence[Row], columns: Sequence[str], width: int) -> MicroBatch:
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    tokens = {name: torch.zeros(len(rows), width) for name in columns}
    for i, row in enumerate(rows):
        length = len(row.completion_ids)
        mask[i, :length] = torch.tensor(row.loss_mask)
        for name in columns:
            tokens[name][i, :length] = torch.tensor(row.tokens[name])
    unit = torch.tensor([row.unit for row in rows], dtype=torch.int64)
    return MicroBatch(mask, torch.ones(len(rows)), unit, tokens)


def _filler(columns: Sequence[str]) -> Unit:
    """One prompt and one completion token, nothing of it trained."""
    nothing = np.zeros(1, dtype=np.float32)
    token = np.full(1, PAD_ID, dtype=np.int32)
    return Unit((Row(-1, token, token, np.zeros(1, dtype=np.bool_), 1.0, dict.fromkeys(columns, nothing)),))
