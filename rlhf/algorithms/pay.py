"""What a judge's score becomes before anything is compared with it: within a clip, and less for a missing end."""

from rlhf.config import PaidConfig
from rlhf.experience import Sample


def paid(score: float, sample: Sample, config: PaidConfig) -> float:
    """The judge's score within reward_clip, and after the rule for a completion that was cut at the length limit."""
    if config.reward_clip is not None:
        score = min(max(score, -config.reward_clip), config.reward_clip)
    rule = config.missing_eos
    if sample.finish_reason != "length":
        return score
    return rule.fixed_score if rule.fixed_score is not None else score - (rule.penalty or 0.0)
