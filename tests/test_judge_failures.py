"""Judges that fail: calls are repeated, groups are dropped with a reason and replaced, or the run ends; never a reward
of 0. The scheduler and the ledger are the real ones. Not covered here: Ray, real servers (tests of the reward server).
"""

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rlhf.admission import Demand
from rlhf.buffer.audit import ExperienceView
from rlhf.buffer.store import ExperienceBuffer
from rlhf.cli.main import main
from rlhf.config import LoopConfig
from rlhf.errors import JudgeFailed, NothingScored
from rlhf.experience import REWARD, Columns, Group, Prompt, Sampling
from rlhf.judges import patience
from rlhf.judges.failures import JudgeFailures
from rlhf.judges.patience import PatientJudge
from rlhf.learner.judged import judged
from rlhf.loop import Team, train
from rlhf.metrics import Metrics, values
from rlhf.observers import read_jsonl
from rlhf.sources import JudgeDesk, PolicySource
from rlhf.testing import CountingLearner, LengthJudge, MadeUpGenerator
from rlhf.workers import LocalWorkers, answers, judgement

SAMPLING = Sampling(1.0, 1.0, 0, 6)


class Supply:
    def prompt(self, prompt_id: int) -> Prompt:
        return Prompt(prompt_id, prompt_id, 0, "p", "p", np.array([1, 2], dtype=np.int32), {})


class Told:
    """Keeps the metrics of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def step_at(self, step: int, phase: str) -> None: ...

    def step_done(self, step: int, measured: Metrics) -> None:
        self.steps.append(values(measured))

    def evaluate_if_due(self, updates: int) -> None: ...

    def checkpoint_if_due(self, updates: int) -> None: ...


class FailsOn(LengthJudge):
    """Fails at the prompts that `fails` says."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        self._fails = fails
        self.asked: list[int] = []

    def judge(self, group: Group) -> Columns:
        self.asked.append(group.prompt.id)
        if self._fails(group.prompt.id):
            raise JudgeFailed(f"KeyError on sample 1 of prompt {group.prompt.id}", "KeyError")
        return super().judge(group)


class Bench:
    """A team on a ledger in a folder; built again on the same folder it is the run after a restart."""

    def __init__(self, folder: Path, judge: object, *, steps: int, groups: int, staleness: int) -> None:
        wanted = Demand(groups, steps, staleness, 2, SAMPLING, 5.0)
        self.buffer = ExperienceBuffer(folder / "experience.db", frozenset({REWARD}), None, 3)
        self.buffer.open()
        self.generator, self.learner, self.notes, self.told = MadeUpGenerator(7), CountingLearner(), list[str](), Told()
        rollouts = LocalWorkers("rollout-0", partial(answers, self.generator), self.generator.load)
        failures = JudgeFailures(5, 0.25, self.notes.append)
        workers = LocalWorkers("reward", partial(judgement, judge), None)
        desk = JudgeDesk("reward", frozenset({REWARD}), True, workers, failures)
        self.source = PolicySource(wanted, Supply(), self.buffer, rollouts, [desk], lambda: False)
        self.loop = LoopConfig(num_steps=steps, groups_per_step=groups, max_staleness=staleness)

    def train(self) -> None:
        train(Team(self.source, self.learner, self.buffer), self.loop, self.told, lambda: False)


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_group_that_cannot_be_judged_is_dropped_with_its_reason_and_replaced(tmp_path: Path, staleness: int) -> None:
    """Every seventh prompt fails: steps stay whole, nothing that failed is trained, each is dropped once."""
    judge = FailsOn(lambda prompt_id: prompt_id % 7 == 3)
    bench = Bench(tmp_path, judge, steps=6, groups=4, staleness=staleness)
    bench.train()
    trained = [prompt for step in bench.learner.trained for prompt in step]
    assert [len(step) for step in bench.learner.trained] == [4] * 6
    assert len(set(trained)) == 24 and not any(prompt % 7 == 3 for prompt in trained)
    counts = bench.buffer.counts()
    failed = sum(prompt % 7 == 3 for prompt in range(counts.issued))
    assert (counts.trained, counts.dropped, counts.lost, counts.leased) == (24, failed, 0, 0) and failed > 2
    told = sum(step["faults/judge_dropped"] for step in bench.told.steps)
    overview = ExperienceView(tmp_path / "experience.db").overview()
    assert overview.drop_reasons == {"KeyError": failed} and len(bench.notes) == failed == told


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_judge_that_always_fails_ends_the_run_at_once_and_drops_nothing(tmp_path: Path, staleness: int) -> None:
    """Three groups are enough; with the judge mended the same groups are judged, none is generated again."""
    broken = Bench(tmp_path, FailsOn(lambda _: True), steps=2, groups=4, staleness=staleness)
    with pytest.raises(JudgeFailed, match=r"3 groups in a row .* before any was judged[\s\S]*KeyError on sample 1 of"):
        broken.train()
    generated = len(broken.generator.answered)
    assert broken.buffer.counts().dropped == 0
    broken.buffer.close()

    mended = Bench(tmp_path, LengthJudge(), steps=2, groups=4, staleness=staleness)
    mended.source.resume()
    mended.train()
    assert sorted(prompt for step in mended.learner.trained for prompt in step) == list(range(8))
    assert len(mended.generator.answered) == 8 - generated and mended.buffer.counts().dropped == 0


