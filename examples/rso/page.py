"""docs/results/rso.md out of the results."""

from pathlib import Path
from typing import Any

from ..miniature import page
from ..miniature.page import Claim

CLAIMS = [
    Claim("sample and rank above direct, sigmoid", "sample and rank, sigmoid", "direct, sigmoid"),
    Claim("sample and rank above direct, hinge", "sample and rank, hinge", "direct, hinge"),
    Claim("RSO above sample and rank, sigmoid", "RSO, sigmoid", "sample and rank, sigmoid"),
    Claim("RSO above sample and rank, hinge", "RSO, hinge", "sample and rank, hinge"),
    Claim("RSO above direct, sigmoid", "RSO, sigmoid", "direct, sigmoid"),
    Claim("RSO above direct, hinge", "RSO, hinge", "direct, hinge"),
    Claim(
        "tournament above first round, sample and rank",
        "sample and rank, sigmoid, tournament",
        "sample and rank, sigmoid",
    ),
    Claim("tournament above first round, RSO", "RSO, sigmoid, tournament", "RSO, sigmoid"),
]

TEMPLATE = Path(__file__).with_name("template.md")


def write(found: dict[str, Any], to: Path) -> None:
    """Writes the page and its chart."""
    text = TEMPLATE.read_text().format(
        vocabulary=page.vocabulary(),
        best=page.world.BEST,
        worlds=page.worlds_line(found),
        objectives=page.objectives_table(found),
        seeds=len(found["worlds"]),
        table=page.results_table(found),
        claims=page.claims_table(found, CLAIMS),
        count=len(CLAIMS),
        reading=page.reading(found, CLAIMS),
    )
    page.save(to, "rso", text, page.points_chart(found))
