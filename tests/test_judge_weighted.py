"""Several rewards as one, and rewards that are normalised on reference answers.

Not covered here: reward models as parts (each part is built as it is alone).
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.cli.main import main
from rlhf.config import RewardConfig, RunConfig
from rlhf.errors import BadInput, JudgeFailed, NothingScored
from rlhf.experience import REWARD, Columns, Group
from rlhf.judges.build import longest_call_s
from rlhf.judges.scales import SCALES_FILE, fit
from rlhf.judges.weighted import Part, Scale, WeightedJudge
from rlhf.learner.judged import judged
from rlhf.metrics import values
from rlhf.observers import read_jsonl

REWARDS = """
def length(prompts, completions, **columns):
    return [float(len(c)) for c in completions]

def vowels(prompts, completions):
    return [float(sum(letter in "aeiou" for letter in c)) for c in completions]
"""


class Says:
    """Gives the same columns for every group."""

    def __init__(self, scores: Mapping[str, Sequence[float | None]]) -> None:
        self._scores = scores

    def setup(self) -> None: ...

    def judge(self, group: Group) -> Columns:
        rewards = self._scores[REWARD]
        if all(reward is None for reward in rewards):
            raise NothingScored("none", again=False)
        return Columns(group.prompt.id, self._scores, {})

    def close(self) -> None: ...


@pytest.fixture
def group(make_group: Callable[..., Group]) -> Group:
    return make_group(3, [None] * 3, [1, 2, 3], {}, {})


def test_the_sum_is_weighted_and_the_parts_are_kept_in_their_own_units(group: Group) -> None:
    """2 (r - 10) / 5 - 1 s, by hand; what the parts' judges say beside is kept apart, and faults are added up."""
    one = Says({REWARD: [10.0, 20.0, 0.0], "reward/doubt": [0.5, 0.25, 0.0], "faults/judge_retries": [1.0, 0.0, 0.0]})
    two = Says({REWARD: [1.0, 0.0, 4.0], "faults/judge_retries": [2.0, 0.0, 0.0]})
    parts = [Part("helpful", 2.0, None, one), Part("long", -1.0, None, two)]
    columns = WeightedJudge(parts, {"helpful": Scale(10.0, 5.0, 9)}).judge(group)
    assert columns.scores == {
        REWARD: [-1.0, 4.0, -8.0],
        "reward/helpful": [10.0, 20.0, 0.0],
        "reward/helpful_doubt": [0.5, 0.25, 0.0],
        "reward/long": [1.0, 0.0, 4.0],
        "faults/judge_retries": [3.0, 0.0, 0.0],
    }
    assert values(judged([group.with_columns(columns)])) == {
        "reward/helpful/mean": 10.0,
        "reward/helpful_doubt/mean": 0.25,
        "reward/long/mean": pytest.approx(5 / 3),
        "faults/judge_retries": 3.0,
    }


def test_none_of_one_part_is_none_of_the_whole_unless_it_counts_something(group: Group) -> None:
    """An answer without one of its rewards has none; `if_none` is after normalisation; 0.0 is not missing."""
    one, two = Says({REWARD: [0.0, None, 2.0]}), Says({REWARD: [1.0, 1.0, None]})
    strict = [Part("a", 1.0, None, one), Part("b", 1.0, None, two)]
    assert WeightedJudge(strict, {}).judge(group).scores[REWARD] == [1.0, None, None]
    lenient = [Part("a", 3.0, -1.0, one), Part("b", 1.0, None, two)]
    columns = WeightedJudge(lenient, {"a": Scale(100.0, 50.0, 9)}).judge(group)
    assert columns.scores[REWARD] == [-5.0, -2.0, None] and columns.scores["reward/a"] == [0.0, None, 2.0]
    silent = Says({REWARD: [None] * 3})
    assert WeightedJudge([Part("a", 1.0, 0.5, silent), Part("b", 1.0, None, two)], {}).judge(group).scores[REWARD] == [
        1.5,
        1.5,
        None,
    ]
    with pytest.raises(NothingScored):
        WeightedJudge([Part("a", 1.0, None, silent), Part("b", 1.0, 0.0, two)], {}).judge(group)
    never = [
        Part("a", 1.0, None, Says({REWARD: [1.0, None, None]})),
        Part("b", 1.0, None, Says({REWARD: [None, 1, 1]})),
    ]
    with pytest.raises(NothingScored, match="each answer lacks one of its rewards"):
        WeightedJudge(never, {}).judge(group)


def test_a_part_that_fails_fails_the_group(group: Group) -> None:
    class Broken(Says):
        def judge(self, group: Group) -> Columns:
            raise JudgeFailed("the server is down")

    parts = [Part("a", 1.0, 0.0, Says({REWARD: [1.0] * 3})), Part("b", 1.0, 0.0, Broken({}))]
    with pytest.raises(JudgeFailed, match="the server is down"):
        WeightedJudge(parts, {}).judge(group)


def test_scales_by_hand_and_references_that_tell_none() -> None:
    """Trap 88's numbers: 10, 20, 30 become -1.2247, 0, 1.2247 under their own mean and deviation."""
    scale = fit([10.0, 20.0, 30.0], "reward", unit=True)
    assert scale == Scale(20.0, pytest.approx(math.sqrt(200 / 3)), 3)
    assert (10.0 - scale.mean) / scale.std == pytest.approx(-1.22474, abs=1e-5)
    assert fit([10.0, 30.0], "reward", unit=False) == Scale(20.0, 1.0, 2)
    assert fit([0.1] * 3, "reward", unit=False).mean == pytest.approx(0.1)
    with pytest.raises(BadInput, match=r"all 3 answers of reward.reference have the reward 0.1"):
        fit([0.1] * 3, "reward", unit=True)
    with pytest.raises(BadInput, match=r"1 answers of reward.reference could be scored"):
        fit([1.0], "reward", unit=True)