def test_a_step_of_one_group_is_refilled_while_the_failed_one_is_held(tmp_path: Path) -> None:
    """Held groups are not work in flight: otherwise the step would wait for ever for a place."""
    bench = Bench(tmp_path, FailsOn(lambda prompt_id: prompt_id in (0, 4, 5)), steps=9, groups=1, staleness=0)
    bench.train()
    assert bench.learner.trained == [[1], [2], [3], [6], [7], [8], [9], [10], [11]]
    assert [step["faults/judge_dropped"] for step in bench.told.steps] == [1, 0, 0, 2, 0, 0, 0, 0, 0]


def test_failures_in_a_row_end_the_run(tmp_path: Path) -> None:
    bench = Bench(tmp_path, FailsOn(lambda prompt_id: prompt_id >= 6), steps=9, groups=2, staleness=0)
    with pytest.raises(JudgeFailed, match=r"^5 groups in a row could not be judged \(reward.max_failed_in_a_row\)"):
        bench.train()
    assert bench.learner.version == 3


def test_too_large_a_share_ends_the_run(tmp_path: Path) -> None:
    """Every third fails: more than a quarter, though never five in a row."""
    judge = FailsOn(lambda prompt_id: prompt_id % 3 == 2)
    bench = Bench(tmp_path, judge, steps=50, groups=4, staleness=0)
    with pytest.raises(JudgeFailed, match=r"of the last 2\d groups could not be judged, reward.max_dropped_fraction"):
        bench.train()


def test_groups_without_a_score_are_not_taken_for_a_broken_judge_too_soon() -> None:
    """Three of them before the first score are no end; five in a row are."""
    failures = JudgeFailures(5, 0.25, print)
    for prompt in range(4):
        failures.failed(prompt, NothingScored("none", again=False))
    with pytest.raises(JudgeFailed, match="5 groups in a row"):
        failures.failed(4, NothingScored("none", again=False))


def test_an_evaluation_answer_that_cannot_be_judged_has_no_score(tmp_path: Path) -> None:
    """Not 0, and the others have theirs; an evaluation in which every call fails ends the run."""
    bench = Bench(tmp_path, FailsOn(lambda prompt_id: prompt_id == -2), steps=1, groups=1, staleness=0)
    groups = bench.source.answer([Supply().prompt(-1 - number) for number in range(3)], SAMPLING)
    scores = [group.samples[0].scores[REWARD] for group in groups]
    assert scores[1] is None and scores[0] is not None and scores[2] is not None
    broken = Bench(tmp_path, FailsOn(lambda _: True), steps=1, groups=1, staleness=0)
    with pytest.raises(JudgeFailed, match="3 groups in a row"):
        broken.source.answer([Supply().prompt(-1 - number) for number in range(4)], SAMPLING)


