"""Supervised fine-tuning on demonstrations.

    loss = -sum_i sum_t m_it l_it / sum_i sum_t m_it

over the tokens of the answers (of the assistant's turns in a conversation), each one's end-of-sequence token included.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from rlhf.algorithms import Algorithm, RunState
from rlhf.config import SftConfig
from rlhf.experience import Group, Row, TrainBatch
from rlhf.metrics import mean_of
from rlhf.ops.losses import negative_log_likelihood
from rlhf.ops.microbatch import LossSums, MicroBatch, Outputs


def build(config: SftConfig) -> Algorithm:
    """SFT; it needs no column and carries nothing from step to step."""
    return Algorithm(needs=frozenset(), initial_state={}, prepare=partial(prepare, config), loss=loss)


def prepare(config: SftConfig, groups: Sequence[Group], state: RunState) -> tuple[TrainBatch, RunState]:
    """One row a demonstration, at temperature 1; the learner divides by the number of trained tokens. Pure.

    Raises ValueError for a group of several samples: which of them is the demonstration is not said.
    """
    rows = []
    for unit, group in enumerate(sorted(groups, key=lambda group: group.prompt.id)):
        if len(group.samples) != 1:
            raise ValueError(f"{config.name}: prompt {group.prompt.id} has {len(group.samples)} samples, expected one")
        (sample,) = group.samples
        rows.append(Row(unit, group.prompt.token_ids, sample.token_ids, sample.loss_mask, 1.0, {}))
    measured = {"completion/length_mean": mean_of(float(np.sum(row.loss_mask)) for row in rows)}
    return TrainBatch(tuple(rows), "tokens", measured), state


def loss(outputs: Outputs, batch: MicroBatch) -> LossSums:
    """-sum_i sum_t m_it l_it of the micro-batch; the metric is nats a token."""
    total = negative_log_likelihood(outputs.logprobs, batch.mask)
    return LossSums(total, {"loss/nll": (total.detach(), batch.mask.sum())})
