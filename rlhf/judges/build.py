"""Which judge a run file asks for."""

from rlhf.config import RunConfig
from rlhf.interfaces import Judge


def build_reward_judge(config: RunConfig) -> Judge:
    """The judge behind `reward`: a Python function, or a reward model. Loads torch only for the latter."""
    if config.reward is None:
        raise ValueError("this run has no reward: it trains on ranked or demonstrated answers")
    if config.reward.model is None:
        from rlhf.judges.reward_function import RewardFunctionJudge

        return RewardFunctionJudge(config.reward)
    from rlhf.judges.reward_model import RewardModelJudge

    return RewardModelJudge(config)
