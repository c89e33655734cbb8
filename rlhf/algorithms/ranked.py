"""What the models that score ranked answers train on: whole answers as rows, one group a unit."""

from collections.abc import Sequence

import numpy as np

from rlhf.experience import Group, Row, Sample, TrainBatch
from rlhf.metrics import mean_of, total


def answer_row(unit: int, group: Group, sample: Sample, constants: dict[str, float]) -> Row:
    """One answer with the numbers that hold for all of it, each repeated along its (T,) tokens.

    The loss mask is all True: the score is of the whole answer, tool tokens included."""
    length = len(sample.token_ids)
    return Row(
        unit=unit,
        prompt_ids=group.prompt.token_ids,
        completion_ids=sample.token_ids,
        loss_mask=np.ones(length, dtype=np.bool_),
        temperature=1.0,
        tokens={name: np.full(length, value, dtype=np.float32) for name, value in constants.items()},
    )


def ranked_batch(rows: Sequence[Row], dropped: int) -> TrainBatch:
    """The rows, whose loss is divided by the count of units, with what the report shows of them.

    dropped, groups that were left out."""
    measured = {
        "completion/length_mean": mean_of(float(len(row.completion_ids)) for row in rows),
        "groups/dropped": total(dropped),
    }
    return TrainBatch(tuple(rows), "units", measured)
