"""One file a paper. An algorithm is two pure functions, `prepare` and `loss`, and the columns that it needs."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from rlhf.experience import Group, TrainBatch
from rlhf.ops.microbatch import LossSums, MicroBatch, Outputs, Scores

RunState = Mapping[str, float]


class Algorithm(NamedTuple):
    """What the learner needs to know of an algorithm; it never asks for its name.

    needs, the columns that must be filled before `prepare`. initial_state, what `prepare` carries from step to step
    (a moving baseline); it is checkpointed. prepare(groups, state) -> (batch, next state). loss(outputs, micro-batch)
    -> sums.
    """

    needs: frozenset[str]
    initial_state: RunState
    prepare: Callable[[Sequence[Group], RunState], tuple[TrainBatch, RunState]]
    loss: Callable[[Outputs, MicroBatch], LossSums]


class ActorCriticAlgorithm(NamedTuple):
    """The same with a critic, which fills the values that `prepare` reads and learns by a loss of its own.

    value_loss(scores, micro-batch) -> sums; both losses are divided by the same count.
    """

    needs: frozenset[str]
    initial_state: RunState
    prepare: Callable[[Sequence[Group], RunState], tuple[TrainBatch, RunState]]
    loss: Callable[[Outputs, MicroBatch], LossSums]
    value_loss: Callable[[Scores, MicroBatch], LossSums]


class ScoreAlgorithm(NamedTuple):
    """The same for a model with a scalar head: its loss reads scores instead of log-probabilities."""

    needs: frozenset[str]
    initial_state: RunState
    prepare: Callable[[Sequence[Group], RunState], tuple[TrainBatch, RunState]]
    loss: Callable[[Scores, MicroBatch], LossSums]
