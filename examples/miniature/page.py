"""What the pages of the comparisons share: intervals over seeds, the table, the paper's claims one by one, the charts.

An interval is Student's t, 95 %, two-sided, over seeds. A claim "A above B" is judged by the differences A - B of the
same seed: it `agrees` when their interval lies above 0, is `the opposite` when it lies below, and otherwise is `not
decided`.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import chart, world

# Two-sided 95 % points of Student's t by degrees of freedom.
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
COLUMNS = (
    ("true", "true reward"),
    ("learned", "learned reward"),
    ("kl", "KL, nats"),
    ("true_win_rate", "win rate, true"),
    ("learned_win_rate", "win rate, learned"),
    ("words", "words"),
)


@dataclass(frozen=True, slots=True)
class Claim:
    """The paper says that one method is above another."""

    text: str
    above: str
    below: str


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half the length of its t interval."""
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), T_975[len(values) - 1] * spread


def results_table(found: Mapping[str, Any]) -> str:
    """A row a method, and one for the start."""
    rates = found["learning_rates"]
    lines = [
        "| method | learning rate | " + " | ".join(title for _, title in COLUMNS) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    worlds = list(found["worlds"].values())
    start = [_shown([world[key] for world in worlds]) if key in ("true", "learned") else "" for key, _ in COLUMNS]
    lines.append("| the start (SFT) | | " + " | ".join(start) + " |")
    for method, runs in found["runs"].items():
        cells = [_shown([run[key] for run in runs.values()]) for key, _ in COLUMNS]
        lines.append(f"| {method} | {rates[method]:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def claims_table(found: Mapping[str, Any], claims: Sequence[Claim]) -> str:
    """A row a claim: differences of true win rate and of both rewards, and the verdict by the true reward."""
    lines = [
        "| the paper | true reward | win rate, true | learned reward | here, by the true reward |",
        "|---|---|---|---|---|",
    ]
    for claim in claims:
        gaps = {key: _gaps(found, claim, key) for key in ("true", "true_win_rate", "learned")}
        cells = [_shown(gaps[key], sign=True) for key in ("true", "true_win_rate", "learned")]
        lines.append(f"| {claim.text} | {' | '.join(cells)} | {verdict(gaps['true'])} |")
    return "\n".join(lines)


def verdict(gaps: Sequence[float]) -> str:
    """What the differences of the seeds say."""
    mean, half = interval(gaps)
    return "agrees" if mean - half > 0 else "the opposite" if mean + half < 0 else "not decided"


def objectives_table(found: Mapping[str, Any]) -> str:
    """How each learning rate did on the seeds for selection."""
    rates = list(next(iter(found["objectives"].values())))
    lines = ["| method | " + " | ".join(rates) + " |", "|---|" + "---|" * len(rates)]
    for method, tried in found["objectives"].items():
        best = f"{found['learning_rates'][method]:g}"
        cells = [f"**{tried[rate]:.2f}**" if rate == best else f"{tried[rate]:.2f}" for rate in rates]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def worlds_line(found: Mapping[str, Any]) -> str:
    """How good the reward models are."""
    worlds = list(found["worlds"].values())

    def shown(key: str) -> str:
        mean, half = interval([100 * world[key] for world in worlds])
        return f"{mean:.0f} ± {half:.0f} %"

    return (
        f"Of the training labels {shown('labels_right')} agree with the true reward. On held-out prompts the reward "
        f"models order {shown('accuracy_true')} of pairs of the start's answers as the true reward does, and "
        f"{shown('accuracy_labels')} as noisy readers do."
    )


def vocabulary() -> int:
    """How many words the language has."""
    groups = (world.ASKED, world.FILLERS, world.TOPICS, world.MOODS, world.LENGTHS)
    return sum(map(len, groups)) + sum(map(len, [*world.TOPICS.values(), *world.MOODS.values()]))


def reading(found: Mapping[str, Any], claims: Sequence[Claim]) -> str:
    """What agrees by the true reward, what does not, and where the learned reward says something else."""
    by_true = {claim.text: verdict(_gaps(found, claim, "true")) for claim in claims}
    by_learned = {claim.text: verdict(_gaps(found, claim, "learned")) for claim in claims}
    lines = []
    for said, title in (
        ("agrees", "Agrees with the paper"),
        ("the opposite", "The opposite is seen"),
        ("not decided", "Not decided by these seeds"),
    ):
        those = [text for text, what in by_true.items() if what == said]
        lines.append(f"- **{title}** ({len(those)} of {len(by_true)}): {'; '.join(those) or 'none'}.")
    other = [f"{text} ({by_learned[text]})" for text in by_true if by_learned[text] != by_true[text]]
    lines.append(f"- **By the learned reward it is otherwise** for: {'; '.join(other) or 'none'}.")
    over = [name for name, runs in found["runs"].items() if _over_optimised(found, runs)]
    lines.append(
        "- **Over-optimisation** (the learned reward above the start's and the true one below it, both intervals clear "
        "of 0): "
        f"{'; '.join(over) or 'of no method at its end'}."
    )
    return "\n".join(lines)


def _over_optimised(found: Mapping[str, Any], runs: Mapping[str, Mapping[str, float]]) -> bool:
    gains = {key: [run[key] - found["worlds"][seed][key] for seed, run in runs.items()] for key in ("true", "learned")}
    return verdict(gains["learned"]) == "agrees" and verdict(gains["true"]) == "the opposite"


def points_chart(found: Mapping[str, Any], extra: Sequence[chart.Panel] = ()) -> str:
    """True and learned reward over KL, a point a method with its interval, and more panels behind them."""
    panels = [
        chart.Panel(
            title, "KL to the start, nats an answer", "reward", [_mark(found, method, key) for method in found["runs"]]
        )
        for key, title in (("true", "true reward, held-out prompts"), ("learned", "learned reward, held-out prompts"))
    ]
    return chart.figure([*panels, *extra])


def training_panel(found: Mapping[str, Any], method: str) -> chart.Panel:
    """True and learned reward of the samples of each step, the mean over seeds, less that of the first step."""
    curves = [run["curve"] for run in found["runs"][method].values()]
    marks = []
    for key in ("true", "learned"):
        means = [statistics.fmean(curve[step][key] for curve in curves) for step in range(len(curves[0]))]
        marks.append(
            chart.Mark(f"{key}, gain since step 1", [(n + 1, mean - means[0], 0.0) for n, mean in enumerate(means)])
        )
    return chart.Panel(f"{method}: samples of each step", "step", "gain in reward", marks)


def save(to: Path, name: str, text: str, picture: str) -> None:
    """docs/results/NAME.md and NAME.svg."""
    (to / f"{name}.svg").write_text(picture)
    (to / f"{name}.md").write_text(text)


def _mark(found: Mapping[str, Any], method: str, key: str) -> chart.Mark:
    runs = list(found["runs"][method].values())
    mean, half = interval([run[key] for run in runs])
    return chart.Mark(method, [(statistics.fmean(run["kl"] for run in runs), mean, half)])


def _gaps(found: Mapping[str, Any], claim: Claim, key: str) -> list[float]:
    above, below = found["runs"][claim.above], found["runs"][claim.below]
    return [above[seed][key] - below[seed][key] for seed in above]


def _shown(values: Sequence[float], *, sign: bool = False) -> str:
    mean, half = interval(values)
    return f"{mean:+.2f} ± {half:.2f}" if sign else f"{mean:.2f} ± {half:.2f}"
