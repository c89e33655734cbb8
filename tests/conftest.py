"""What several tests share. Tests cannot import each other: add a fixture here, or a fake to rlhf/testing.py."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.config import RunConfig
from rlhf.experience import Group, Prompt, Sample, Sampling

# No test needs a hub, and none may wait for an answer that never comes on a closed network.
CLOSED_NETWORK = {
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def pytest_configure() -> None:
    """Set before any test module is imported: huggingface_hub reads its variables at import."""
    os.environ.update(CLOSED_NETWORK)


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


@pytest.fixture
def rollout() -> Callable[..., Group]:
    """Builds a group as an engine would, without columns; all in it depends on (prompt id, version) only."""

    def build(prompt_id: int, version: int, samples: int, length: int, columns: Mapping[str, Any]) -> Group:
        """Samples differ in length by one token each; columns are those of the prompt's row."""
        random = np.random.default_rng((prompt_id, version))
        prompt_ids = np.array([1, 2, 3 + prompt_id], np.int32)
        prompt = Prompt(prompt_id, prompt_id % 7, prompt_id // 7, "hi", "<hi>", prompt_ids, columns)
        made = tuple(
            Sample(
                index=index,
                token_ids=random.integers(0, 1000, length + index).astype(np.int32),
                loss_mask=random.random(length + index) < 0.9,
                text=f"answer {index} at {version}",
                finish_reason="stop",
                behavior_logprobs=-random.random(length + index, dtype=np.float32),
                versions=np.full(length + index, version, np.int32),
                sampling=Sampling(0.7, 1.0, 0, 64),
                seed=int(random.integers(2**62)),
                scores={},
                tokens={},
            )
            for index in range(samples)
        )
        return Group(prompt, made, "policy")

    return build


@pytest.fixture
def plain() -> Callable[[Group], dict[str, Any]]:
    """Everything in a group, in a form that == compares, dtypes and bits included."""

    def array(a: np.ndarray | None) -> tuple[Any, ...] | None:
        return None if a is None else (str(a.dtype), a.shape, a.tobytes())

    def sample(s: Sample) -> tuple[Any, ...]:
        arrays = [array(a) for a in (s.token_ids, s.loss_mask, s.behavior_logprobs, s.versions)]
        tokens = {name: array(a) for name, a in s.tokens.items()}
        return (s.index, s.text, s.finish_reason, s.sampling, s.seed, dict(s.scores), arrays, tokens)

    def build(group: Group) -> dict[str, Any]:
        p = group.prompt
        prompt = (p.id, p.row, p.epoch, p.content, p.text, array(p.token_ids), dict(p.columns))
        return {"prompt": prompt, "origin": group.origin, "samples": [sample(s) for s in group.samples]}

    return build


@pytest.fixture
def tiny_run() -> Callable[..., RunConfig]:
    """Builds a run file's content for the tiny model, RLOO without a KL price and the torch engine in float32."""

    def build(
        model: Mapping[str, Any], learner: Mapping[str, Any], loop: Mapping[str, Any], kl: Mapping[str, Any]
    ) -> RunConfig:
        """What the arguments say replaces or adds to the keys of their sections."""
        return RunConfig.model_validate(
            {
                "seed": 1,
                "model": {"name": "tiny", **model},
                "algorithm": {"name": "rloo", "samples_per_prompt": 4, "kl": {"coef": 0.0, **kl}},
                "data": {"path": "unused.jsonl"},
                "loop": {"num_steps": 8, "groups_per_step": 4, **loop},
                "generation": {"engine": "transformers", "max_new_tokens": 16, "temperature": 0.7},
                "learner": {"engine": "torch", "lr": 1e-2, "tokens_per_microbatch": 128, **learner},
                "reward": {"function": "unused:unused"},
            }
        )

    return build


@pytest.fixture
def sampled_groups() -> Callable[..., list[Group]]:
    """Builds groups as the tiny model could have sampled them: random ids below 320, EOS at the end, uneven lengths."""

    def build(seed: int, prompts: int, samples: int, version: int, reward_scale: float) -> list[Group]:
        random = np.random.default_rng(seed)
        groups = []
        for prompt_id in range(prompts):
            prompt_ids = random.integers(5, 320, random.integers(3, 20)).astype(np.int32)
            made = []
            for index in range(samples):
                ids = np.append(random.integers(5, 320, random.integers(0, 15)), 1).astype(np.int32)
                made.append(
                    Sample(
                        index=index,
                        token_ids=ids,
                        loss_mask=np.ones(len(ids), np.bool_),
                        text="",
                        finish_reason="stop",
                        behavior_logprobs=np.full(len(ids), -5.5, np.float32),
                        versions=np.full(len(ids), version, np.int32),
                        sampling=Sampling(0.7, 1.0, 0, 16),
                        seed=index,
                        scores={"reward": reward_scale * float(random.normal())},
                        tokens={},
                    )
                )
            groups.append(Group(Prompt(prompt_id, prompt_id, 0, "", "", prompt_ids, {}), tuple(made), "policy"))
        return groups

    return build


@pytest.fixture
def divided_loss() -> Callable[..., tuple[Any, dict[str, float]]]:
    """What the learner makes of a train batch when the model says these log-probabilities: its loss and its metrics."""
    import torch

    from rlhf.learner.collate import collate
    from rlhf.learner.plan import count_of, plan, units_of
    from rlhf.ops.microbatch import Outputs

    def build(
        algorithm: Any, batch: Any, logprobs: Sequence[Any], budget: int, ranks: int
    ) -> tuple[Any, dict[str, Any]]:
        """logprobs, one (T,) tensor a row, row i being unit i; budget, padded tokens in a micro-batch."""
        units = units_of(batch.rows)
        count = count_of(units, batch.normalizer)
        loss, means = torch.zeros(()), {}
        for micro in (micro for rank in plan(units, ranks, budget, packed=False) for micro in rank):
            made = collate(micro, sorted(batch.rows[0].tokens), packed=False).batch
            said = torch.zeros(made.mask.shape)
            for i, row in enumerate(row for unit in micro for row in unit.rows):
                padding = torch.zeros(said.shape[1] - len(logprobs[row.unit]))
                said = said.index_put((torch.tensor([i]),), torch.cat([logprobs[row.unit], padding])[None])
            sums = algorithm.loss(Outputs(said, torch.zeros_like(said)), made)
            loss = loss + sums.loss / count
            for name, (total, weight) in sums.means.items():
                before = means.get(name, (0.0, 0.0))
                means[name] = (before[0] + float(total), before[1] + float(weight))
        return loss, {name: total / weight for name, (total, weight) in means.items() if weight}

    return build


@pytest.fixture(scope="session")
def forked() -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs `rlhf` in a child of a process that has everything loaded, one at a time: a second instead of ten.

    Called with the current folder and the arguments, and with clock_jumps=True for a wall clock that jumps by hours.
    Gives the exit code (negative: the signal that ended it) and what was printed.
    """
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forked_rlhf.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert server.stdin is not None and server.stdout is not None
    asked = itertools.count()

    def run(folder: Path, *arguments: str, clock_jumps: bool = False) -> tuple[int, str]:
        assert server.stdin is not None and server.stdout is not None
        number = next(asked)
        request = {"number": number, "folder": str(folder), "arguments": arguments, "clock_jumps": clock_jumps}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        # A test that ran out of time has left its answer unread.
        while (answer := json.loads(server.stdout.readline()))["number"] != number:
            pass
        return answer["code"], answer["printed"]

    yield run
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="session")
def mixed_logprobs() -> Callable[..., Any]:
    """What a sequence is worth whose weights changed on the way: by whole forward passes, without any engine."""
    import torch

    @torch.no_grad()
    def expected(models: Sequence[Any], prompt: Sequence[int], sample: Sample) -> torch.Tensor:
        """Log-probs (T,) of a sample whose tokens were sampled under `models`, told apart by `sample.versions`.

        Each model reads what the one before it has not: its last token and its own, on the former's cache.
        """
        ids = [*prompt, *sample.token_ids.tolist()]
        found: list[torch.Tensor] = []
        cache, read = None, 0
        for model, version in zip(models, sorted(set(sample.versions.tolist())), strict=True):
            own = int((sample.versions <= version).sum())
            until = len(prompt) + own - 1  # the last token of each stretch is read by the next model
            out = model(input_ids=torch.tensor([ids[read:until]]), past_key_values=cache, use_cache=True)
            logprobs = out.logits[0].double().log_softmax(-1)
            rows = [logprobs[place - read, ids[place + 1]] for place in range(max(read, len(prompt) - 1), until)]
            found += rows
            cache, read = out.past_key_values, until
        return torch.stack(found)

    return expected
