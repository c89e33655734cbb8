"""docs/results/back_to_basics.md out of the results."""

from pathlib import Path
from typing import Any

from ..miniature import page
from ..miniature.page import Claim

CLAIMS = [
    Claim("RLOO above RAFT, k = 4", "RLOO k=4", "RAFT k=4"),
    Claim("RLOO above RAFT, k = 2", "RLOO k=2", "RAFT k=2"),
    Claim("RLOO k = 4 above REINFORCE with a moving average", "RLOO k=4", "REINFORCE"),
    Claim("REINFORCE with a moving average above vanilla PG", "REINFORCE", "Vanilla PG"),
    Claim("vanilla PG above PPO", "Vanilla PG", "PPO"),
    Claim("RLOO k = 4 above PPO", "RLOO k=4", "PPO"),
    Claim("RLOO k = 4 above DPO", "RLOO k=4", "DPO"),
]
CONTROLS = [
    Claim(f"{name} above random selection", name, "random selection")
    for name in ("RLOO k=4", "RLOO k=2", "RAFT k=4", "RAFT k=2", "REINFORCE", "PPO", "Vanilla PG", "DPO")
]

TEMPLATE = Path(__file__).with_name("template.md")


def write(found: dict[str, Any], to: Path) -> None:
    """Writes the page and its chart."""
    text = TEMPLATE.read_text().format(
        vocabulary=page.vocabulary(),
        best=page.world.BEST,
        sharpness=page.world.SHARPNESS,
        worlds=page.worlds_line(found),
        objectives=page.objectives_table(found),
        seeds=len(found["worlds"]),
        table=page.results_table(found),
        claims=page.claims_table(found, CLAIMS),
        controls=page.claims_table(found, CONTROLS),
        count=len(CLAIMS),
        reading=page.reading(found, CLAIMS),
    )
    picture = page.points_chart(found, [page.training_panel(found, "RLOO k=4")])
    page.save(to, "back_to_basics", text, picture)
