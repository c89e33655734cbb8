"""What rows of data add to an algorithm that samples.

    loss = loss of the samples + coef * mean loss of the rows

demonstrations    -mean_t l_t, over their trained tokens: the pre-training mix of PPO-ptx, arXiv 2203.02155, Eq 2
preferences       the algorithm's own preference loss, a mean over the rows' pairs, ordered by the data's ranks

Each of the two means is divided by its own count, so that a step with more samples does not weigh the rows less.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from rlhf.algorithms import dpo, preference, sft
from rlhf.config import DpoConfig, OnlineDpoConfig, RsoConfig, RunConfig, SftConfig
from rlhf.experience import Group, TrainBatch
from rlhf.metrics import Metrics
from rlhf.ops.microbatch import LossSums, MicroBatch, Outputs

# Of what the rows' loss measures, what is logged, and under which name.
_PREPARED = {"completion/length_mean": "mix/length_mean", "pairs/made": "mix/pairs"}
_MEASURED = {
    "loss/nll": "mix/nll",
    "loss/preference": "mix/preference",
    "rewards/accuracies": "mix/accuracies",
    "rewards/margins": "mix/margins",
}


class Mix(NamedTuple):
    """coef, the weight of the rows' mean loss; prepare and loss as an algorithm's, of the rows alone."""

    coef: float
    prepare: Callable[[Sequence[Group]], TrainBatch]
    loss: Callable[[Outputs, MicroBatch], LossSums]


def build(config: RunConfig) -> Mix | None:
    """What the run file's section mix stands for; None where there is none."""
    if config.mix is None:
        return None
    algorithm = config.algorithm
    if isinstance(algorithm, OnlineDpoConfig | RsoConfig):
        given = DpoConfig(name="dpo", loss=algorithm.loss)
        return Mix(
            config.mix.coef,
            partial(_prepare, lambda rows: dpo.prepare(given, rows, {})[0]),
            partial(_loss, partial(preference.loss, algorithm.loss)),
        )
    shown = SftConfig(name="sft")
    return Mix(
        config.mix.coef, partial(_prepare, lambda rows: sft.prepare(shown, rows, {})[0]), partial(_loss, sft.loss)
    )


def apart(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """The groups that the policy sampled, and those that are rows of the data."""
    sampled = [group for group in groups if group.origin == "policy"]
    return sampled, [group for group in groups if group.origin == "dataset"]


def _prepare(prepare: Callable[[Sequence[Group]], TrainBatch], rows: Sequence[Group]) -> TrainBatch:
    batch = prepare(rows)
    renamed: Metrics = {_PREPARED[name]: metric for name, metric in batch.metrics.items() if name in _PREPARED}
    return TrainBatch(batch.rows, batch.normalizer, renamed)


def _loss(loss: Callable[[Outputs, MicroBatch], LossSums], outputs: Outputs, batch: MicroBatch) -> LossSums:
    sums = loss(outputs, batch)
    return LossSums(sums.loss, {_MEASURED[name]: pair for name, pair in sums.means.items() if name in _MEASURED})
