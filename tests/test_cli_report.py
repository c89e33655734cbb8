"""Observers, the summary of held-out answers, charts and the report.

Not covered: how the page looks, and the bar of a terminal beyond that it survives every event.
"""

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rlhf.cli.progress import RichProgress
from rlhf.config import RunConfig
from rlhf.errors import RunFailed
from rlhf.evaluation.heldout import Answer, HeldoutReport, from_json, report, rise_in_deviations
from rlhf.experience import Group, Prompt, Sample
from rlhf.observers import JsonlMetrics, PlainLines, TensorBoard, duration, read_jsonl
from rlhf.ui.charts import Series, line_chart, nice_ticks
from rlhf.ui.report import page, write_report

CONFIG = RunConfig.model_validate(
    {
        "model": {"name": "[tiny]"},
        "algorithm": {"name": "rloo"},
        "data": {"path": "x"},
        "loop": {"num_steps": 4, "groups_per_step": 1},
        "generation": {"max_new_tokens": 4},
        "reward": {"function": "a:b"},
    }
)
HOSTILE = "<script>alert('x')</script> & [bold]"


def evaluation(step: int, mean: float, std: float) -> HeldoutReport:
    samples = (Answer(HOSTILE, HOSTILE, 0.5, "length"), Answer("second", "fine", None, "stop"))
    return HeldoutReport(step, mean, std, 2, 1, 3.5, 0.5, samples)


def group(number: int, rewards: list[float | None], length: int) -> Group:
    ids = np.arange(length, dtype=np.int32)
    samples = tuple(
        Sample(
            index=i,
            token_ids=ids,
            loss_mask=np.ones(length, dtype=np.bool_),
            text=f"answer {number}",
            finish_reason="length" if length == 4 else "stop",
            behavior_logprobs=None,
            versions=None,
            sampling=None,
            seed=None,
            scores={"reward": reward},
            tokens={},
        )
        for i, reward in enumerate(rewards)
    )
    prompt = Prompt(-1 - number, number, 0, f"question {number}", "text", np.array([1], dtype=np.int32), {})
    return Group(prompt, samples, "policy")


def test_heldout_report_by_hand() -> None:
    """Rewards 1, None, 4, 1: mean 2, variance 2. The unscored answer counts for lengths and not for rewards."""
    found = report(7, [group(0, [1.0], 2), group(1, [None], 4), group(2, [4.0], 4), group(3, [1.0], 2)], shown=2)
    assert (found.reward_mean, found.n, found.unscored) == (2.0, 3, 1)
    assert found.reward_std == pytest.approx(math.sqrt(2))
    assert (found.length_mean, found.unfinished_fraction) == (3.0, 0.5)
    assert [answer.prompt for answer in found.samples] == ["question 0", "question 1"]
    assert from_json(json.loads(json.dumps(found.to_json()))) == found
    with pytest.raises(RunFailed, match="none of 1 held-out answers"):
        report(0, [group(0, [None], 2)], shown=1)


def test_rise_is_counted_in_deviations_before() -> None:
    assert rise_in_deviations(evaluation(0, 1.0, 0.5), evaluation(9, 2.0, 9.0)) == 2.0
    assert rise_in_deviations(evaluation(0, 1.0, 0.0), evaluation(9, 1.0, 0.0)) == 0.0
    assert rise_in_deviations(evaluation(0, 1.0, 0.0), evaluation(9, 0.5, 0.0)) == -math.inf


