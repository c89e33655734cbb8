"""RSO (arXiv 2309.06657) in miniature: `python -m examples.rso.compare` makes docs/results/rso.*."""

from ..miniature.comparison import Method, main
from .page import write

ROUND = ("loop.num_steps=96", "data.limit=384")  # as many pairs and optimizer steps as a round of rso.yaml
ANY = ("algorithm.rejection.beta=1e9",)  # every candidate is as likely to be kept: 8 of 64 at random
HINGE = ("algorithm.loss.name=hinge",)
TOURNAMENT = ("algorithm.pairing=tournament",)

METHODS = [
    Method("direct, sigmoid", "dpo", ROUND, on_pairs=True),
    Method("direct, hinge", "dpo", (*ROUND, *HINGE), on_pairs=True),
    Method("sample and rank, sigmoid", "rso", ANY),
    Method("sample and rank, hinge", "rso", (*ANY, *HINGE)),
    Method("RSO, sigmoid", "rso"),
    Method("RSO, hinge", "rso", HINGE),
    Method("sample and rank, sigmoid, tournament", "rso", (*ANY, *TOURNAMENT), rate_of="sample and rank, sigmoid"),
    Method("RSO, sigmoid, tournament", "rso", TOURNAMENT, rate_of="RSO, sigmoid"),
]

if __name__ == "__main__":
    main("rso", METHODS, write)