FUNCTION = {"function": "a:b"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"parts": {}}, "parts is empty"),
        ({"parts": {"a": FUNCTION}, "function": "a:b"}, "function beside parts"),
        ({"parts": {"a": FUNCTION}, "timeout_s": 1.0}, "timeout_s beside parts"),
        ({"parts": {"a": {}}}, "none is set"),
        ({"parts": {"a": {**FUNCTION, "dtype": "bfloat16"}}}, "dtype would do nothing"),
        ({"parts": {"A b": FUNCTION}}, "String should match"),
        ({**FUNCTION, "normalise": "mean"}, "there is no reference to fit it on"),
        ({**FUNCTION, "reference": {"path": "x"}}, "reference would do nothing"),
        ({"parts": {"a": FUNCTION}, "backoff_s": 3.0}, "backoff_s would do nothing"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RewardConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ({"function": "a:b", "timeout_s": 10.0}, 30.0),  # three calls
        ({"function": "a:b", "timeout_s": 10.0, "retries": 0}, 10.0),
        ({"model": "m"}, 0.0),
        ({"server": "http://host/", "timeout_s": 10.0}, 33.0),  # and pauses of 1 and 2 s
        ({"server": "http://host/", "timeout_s": 10.0, "retries": 3, "backoff_s": 16.0}, 40.0 + 16 + 30 + 30),
        ({"llm": {"address": "http://host/", "model": "m", "style": "pairwise"}, "timeout_s": 10.0}, 93.0),  # 12 / 4
        ({"parts": {"a": {"function": "a:b", "timeout_s": 1.0}, "b": {"function": "a:b", "timeout_s": 2.0}}}, 9.0),
    ],
)
def test_a_host_may_be_silent_for_as_long_as_its_calls_may_take(
    tiny_run: Callable[..., RunConfig], reward: dict[str, Any], expected: float
) -> None:
    """Groups of four. Hosts of judges on Ray that show nothing for longer are taken for hung."""
    assert (
        longest_call_s(RunConfig.model_validate(tiny_run({}, {}, {}, {}).model_dump() | {"reward": reward})) == expected
    )


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., int]:
    """A run of RLOO on the tiny model in this process, with two rewards, one of them normalised."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(20)))
    answers = [{"prompt": "say a", "completion": "b" * n} for n in (3, 4, 8)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    content = {
        "model": {"name": "tiny"},
        "algorithm": {"name": "rloo", "samples_per_prompt": 2, "kl": {"coef": 0.0}},
        "data": {"path": "prompts.jsonl", "heldout": 1},
        "loop": {"num_steps": 1, "groups_per_step": 2},
        "generation": {"engine": "transformers", "max_new_tokens": 4},
        "learner": {"engine": "torch"},
        "reward": {
            "reference": {"path": "answers.jsonl"},
            "parts": {
                "length": {
                    "function": "rewards.py:length", "isolate": False, "weight": 2.0, "normalise": "mean_std",
                },
                "vowels": {"function": "rewards.py:vowels", "isolate": False, "weight": -0.5},
            },
        },
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))

    def call(*arguments: str) -> int:
        return main(["run", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run"), "--in-process", *arguments])

    return call


def test_a_run_adds_up_its_rewards_and_goes_on_with_the_scales_it_began_with(
    run_of: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mean 5, deviation sqrt(14/3) of the reference answers; other references later change nothing, and a directory
    without its numbers is not gone on with under others."""
    assert run_of() == 0
    deviation = statistics.pstdev([3, 4, 8])
    file = tmp_path / "run" / SCALES_FILE
    assert json.loads(file.read_text()) == {"length": {"mean": 5.0, "std": pytest.approx(deviation), "n": 3}}
    assert "reward.parts.length: 5 ± 2.16 on 3 reference answers" in capsys.readouterr().out
    (tmp_path / "answers.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n" * 2)
    assert run_of("loop.num_steps=2") == 0
    for row in read_jsonl(tmp_path / "run" / "metrics.jsonl"):
        expected = 2 * (row["reward/length/mean"] - 5) / deviation - 0.5 * row["reward/vowels/mean"]
        assert row["reward/mean"] == pytest.approx(expected)
    file.unlink()
    (tmp_path / "answers.jsonl").write_text(
        "".join(json.dumps({"prompt": "a", "completion": "b" * n}) + "\n" for n in (1, 2))
    )
    assert run_of("loop.num_steps=3") == 2
    assert "this run was started with reward scales" in capsys.readouterr().err


def test_missing_reference_answers_are_bad_input(
    run_of: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_of("reward.reference.path=none.jsonl") == 2
    assert "reward.reference: data.path=none.jsonl: no such file" in capsys.readouterr().err
    assert run_of("reward.parts.length.wieght=1") == 2
    assert "unknown key reward.parts.length.wieght; did you mean reward.parts.NAME.weight?" in capsys.readouterr().err
    assert run_of("reward.parts.vowels.function=rewards.py:consonants") == 2
    assert "reward.parts.vowels.function" in capsys.readouterr().err
