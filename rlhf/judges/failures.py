"""When groups that could not be judged are given up, and when the run is.

A group that could not be judged is held: it stays in the ledger as it is. With the next group of the same judge that is
scored the held ones are dropped, each with its reason, and others take their places in the step. When the failures do
not end, the run does, with the last error; what is held was not dropped then, and is judged again once the cause is
mended. Failures do not end when

- 3 groups failed before the first was scored (a misspelt name, a wrong number of values: found in seconds),
- `max_in_a_row` groups failed one after the other, or
- more than `max_fraction` of the last 100 groups failed, read from 20 on.

Groups in which no sample has a score are counted with the others, but the first rule is not about them: the judge did
answer. Neither torch nor ray nor the ledger is known here.
"""

from collections import deque
from collections.abc import Callable, Mapping

from rlhf import metrics
from rlhf.errors import JudgeFailed, NothingScored
from rlhf.metrics import Metrics

AT_THE_START = 3
WINDOW = 100
ENOUGH = 20


class JudgeFailures:
    """What one judge failed at, and what follows from it. `note` is told of every group that is dropped."""

    def __init__(self, max_in_a_row: int, max_fraction: float, note: Callable[[str], None]) -> None:
        self._max_in_a_row, self._max_fraction, self._note = max_in_a_row, max_fraction, note
        self._held: dict[int, str] = {}
        self._in_a_row = 0
        self._recent: deque[bool] = deque(maxlen=WINDOW)  # true where a group failed
        self._any_scored = False
        self._dropped = 0

    @property
    def held(self) -> int:
        """Groups that are neither judged nor dropped yet; others may be started in their places."""
        return len(self._held)

    def scored(self) -> Mapping[int, str]:
        """A group was judged. Returns the prompts to drop now, with the reason of each."""
        self._any_scored, self._in_a_row = True, 0
        self._recent.append(False)
        given_up, self._held = self._held, {}
        self._dropped += len(given_up)
        for prompt_id, reason in given_up.items():
            self._note(f"the group of prompt {prompt_id} is dropped: {reason}")
        return given_up

    def failed(self, prompt_id: int, error: JudgeFailed) -> None:
        """A group could not be judged, with all its repetitions. Raises JudgeFailed when the run must end."""
        self._held[prompt_id] = error.reason
        self.counted(error)

    def counted(self, error: JudgeFailed) -> None:
        """A failure at a group that is in no ledger (of an evaluation). Raises as `failed` does."""
        self._in_a_row += 1
        self._recent.append(True)
        early = not self._any_scored and not isinstance(error, NothingScored)
        limit = min(AT_THE_START, self._max_in_a_row) if early else self._max_in_a_row
        share = sum(self._recent) / len(self._recent)
        if self._in_a_row >= limit:
            first = " before any was judged" if early else ""
            rule = f"{self._in_a_row} groups in a row could not be judged{first} (reward.max_failed_in_a_row)"
        elif len(self._recent) >= ENOUGH and share > self._max_fraction:
            rule = (
                f"{share:.0%} of the last {len(self._recent)} groups could not be judged, "
                f"reward.max_dropped_fraction is {self._max_fraction:g}"
            )
        else:
            return
        message = f"{rule}; they stay in the buffer and are judged when the run goes on. The last:\n{error}"
        raise JudgeFailed(message) from error

    def measured(self) -> Metrics:
        """How many groups were dropped since the last call."""
        dropped, self._dropped = self._dropped, 0
        return {"faults/judge_dropped": metrics.total(dropped)}
