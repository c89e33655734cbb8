"""What is done about a judge that fails: its call is made again here; whether its group is given up, or the run, is
settled in `rlhf.judges.failures`."""

import time
from dataclasses import replace

from rlhf.errors import JudgeFailed, NothingScored
from rlhf.experience import REWARD, Columns, Group
from rlhf.interfaces import Judge

# Score columns of this prefix are counts of what went wrong; their sums over samples are metrics of the same name.
FAULTS = "faults/"
RETRIES = f"{FAULTS}judge_retries"
LONGEST_PAUSE_S = 30.0


class PatientJudge:
    """A judge whose failed calls are made again, at most `retries` times.

    Before the i-th repetition it pauses backoff_s 2^(i-1) seconds, at most 30: a server that is overloaded needs that,
    a function does not. Raises the last JudgeFailed when all calls failed, at once when it says that another call
    would not help, and NothingScored when no sample of the group has a score.
    """

    def __init__(self, judge: Judge, retries: int, backoff_s: float) -> None:
        self.inner, self._retries, self._backoff_s = judge, retries, backoff_s

    def setup(self) -> None:
        self.inner.setup()

    def judge(self, group: Group) -> Columns:
        """The columns of the first call that succeeds; with them how many did not, where that is above 0."""
        for failed in range(self._retries + 1):
            try:
                columns = self.inner.judge(group)
            except JudgeFailed as error:
                if failed == self._retries or not error.again:
                    raise
                time.sleep(min(self._backoff_s * 2**failed, LONGEST_PAUSE_S))
            else:
                return _counted(columns, failed)
        raise AssertionError("the last call returns or raises")

    def close(self) -> None:
        self.inner.close()


def refuse_unscored(group: Group, columns: Columns, why: str) -> None:
    """Raises NothingScored when no sample has a reward: such a group teaches nothing."""
    if all(score is None for score in columns.scores[REWARD]):
        what = f"none of {len(group.samples)} samples could be scored: {why}"
        raise NothingScored(
            f"{what}\nprompt {group.prompt.id} (row {group.prompt.row})", f"nothing scored: {why}", again=False
        )


def _counted(columns: Columns, failed: int) -> Columns:
    """The columns with the count of failed calls on the first sample, so that the sum over samples is right."""
    if failed == 0:
        return columns
    count = len(columns.scores[REWARD])
    before = columns.scores.get(RETRIES, [0.0] * count)
    counted = [(before[0] or 0.0) + failed, *before[1:]]
    return replace(columns, scores={**columns.scores, RETRIES: counted})
