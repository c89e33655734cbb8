"""Which judge a run file asks for."""

import math
from collections.abc import Mapping
from pathlib import Path

from rlhf.config import RewardPart, RewardSource, RunConfig
from rlhf.config_reward import ASKED_OVER_A_NETWORK
from rlhf.interfaces import Judge
from rlhf.judges.patience import LONGEST_PAUSE_S, PatientJudge
from rlhf.judges.weighted import Part, Scale, WeightedJudge

ONLY = "raw"  # the part of a reward that is one, where it is normalised: its own units are logged under this name


def build_reward_judge(config: RunConfig, scales: Mapping[str, Scale], run_dir: Path) -> Judge:
    """The judge behind `reward`, normalised by `scales`; run_dir keeps what judges answered.

    Loads torch only where a reward model is named.
    """
    reward = config.reward
    if reward is None:
        raise ValueError("this run has no reward: it trains on ranked or demonstrated answers")
    if reward.parts is None and not reward.normalises:
        return _patient(config, reward, "reward", run_dir)
    return WeightedJudge([_part(config, key, source, run_dir) for key, source in reward.sources().items()], scales)


def longest_call_s(config: RunConfig) -> float:
    """How long judging one group may take by the settings: time limits and pauses of all repetitions, in seconds.

    0 for reward models and rankers, which have no limit of their own.
    """
    reward = config.reward
    if reward is None:
        return 0.0
    total, calls = 0.0, reward.retries + 1
    for source in reward.sources().values():
        if source.kind in ("function", "server"):
            total += calls * source.timeout_s
        elif source.llm is not None:
            count = config.algorithm.samples_per_prompt
            questions = {
                "pointwise": count,
                "pairwise": 2 * count if source.llm.against_column else count * (count - 1),
            }
            total += calls * source.timeout_s * math.ceil(questions[source.llm.style] / source.llm.parallel)
        if source.kind in ASKED_OVER_A_NETWORK:
            total += sum(min(reward.backoff_s * 2**i, LONGEST_PAUSE_S) for i in range(reward.retries))
    return total


def _part(config: RunConfig, key: str, source: RewardSource, run_dir: Path) -> Part:
    judge = _patient(config, source, key, run_dir)
    if isinstance(source, RewardPart):
        return Part(key.rpartition(".")[2], source.weight, source.if_none, judge)
    return Part(ONLY, 1.0, None, judge)


def _patient(config: RunConfig, source: RewardSource, key: str, run_dir: Path) -> PatientJudge:
    assert config.reward is not None  # it has this source
    backoff_s = config.reward.backoff_s if source.kind in ASKED_OVER_A_NETWORK else 0.0
    return PatientJudge(_source(config, source, key, run_dir), config.reward.retries, backoff_s)


def _source(config: RunConfig, source: RewardSource, key: str, run_dir: Path) -> Judge:
    if source.kind == "function":
        from rlhf.judges.reward_function import RewardFunctionJudge

        return RewardFunctionJudge(source)
    if source.kind == "server":
        from rlhf.judges.reward_server import RewardServerJudge

        return RewardServerJudge(source, key)
    if source.kind == "llm":
        from rlhf.judges.language_model import LanguageModelJudge

        return LanguageModelJudge(source, key, run_dir)
    if source.kind == "ranker":
        from rlhf.judges.ranker import RankerJudge

        return RankerJudge(config, source, key)
    from rlhf.judges.reward_model import RewardModelJudge

    return RewardModelJudge(config, source, key)
