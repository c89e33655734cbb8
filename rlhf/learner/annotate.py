"""Columns that only the learner can fill, computed in passes without gradient: groups in, one array a sample out."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from rlhf.config import LearnerConfig
from rlhf.experience import Columns, Floats, Group, Mask, Row
from rlhf.learner.collate import collate
from rlhf.learner.engine import Engine
from rlhf.learner.mismatch import mismatch
from rlhf.learner.plan import Unit, plan_shares, shares
from rlhf.metrics import Metrics, merge


class Share:
    """The part of some groups that one rank annotates: whole groups, so that no column is put together from two ranks.

    Rows are numbered over all groups; `first` is the number of each group's first row.
    """

    def __init__(self, groups: Sequence[Group], rank: int, ranks: int) -> None:
        self._groups = list(groups)
        self._first = np.cumsum([0, *(len(group.samples) for group in groups)]).tolist()
        units = [unit_of(group, first) for group, first in zip(groups, self._first, strict=False)]
        self._shares, self._rank = shares(units, ranks), rank
        self.numbers = sorted(self._first.index(unit.rows[0].unit) for unit in self._shares[rank])

    def read(self, engine: Engine, settings: LearnerConfig) -> dict[int, list[Floats]]:
        """For each group of this rank an array (T,) a sample: the log-probs of the engine's policy, or the scores of
        its scalar head, where a token is predicted. Collective."""
        single = [[Unit((row,)) for unit in share for row in unit.rows] for share in self._shares]
        planned = plan_shares(single, settings.tokens_per_microbatch, packed=settings.packing)
        filled: dict[int, Floats] = {}
        with torch.no_grad():
            for micro in planned[self._rank]:
                collated = collate(micro, (), packed=settings.packing).to(engine.device)
                answers = collated.scores(engine.forward(collated.inputs)[0]).values.cpu().numpy()
                for i, unit in enumerate(micro):
                    row = unit.rows[0]
                    filled[row.unit] = answers[i, : len(row.completion_ids)].astype(np.float32)
        return {n: [filled[self._first[n] + i] for i in range(len(self._groups[n].samples))] for n in self.numbers}

    def columns(self, filled: Mapping[str, dict[int, list[Floats]]]) -> list[Columns]:
        """What was read, by column name, as the columns of each group of this rank."""
        return [
            Columns(self._groups[number].prompt.id, {}, {name: arrays[number] for name, arrays in filled.items()})
            for number in self.numbers
        ]

    def mismatch(self, logprobs: dict[int, list[Floats]], version: int) -> Metrics:
        """Learner against sampler at the trained tokens that the learner's current version sampled."""
        parts = []
        for number, arrays in logprobs.items():
            group = self._groups[number]
            for sample, learner, fresh in zip(group.samples, arrays, fresh_masks(group, version), strict=True):
                if sample.behavior_logprobs is not None:
                    said = torch.tensor(sample.behavior_logprobs)
                    parts.append(mismatch(torch.from_numpy(learner), said, torch.from_numpy(fresh)))
        return merge(parts)


def unit_of(group: Group, first: int) -> Unit:
    """A group's samples as rows numbered from `first`."""
    return Unit(
        tuple(
            Row(
                unit=first + sample.index,
                prompt_ids=group.prompt.token_ids,
                completion_ids=sample.token_ids,
                loss_mask=sample.loss_mask,
                temperature=_temperature(group, sample.index),
                tokens={},
            )
            for sample in group.samples
        )
    )


def fresh_masks(group: Group, version: int) -> list[Mask]:
    """For each sample (T,) bool, true at trained tokens if this version sampled all of it.

    Where the weights changed on the way, later tokens were sampled on a cache that older weights filled: they differ
    from the learner's for a good reason, too."""
    masks = []
    for sample in group.samples:
        current = sample.versions is not None and bool((sample.versions == version).all())
        masks.append(sample.loss_mask & current)
    return masks


def _temperature(group: Group, index: int) -> float:
    """1 for data that no policy sampled; greedy samples have no log-probability."""
    sampling = group.samples[index].sampling
    if sampling is None:
        return 1.0
    if sampling.temperature == 0:
        raise ValueError(f"prompt {group.prompt.id}, sample {index} was sampled greedily (temperature 0)")
    return sampling.temperature
