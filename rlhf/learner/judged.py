"""What judges say beside the reward, as metrics of a step."""

from collections.abc import Sequence

from rlhf import metrics
from rlhf.experience import REWARD, Group
from rlhf.metrics import Metrics

PART = f"{REWARD}/"
FAULTS = "faults/"


def judged(groups: Sequence[Group]) -> Metrics:
    """Score columns by their prefix: `reward/X` as reward/X/mean over the samples that have one, `faults/X` summed."""
    parts: list[Metrics] = []
    for group in groups:
        for sample in group.samples:
            for name, score in sample.scores.items():
                if name.startswith(PART):
                    found = [] if score is None else [score]
                    parts.append({f"{name}/mean": metrics.mean_of(found)})
                elif name.startswith(FAULTS):
                    parts.append({name: metrics.total(score or 0.0)})
    return metrics.merge(parts)
