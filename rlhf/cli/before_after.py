"""What a finished run prints: held-out prompts with their answers before and after, and what the reward did."""

import textwrap
from pathlib import Path

from rlhf.evaluation.heldout import HeldoutReport, from_json, rise_in_deviations
from rlhf.observers import EVALUATIONS_FILE, read_steps

WIDTH = 110
LONGEST_ANSWER = 600


def before_and_after(run_dir: Path) -> str:
    """The first and the last evaluation side by side; empty when there are not two."""
    reports = [from_json(row) for row in read_steps(run_dir / EVALUATIONS_FILE)[0]]
    if len(reports) < 2:
        return ""
    first, last = reports[0], reports[-1]
    if not isinstance(first, HeldoutReport) or not isinstance(last, HeldoutReport):
        return f"\nheld-out before: {first.describe()}\nafter {last.step} steps: {last.describe()}"
    return "\n".join([*_answers(first, last), "", _rewards(first, last)])


def _answers(first: HeldoutReport, last: HeldoutReport) -> list[str]:
    lines = []
    for before, after in zip(first.samples, last.samples, strict=True):
        lines += ["", f"prompt: {printable(before.prompt)}"]
        for when, answer in (("before", before), ("after", after)):
            reward = "not scored" if answer.reward is None else f"{answer.reward:.2f}"
            text = printable(" ".join(answer.completion.split()))[:LONGEST_ANSWER] or "(nothing)"
            lines += textwrap.wrap(f"{when:>6} [{reward}] {text}", WIDTH, subsequent_indent=" " * 7)
    return lines


def printable(text: str) -> str:
    """The text without what a terminal would obey: a model may write control sequences. Lines and tabs stay."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def _rewards(first: HeldoutReport, last: HeldoutReport) -> str:
    return (
        f"reward on {last.n} held-out prompts: {first.reward_mean:.3f} ± {first.reward_std:.3f} before, "
        f"{last.reward_mean:.3f} ± {last.reward_std:.3f} after {last.step} steps: "
        f"{rise_in_deviations(first, last):+.2f} standard deviations of the answers before"
    )