def test_metrics_file_forgets_the_steps_that_are_replayed(tmp_path: Path) -> None:
    """A torn last line goes too; a step never stands twice."""
    observer = JsonlMetrics(tmp_path, print)
    observer.started(CONFIG, 0, 4)
    for step in range(3):
        observer.step(step, {"reward/mean": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    observer = JsonlMetrics(tmp_path, print)
    observer.started(CONFIG, 2, 4)
    observer.step(2, {"reward/mean": 9.0})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(0, 0.0), (1, 1.0), (2, 9.0)]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a JSON object"):
        read_jsonl(path)


def test_tensorboard_holds_every_metric(tmp_path: Path) -> None:
    """Read back with TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    observer = TensorBoard(tmp_path)
    observer.finished("failed", "before it started")
    observer = TensorBoard(tmp_path)
    observer.started(CONFIG, 0, 2)
    observer.step(0, {"step": 0, "reward/mean": 1.5, "lr": 0.1})
    observer.step(1, {"step": 1, "reward/mean": 2.5, "lr": 0.1})
    observer.evaluated(2, evaluation(2, 0.25, 1.0))
    observer.finished("done", "")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(0, 1.5), (1, 2.5)]
    assert set(events.Tags()["scalars"]) == {"reward/mean", "lr", "heldout/reward_mean"}


@pytest.mark.parametrize("terminal", [True, False])
def test_consoles_survive_every_event(terminal: bool) -> None:
    """Names with markup characters are shown as they are."""
    stream = io.StringIO()
    console = RichProgress(Console(file=stream, force_terminal=True, width=200)) if terminal else PlainLines(stream)
    console.note("before the start [x]")
    console.started(CONFIG, 1, 4)
    console.step(1, {"step": 1, "reward/mean": 0.1234567, "kl/k1": 0.5})
    console.evaluated(2, evaluation(2, 0.25, 1.0))
    console.step(2, {})
    console.finished("done", "report in [here]")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    for expected in ("[tiny]", "step 1", "reward 0.1235  KL 0.5", "held-out after 2 steps: reward 0.25 ± 1", "[here]"):
        assert expected in text


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.4, 60, 185, 7620)] == ["0s", "59s", "1m00s", "3m05s", "2h07m"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7.9), (5, 5), (0, 0), (1e-9, 3e-9), (-1e6, 1e7), (0.1, 0.3)])
def test_ticks_enclose_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8 and ticks == sorted(set(ticks))
    slack = 1e-6 * (ticks[-1] - ticks[0])
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack


def test_points_stay_inside_the_chart_and_gaps_stay_gaps() -> None:
    svg = line_chart("t", [Series("a", [(0, -5.0), (1, 3.0), (2, math.nan), (3, 100.0), (4, 7.0)], "a")])
    lines = re.findall(r'points="([^"]+)"', svg)
    assert [len(line.split()) for line in lines] == [2, 2]
    for x, y in (map(float, point.split(",")) for line in lines for point in line.split()):
        assert 0 <= x <= 460 and 0 <= y <= 190
    assert line_chart("t", [Series("a", [(0, math.nan)], "a")]) == ""


class Structure(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that are closed out of order."""

    VOID = frozenset({"meta", "line", "circle", "polyline"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_is_whole_escaped_and_needs_no_network() -> None:
    metrics = [{"step": n, "reward/mean": n / 10, "kl/k1": 0.1 * n, "faults/unscorable": 1.0} for n in range(5)]
    text = page(
        HOSTILE, metrics, [evaluation(0, 0.5, 0.25), evaluation(5, 1.0, 0.2)], f"seed: 0 # {HOSTILE}", {HOSTILE: 3}
    )
    found = Structure(text)
    assert "script" not in found.tags and found.links == [] and "url(" not in text and "@import" not in text
    assert found.text.count(HOSTILE) == 7  # title, heading, prompt, both answers, reason, run file
    assert "+2.00 σ" in found.text and "0.5 → 1" in found.text
    assert "cut at the length limit" in found.text and "could not be scored" in found.text
    assert re.search(r"faults/unscorable\s*5", found.text)
    assert found.tags.count("svg") == 3


def test_the_report_sums_whatever_was_dropped() -> None:
    """Groups and pairs that taught nothing are told, each under its reason; what never happened is not."""
    names = ["groups/dropped", "groups/equal_dropped", "pairs/ties", "pairs/identical", "pairs/empty"]
    names += ["faults/judge_dropped"]
    rows = [{"step": n, **{name: float(place) for place, name in enumerate(names)}} for n in range(3)]
    text = Structure(page("a run", rows, [], "", {})).text
    for place, name in enumerate(names):
        assert (re.search(rf"{name}{3 * place}(?!\d)", text) is not None) == (place > 0), name


def test_report_of_a_run_that_has_not_begun(tmp_path: Path) -> None:
    assert "no step is trained yet" in Structure(write_report(tmp_path).read_text()).text
