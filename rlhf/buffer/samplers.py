"""Which row of the data a prompt id stands for: a pure function of (run seed, number of rows, prompt id)."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rlhf.errors import BadInput
from rlhf.seeding import seed_for


def order(seed: int, rows: int, prompt_id: int, *, shuffle: bool) -> tuple[int, int]:
    """(epoch, row) of a prompt id. Prompt ids count up over epochs, and each epoch visits every row once.

        epoch = id // rows,  row = permutation(seed, epoch)[id % rows]        without shuffling: row = id % rows

    The permutation sorts the rows by 64-bit words of PCG64 seeded by `seed_for(seed, "row order", epoch)`. numpy
    promises that these words stay the same in all its versions, which it does not for `Generator.permutation`; a
    resumed run may meet a newer numpy. Raises BadInput for an empty data set, ValueError for a negative id.
    """
    if rows < 1:
        raise BadInput(f"the data has {rows} rows, expected at least 1: check data.path, data.limit and data.heldout")
    if prompt_id < 0:
        raise ValueError(f"prompt id {prompt_id} is negative: ids count up from 0")
    epoch, position = divmod(prompt_id, rows)
    return epoch, int(_permutation(seed, rows, epoch)[position]) if shuffle else position


# Remembered, because neighbouring ids share it; around the end of an epoch two are in use.
@lru_cache(maxsize=4)
def _permutation(seed: int, rows: int, epoch: int) -> NDArray[np.intp]:
    words = np.random.PCG64(seed_for(seed, "row order", epoch)).random_raw(rows)
    return np.argsort(words, kind="stable")
