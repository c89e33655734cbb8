"""What several tests share. Tests cannot import each other: add a fixture here, or a fake to rlhf/testing.py."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from rlhf.experience import Group, Prompt, Sample, Sampling


@pytest.fixture
def make_group() -> Callable[..., Group]:
    """Builds a group of the policy by hand: lengths and rewards of its samples, and token columns by name."""

    def build(
        prompt_id: int,
        rewards: Sequence[float | None],
        lengths: Sequence[int],
        tokens: Mapping[str, Sequence[Sequence[float]]],
        columns: Mapping[str, Any],
    ) -> Group:
        """tokens may hold behavior_logprobs (-1 at each token otherwise); columns are the row's other columns."""
        prompt = Prompt(prompt_id, prompt_id, 0, "say a", "say a", np.array([5, 6], dtype=np.int32), columns)
        samples = []
        for i, (reward, length) in enumerate(zip(rewards, lengths, strict=True)):
            own = {name: np.array(column[i], dtype=np.float32) for name, column in tokens.items()}
            behavior = own.pop("behavior_logprobs", np.full(length, -1.0, dtype=np.float32))
            samples.append(
                Sample(
                    index=i,
                    token_ids=np.arange(10, 10 + length, dtype=np.int32),
                    loss_mask=np.ones(length, dtype=np.bool_),
                    text=f"answer {i}",
                    finish_reason="stop",
                    behavior_logprobs=behavior,
                    versions=np.zeros(length, dtype=np.int32),
                    sampling=Sampling(temperature=0.7, top_p=1.0, top_k=0, max_new_tokens=16),
                    seed=i,
                    scores={"reward": reward},
                    tokens=own,
                )
            )
        return Group(prompt, tuple(samples), "policy")

    return build