class Sometimes(LengthJudge):
    """Fails at the first `failures` calls with this error."""

    def __init__(self, failures: int, error: JudgeFailed) -> None:
        self.calls, self._failures, self._error = 0, failures, error

    def judge(self, group: Group) -> Columns:
        self.calls += 1
        if self.calls <= self._failures:
            raise self._error
        return super().judge(group)


def test_a_call_is_made_again_with_growing_pauses_and_counted(
    make_group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", pauses.append)
    group = make_group(1, [None, None], [2, 1], {}, {})
    judge = PatientJudge(Sometimes(2, JudgeFailed("busy")), retries=2, backoff_s=20.0)
    columns = judge.judge(group)
    assert columns.scores[REWARD] == [2.0, 1.0] and pauses == [20.0, 30.0]
    assert values(judged([group.with_columns(columns)])) == {"faults/judge_retries": 2}
    assert judge.judge(group).names == {REWARD}
    inner = Sometimes(3, JudgeFailed("busy"))
    with pytest.raises(JudgeFailed, match="busy"):
        PatientJudge(inner, retries=2, backoff_s=0.0).judge(group)
    assert inner.calls == 3
    hopeless = Sometimes(3, JudgeFailed("rename a column", again=False))
    with pytest.raises(JudgeFailed, match="rename"):
        PatientJudge(hopeless, retries=2, backoff_s=0.0).judge(group)
    assert hopeless.calls == 1


def test_an_error_survives_the_way_from_an_actor() -> None:
    error = pickle.loads(pickle.dumps(NothingScored("first line\nsecond", "why", again=False)))
    assert (str(error), error.reason, error.again, type(error)) == (
        "first line\nsecond",
        "why",
        False,
        NothingScored,
    )
    assert JudgeFailed("first line\nsecond").reason == "first line"


REWARDS = """
import time

def some(prompts, completions):
    if prompts[0] == "say 7":
        raise KeyError("seven")
    if prompts[0] == "say 5":
        time.sleep(60)
    if prompts[0] == "say 3":
        return [None] * len(completions)
    return [float(len(c)) for c in completions]

def misspelt(prompts, completions):
    return [lenght(c) for c in completions]

def nan(prompts, completions):
    return [float("nan")] * len(completions)
"""


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., int]:
    """A run of RLOO on the tiny model in this process, with one of the functions above."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(20)))

    def call(function: str, **reward: Any) -> int:
        content = {
            "model": {"name": "tiny"},
            "algorithm": {"name": "rloo", "samples_per_prompt": 2, "kl": {"coef": 0.0}},
            "data": {"path": str(tmp_path / "prompts.jsonl"), "shuffle": False},
            "loop": {"num_steps": 3, "groups_per_step": 4},
            "generation": {"engine": "transformers", "max_new_tokens": 4},
            "learner": {"engine": "torch"},
            "reward": {"function": f"{tmp_path / 'rewards.py'}:{function}", **reward},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        return main(["run", str(tmp_path / "run.yaml"), "--in-process", "--run-dir", str(tmp_path / "run")])

    return call


def test_a_run_goes_on_when_single_groups_raise_hang_or_have_no_score(
    tmp_path: Path, run_of: Callable[..., int]
) -> None:
    """All three are dropped with their reasons, and the report counts them."""
    assert run_of("some", timeout_s=0.5, retries=1, max_dropped_fraction=1.0) == 0
    reasons = ExperienceView(tmp_path / "run" / "experience.db").overview().drop_reasons
    text = "\n".join(reasons)
    assert len(reasons) == 3 and "raised: KeyError: 'seven'" in text and "nothing scored: reward function" in text
    assert "did not answer within 0.5 s" in text
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert sum(row["faults/judge_dropped"] for row in rows) == 3
    assert "<td>faults/judge_dropped</td><td>3</td>" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("function", "said"), [("misspelt", "NameError: name 'lenght'"), ("nan", "value for sample 0 is nan")]
)
def test_a_run_with_a_broken_function_ends_with_its_error(
    run_of: Callable[..., int], capsys: pytest.CaptureFixture[str], function: str, said: str
) -> None:
    assert run_of(function) == 4
    shown = capsys.readouterr().err
    assert said in shown and "3 groups in a row could not be judged before any was judged" in shown
