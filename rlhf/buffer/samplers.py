"""Which row of the data a prompt id stands for: a pure function of (run seed, number of rows, prompt id)."""

import numpy as np
from numpy.typing import NDArray

from rlhf.errors import BadInput
from rlhf.seeding import seed_for

PERMUTATIONS_KEPT = 2


class RowOrder:
    """Prompt ids count up over epochs; each epoch visits every row once.

        epoch = id // rows,  row = permutation(seed, epoch)[id % rows]        without shuffling: row = id % rows

    The permutation sorts the rows by 64-bit words of PCG64 seeded by `seed_for(seed, "row order", epoch)`. numpy
    promises that raw words stay the same in all its versions, which it does not for `Generator.permutation`; a
    resumed run may meet a newer numpy. Keeps no state but a memory of the last two permutations. Raises BadInput for
    an empty data set.
    """

    def __init__(self, seed: int, rows: int, *, shuffle: bool) -> None:
        if rows < 1:
            raise BadInput(
                f"the data set has {rows} rows, expected at least 1: check data.path, data.limit and data.heldout"
            )
        self.seed = seed
        self.rows = rows
        self.shuffle = shuffle
        self._permutations: dict[int, NDArray[np.intp]] = {}

    def place(self, prompt_id: int) -> tuple[int, int]:
        """(epoch, row) of a prompt id."""
        if prompt_id < 0:
            raise ValueError(f"prompt id {prompt_id} is negative")
        epoch, position = divmod(prompt_id, self.rows)
        return epoch, int(self._permutation(epoch)[position]) if self.shuffle else position

    def _permutation(self, epoch: int) -> NDArray[np.intp]:
        if epoch not in self._permutations:
            while len(self._permutations) >= PERMUTATIONS_KEPT:
                del self._permutations[min(self._permutations)]
            words = np.random.PCG64(seed_for(self.seed, "row order", epoch)).random_raw(self.rows)
            self._permutations[epoch] = np.argsort(words, kind="stable")
        return self._permutations[epoch]
