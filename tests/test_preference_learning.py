"""Online DPO and RSO learn on the tiny model, and do not when a pair's winner is drawn by lot.

Not covered: other seeds, other models, Ray, vLLM; how much is learnt is no figure of merit."""

import json
from pathlib import Path

import pytest

from rlhf.cli.main import main

ROOT = Path(__file__).parents[1]
# The control: each prompt's answers get each other's rewards by lot, so the mean reward stays the true one.
BY_LOT = (
    (ROOT / "examples/rewards/letter_share.py").read_text()
    + """

def shuffled(prompts, completions, **columns):
    import hashlib
    shares = letter_share(prompts, completions)
    lots = [hashlib.blake2b(f"{i}{text}".encode()).digest() for i, text in enumerate(completions)]
    return [shares[i] for i in sorted(range(len(lots)), key=lots.__getitem__)]
"""
)
SMALL = [
    "loop.groups_per_step=12", "loop.checkpoint_every=0", "data.heldout=0",
    "generation.engine=transformers", "generation.max_new_tokens=16", "learner.engine=torch",
]  # fmt: skip


def rewards(folder: Path, name: str, *settings: str) -> list[float]:
    """The mean reward of each step of a run in this process."""
    run_dir = folder / f"{name}-{len(settings)}"
    code = main(
        ["run", str(ROOT / f"configs/{name}_tiny.yaml"), *SMALL, *settings, "--in-process", "--run-dir", str(run_dir)]
    )
    assert code == 0
    return [json.loads(line)["reward/mean"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("online_dpo", 10), ("rso", 7)])
def test_learns_and_beats_pairs_by_lot(tmp_path: Path, name: str, steps: int) -> None:
    """The last two steps' reward is at least twice that of the first two, and twice that of the control's last two."""
    (tmp_path / "lot.py").write_text(BY_LOT)
    learnt = rewards(tmp_path, name, f"loop.num_steps={steps}")
    control = rewards(tmp_path, name, f"loop.num_steps={steps}", f"reward.function={tmp_path / 'lot.py'}:shuffled")
    start, end, by_lot = sum(learnt[:2]), sum(learnt[-2:]), sum(control[-2:])
    assert end > 2 * start and end > 2 * by_lot, (learnt, control)
