"""The zero and the unit of normalised rewards: measured once on reference completions, then kept for the whole run.

The numbers stand in RUN_DIR/reward_scales.json and are pinned in the ledger. A run that goes on uses the same ones,
however the judge has changed; a process that died before it had written them leaves nothing behind.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

from rlhf.config import DataConfig, RunConfig, SftConfig
from rlhf.data.offline import OfflineSet
from rlhf.errors import BadInput, DeadlinePassed, NothingScored
from rlhf.experience import REWARD, Columns, Group
from rlhf.interfaces import Task, Workers
from rlhf.judges.build import ONLY
from rlhf.judges.weighted import Scale
from rlhf.observers import replace_durably

SCALES_FILE = "reward_scales.json"
NO_LIMIT = 1 << 20  # tokens: a reward model has a limit of its own
POLL_S = 0.05


def settle_scales(
    config: RunConfig,
    run_dir: Path,
    hire: Callable[[], AbstractContextManager[Workers]],
    note: Callable[[str], None],
) -> Mapping[str, Scale]:
    """The scales of this run by part: those of its directory, else measured now by a judge without any.

    Empty when nothing is normalised. `hire` gives the workers that judge, for as long as the block lasts. Raises
    BadInput when the references cannot tell a scale, and what the judge raises.
    """
    reward = config.reward
    if reward is None or not reward.normalises:
        return {}
    file = run_dir / SCALES_FILE
    if file.exists():
        return {name: Scale(**scale) for name, scale in json.loads(file.read_text()).items()}
    groups = reference_groups(config)
    with hire() as workers:
        judged = judge_all(workers, groups, config.loop.wait_timeout_s)
    scales = {}
    for key, source in reward.sources().items():
        if source.normalise != "none":
            name = ONLY if reward.parts is None else key.rpartition(".")[2]
            column = [score for columns in judged for score in columns.scores.get(f"{REWARD}/{name}", [])]
            scales[name] = fit([score for score in column if score is not None], key, unit=source.normalise != "mean")
            note(f"{key}: {scales[name].mean:.4g} ± {scales[name].std:.4g} on {scales[name].n} reference answers")
    replace_durably(file, json.dumps({name: asdict(scale) for name, scale in scales.items()}, indent=1) + "\n")
    return scales


def fit(scores: Sequence[float], key: str, *, unit: bool) -> Scale:
    """Mean, and with `unit` standard deviation in the population form (else 1), of the references that were scored."""
    if len(scores) < 2:
        raise BadInput(
            f"{key}.normalise: {len(scores)} answers of reward.reference could be scored; expected 2 or more"
        )
    mean = math.fsum(scores) / len(scores)
    std = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / len(scores))
    if not unit:
        return Scale(mean, 1.0, len(scores))
    if len(set(scores)) == 1:
        raise BadInput(
            f"{key}.normalise: all {len(scores)} answers of reward.reference have the reward {mean:g}, so there is no "
            "unit; expected answers that differ, or normalise: mean"
        )
    return Scale(mean, std, len(scores))


def reference_groups(config: RunConfig) -> list[Group]:
    """The demonstrations of `reward.reference` as groups of one, in their order. Raises BadInput."""
    assert config.reward is not None and config.reward.reference is not None
    settings = config.reward.reference
    data = DataConfig(
        **settings.model_dump(),
        max_prompt_tokens=NO_LIMIT,
        max_completion_tokens=NO_LIMIT,
        format="prompt_completion",
        chat_template=config.data.chat_template,
        system_prompt=config.data.system_prompt,
        shuffle=False,
        bad_rows="drop",
    )
    update = {"algorithm": SftConfig(name="sft"), "data": data}
    rows = OfflineSet.load(config.model_copy(update=update))
    return [rows.group(rows.prompt(number)) for number in range(len(rows))]


def judge_all(workers: Workers, groups: Sequence[Group], timeout_s: float) -> list[Columns]:
    """What the workers say of each group that they can score. Raises what they raise, DeadlinePassed for silence."""
    for number, group in enumerate(groups):
        workers.submit(Task(number, (group.prompt.id,), group), None)
    judged: list[Columns] = []
    missing, last = len(groups), time.monotonic()
    while missing:
        results = workers.collect(POLL_S)
        for result in results:
            if not result.prompt_ids:
                continue  # a sign of life
            missing, last = missing - 1, time.monotonic()
            if result.error is None:
                judged.append(workers.fetch(result.value))
            elif not isinstance(result.error, NothingScored):
                raise result.error
        if not results and time.monotonic() - last > timeout_s:
            raise DeadlinePassed(
                f"waited {timeout_s:g} s for the rewards of {missing} of {len(groups)} reference answers: "
                + "; ".join(workers.holding())
            )
    return judged
