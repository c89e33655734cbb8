"""Optimizer steps that were skipped because their gradient was not finite: said of each step, and no success where it
was so in all of them. Read from what metrics.jsonl holds, so that a run that went on is judged as a whole."""

from collections.abc import Mapping
from pathlib import Path

from rlhf.errors import RunFailed
from rlhf.observers import METRICS_FILE, read_steps

SKIPPED = "faults/nonfinite_step"
# The learner measures it in optimizer steps that were applied, and in no others.
APPLIED = "grad_norm"


def skipped_text(step: int, values: Mapping[str, float]) -> str | None:
    """What to tell of a step; None where nothing was skipped."""
    count = values.get(SKIPPED, 0.0)
    if not count:
        return None
    left = "others of this step were applied" if APPLIED in values else "the policy is what it was before"
    return f"step {step + 1}: {count:.0f} optimizer steps skipped, their gradient is not finite; {left}"


def refuse_unmoved(run_dir: Path) -> None:
    """Raises RunFailed when optimizer steps were skipped and the policy has had no other one."""
    rows, _ = read_steps(run_dir / METRICS_FILE)
    skipped = sum(row.get(SKIPPED, 0.0) for row in rows)
    if skipped and not any(APPLIED in row for row in rows):
        raise RunFailed(
            f"no update was applied in {len(rows)} steps: all {skipped:.0f} optimizer steps were skipped, because "
            "their gradients were not finite, so the policy is the one that the run began with. Next: look at the loss "
            f"and its parts in {run_dir / METRICS_FILE}, lower what is too large (coefficients, rewards), and "
            "begin again with --fresh"
        )
