"""Back to Basics (arXiv 2402.14740) in miniature: `python -m examples.back_to_basics.compare` makes
docs/results/back_to_basics.*."""

from ..miniature.comparison import Method, main
from .page import write

TWO = ("algorithm.samples_per_prompt=2", "loop.groups_per_step=16")  # as many completions a step, of twice the prompts

METHODS = [
    Method("RLOO k=4", "online"),
    Method("RLOO k=2", "online", TWO, rate_of="RLOO k=4"),
    Method("RAFT k=4", "online", ("algorithm.name=raft",)),
    Method("RAFT k=2", "online", ("algorithm.name=raft", *TWO), rate_of="RAFT k=4"),
    Method("REINFORCE", "online", ("algorithm.name=reinforce", "algorithm.baseline=moving_average")),
    Method("PPO", "online", ("algorithm.name=ppo", "algorithm.critic.lr=1e-3")),
    Method(
        "Vanilla PG",
        "online",
        (
            "algorithm.name=ppo",
            "algorithm.lam=1",
            "algorithm.clip.low=1",
            "algorithm.clip.high=1e9",
            "algorithm.critic.value_clip=null",
            "algorithm.critic.lr=1e-3",
        ),
        rate_of="PPO",
    ),
    Method("DPO", "dpo", on_pairs=True),
    Method("random selection", "online", ("algorithm.name=raft", "algorithm.selection=random"), rate_of="RAFT k=4"),
]

if __name__ == "__main__":
    main("back_to_basics", METHODS, write)
