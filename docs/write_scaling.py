"""Simulates a pool of 1 to 1,024 rollout engines and writes docs/scaling.md and docs/scaling.svg: `make simulate`.

Everything but engines, judges and the learner's time is the code of a real run: rlhf/simulation/pool.py.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from rlhf.simulation.engines import EngineCost
from rlhf.simulation.pool import Simulation, StepCost, Workload, longest_bound, simulate_lengths

FOLDER = Path(__file__).resolve().parent
ENGINES = (1, 2, 4, 16, 64, 256, 1024)
STALENESS = (0, 1, 2, 4)
# The first steps fill the pool, and nothing is sampled any more for the last; between them whole rounds of k + 1 steps.
FIRST, COUNTED, LAST = 8, 30, 4

# What memory bandwidth allows a 7B model in bfloat16 on an H100: 15.2 GB of weights a decoding step, and 56 KiB of
# cache a token of context, at 3.35 TB/s and 1,000 tokens of context; prompts at half of the peak of its arithmetic.
COST = EngineCost(
    step_s=15.2e9 / 3.35e12,
    sequence_s=1000 * 56 * 1024 / 3.35e12,
    prompt_token_s=2 * 7e9 / 5e14,
    max_sequences=256,
    continuous=True,
    load_s=2.0,
)
REST = StepCost(update_s=15.0, publish_s=1.0, judge_group_s=0.0, annotate_s=0.0, store_s=0.0)
WORK = Workload(
    groups_per_step=1024,
    samples_per_prompt=8,
    prompt_tokens=512,
    median_tokens=600.0,
    log_sigma=0.9,
    max_new_tokens=8192,
    seed=0,
)

COLOURS = {0: "#2f6fde", 1: "#2a9d74", 2: "#d9822b", 4: "#b5432f"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 64, 150, 20, 46


class Point(NamedTuple):
    """A simulated run of so many engines at this max_staleness."""

    engines: int
    staleness: int
    found: Simulation

    @property
    def bound_s(self) -> float:
        return longest_bound(self.found.mean_longest_s, REST.update_s, self.staleness)


def simulate_all(*, learner_waits: bool) -> dict[tuple[int, int], Point]:
    """Every number of engines at every staleness, without the first and last steps."""
    found = {}
    lengths = lru_cache(maxsize=None)(WORK.lengths)
    for engines in ENGINES:
        for staleness in STALENESS:
            num_steps = FIRST + COUNTED + LAST
            run = simulate_lengths(
                engines, staleness, num_steps, WORK, lengths, COST, REST, learner_waits=learner_waits
            ).settled(FIRST, LAST)
            found[engines, staleness] = Point(engines, staleness, run)
            waits = "waits" if learner_waits else "goes on"
            print(f"{engines} engines, k = {staleness}, the learner {waits}: {run.mean_step_s:.1f} s a step")
    return found


def table(points: Mapping[tuple[int, int], Point]) -> str:
    """Seconds a step, the share of the engines' time in which they sampled, and groups that were too old, a step."""
    heads = "".join(f" k = {k} | busy | swept |" for k in STALENESS)
    lines = [f"| engines |{heads}", "|---:|" + "---:|---:|---:|" * len(STALENESS)]
    for engines in ENGINES:
        cells = [points[engines, k].found for k in STALENESS]
        row = "".join(
            f" {run.mean_step_s:.1f} | {run.busy_fraction:.0%} | {run.discarded / (FIRST + COUNTED + LAST):.1f} |"
            for run in cells
        )
        lines.append(f"| {engines:,} |{row}")
    bounds = "".join(f" **{points[ENGINES[-1], k].bound_s:.1f}** | | |" for k in STALENESS)
    lines.append(f"| bound |{bounds}")
    return "\n".join(lines)


def chart(points: Mapping[tuple[int, int], Point], without_waiting: Mapping[tuple[int, int], Point]) -> str:
    """Step time over engines, both logarithmic; thin, without the wait; dashed, the bound of the longest sequence."""
    both = [*points.values(), *without_waiting.values()]
    seconds = [point.found.mean_step_s for point in both] + [point.bound_s for point in both]
    low, high = math.floor(math.log2(min(seconds))), math.ceil(math.log2(max(seconds)))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(engines: float) -> float:
        return LEFT + math.log2(engines) / math.log2(ENGINES[-1]) * (right - LEFT)

    def down(value: float) -> float:
        return bottom - (math.log2(value) - low) / (high - low) * (bottom - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    ]
    for power in range(low, high + 1):
        y = down(2.0**power)
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#555555">{2.0**power:g}</text>')
    for engines in ENGINES:
        x = across(engines)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#555555">{engines}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">rollout engines</text>')
    parts.append(
        f'<text transform="translate(16 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">s a step</text>'
    )
    for number, staleness in enumerate(STALENESS):
        colour = COLOURS[staleness]
        for series, width in ((points, 2.5), (without_waiting, 1)):
            line = " ".join(f"{across(n):.1f},{down(series[n, staleness].found.mean_step_s):.1f}" for n in ENGINES)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        y = down(points[ENGINES[-1], staleness].bound_s)
        parts.append(
            f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" stroke-dasharray="5 4"/>'
        )
        parts.append(
            f'<text x="{right + 14}" y="{TOP + 20 + 22 * number}" fill="{colour}">max_staleness {staleness}</text>'
        )
    for number, words in enumerate(("thick: as it is", "thin: nobody waits", "for busy engines", "dashed: bound")):
        y = TOP + 32 + 22 * len(STALENESS) + 18 * number
        parts.append(f'<text x="{right + 14}" y="{y}" fill="#555555">{words}</text>')
    parts.append("</svg>")
    return "".join(parts) + "\n"


def filled(text: str, sections: Mapping[str, str]) -> str:
    """The page with what stands between `<!-- simulated: NAME -->` and `<!-- end -->` replaced."""
    for name, made in sections.items():
        before, mark, rest = text.partition(f"<!-- simulated: {name} -->\n")
        if not mark:
            raise ValueError(f"docs/scaling.md has no place for {name}")
        text = f"{before}{mark}{made}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return text


def settings() -> str:
    """What was simulated, in a sentence."""
    return (
        f"A step is {WORK.groups_per_step:,} prompts of {WORK.prompt_tokens} tokens with {WORK.samples_per_prompt} "
        f"completions each, log-normal with median {WORK.median_tokens:.0f} and log-deviation {WORK.log_sigma}, cut at "
        f"{WORK.max_new_tokens:,} tokens. An engine decodes up to {COST.max_sequences} sequences in steps of "
        f"{COST.step_s * 1e3:.2f} ms + {COST.sequence_s * 1e6:.1f} µs a sequence, and takes new weights in "
        f"{COST.load_s:g} s. An update takes {REST.update_s:g} s, publishing {REST.publish_s:g} s, judging nothing. "
        f"Means over {COUNTED} steps, without the first {FIRST} and the last {LAST}."
    )


def main() -> None:
    today, without_waiting = (simulate_all(learner_waits=waits) for waits in (True, False))
    (FOLDER / "scaling.svg").write_text(chart(today, without_waiting))
    page = FOLDER / "scaling.md"
    sections = {"settings": settings(), "table": table(today), "without waiting": table(without_waiting)}
    page.write_text(filled(page.read_text(), sections))


if __name__ == "__main__":
    main()
