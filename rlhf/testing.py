"""Stand-ins for models, for tests of the loop, the source and the buffer: no weights, no engine, made-up numbers.

`MadeUpGenerator` answers any prompt with tokens that depend on nothing but the seed address, `CountingLearner` counts
updates. They keep every promise of the roles they stand for but sense: what they say is noise."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rlhf.experience import REWARD, Columns, Group, Prompt, Sample, Sampling
from rlhf.interfaces import Published
from rlhf.metrics import Metrics, mean_of
from rlhf.seeding import seed_for
from rlhf.weights import Probe, Receipt, Weights, fingerprint_of


class MadeUpGenerator:
    """Samples random token ids; `answered` lists the prompt ids in the order in which it was asked for them."""

    def __init__(self, run_seed: int) -> None:
        self._run_seed = run_seed
        self._version = 0
        self.answered: list[int] = []

    def setup(self) -> None:
        self.answered.clear()

    def load(self, weights: Weights) -> Receipt:
        self._version = weights.version
        return Receipt("made-up", weights.version, weights.fingerprint, 0.0, 0.0)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int, purpose: str
    ) -> Iterator[Group]:
        for prompt in prompts:
            self.answered.append(prompt.id)
            samples = tuple(self._sample(prompt, index, sampling, purpose) for index in range(samples_per_prompt))
            yield Group(prompt, samples, "policy")

    def close(self) -> None:
        self.answered.clear()

    def _sample(self, prompt: Prompt, index: int, sampling: Sampling, purpose: str) -> Sample:
        seed = seed_for(self._run_seed, purpose, prompt.id, index)
        random = np.random.default_rng(seed)
        length = int(random.integers(1, sampling.max_new_tokens + 1))
        ids = random.integers(0, 100, length).astype(np.int32)
        return Sample(
            index=index,
            token_ids=ids,
            loss_mask=np.ones(length, dtype=np.bool_),
            text=" ".join(map(str, ids)),
            finish_reason="length" if length == sampling.max_new_tokens else "stop",
            behavior_logprobs=-random.random(length).astype(np.float32),
            versions=np.full(length, self._version, dtype=np.int32),
            sampling=sampling,
            seed=seed,
            scores={},
            tokens={},
        )


class LengthJudge:
    """Rewards long answers: the number of tokens."""

    def setup(self) -> None:
        """Nothing to prepare."""

    def judge(self, group: Group) -> Columns:
        return Columns(group.prompt.id, {REWARD: [float(len(s.token_ids)) for s in group.samples]}, {})

    def close(self) -> None:
        """Nothing to end."""


class CountingLearner:
    """Trains nothing; `trained` lists the prompt ids of each update, `ages` the staleness of their groups."""

    def __init__(self) -> None:
        self._version = 0
        self.trained: list[list[int]] = []
        self.ages: list[int] = []

    @property
    def version(self) -> int:
        return self._version

    def annotate(self, groups: list[Group]) -> list[Group]:
        return groups

    def prepare(self, groups: list[Group]) -> list[Group]:
        return groups

    def update(self, batch: list[Group]) -> Metrics:
        self.trained.append([group.prompt.id for group in batch])
        self.ages += [self._version - version for group in batch if (version := group.policy_version) is not None]
        self._version += 1
        scores = [score for group in batch for s in group.samples if (score := s.scores[REWARD]) is not None]
        return {"reward/mean": mean_of(scores)}

    def evaluate(self, groups: list[Group]) -> Metrics:
        return {"completion/length_mean": mean_of(len(s.token_ids) for group in groups for s in group.samples)}

    def publish(self) -> Published:
        probe = Probe(np.zeros(2, dtype=np.int32), np.zeros(1, dtype=np.float32))
        fingerprint = f"{fingerprint_of({})}-{self._version}"
        return Published(self._version, fingerprint, 0, Weights(self._version, fingerprint, {}, probe, life=0))

    def save(self, folder: Path) -> None:
        (folder / "version").write_text(str(self._version))

    def load(self, folder: Path | None) -> None:
        self._version = 0 if folder is None else int((folder / "version").read_text())

    def notice(self) -> bool:
        return False

    def move(self, folder: Path) -> bool:
        return False
