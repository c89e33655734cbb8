"""Trainer and rollout engine hold the same policy, token by token, while it is being trained.

Not covered: bfloat16 (its gap is of the kernels, and reported by mismatch/*), GPUs, more than one rank.
"""

from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.algorithms.table import build
from rlhf.blueprint import draw
from rlhf.cli.launch import run
from rlhf.cluster import Cluster
from rlhf.config import RunConfig
from rlhf.data.prompts import PromptSet
from rlhf.evaluation.heldout import HeldoutReport
from rlhf.experience import OLD_LOGPROBS, REF_LOGPROBS, REWARD, Columns, Group, Sampling, fill_in
from rlhf.generation.transformers_engine import TransformersGenerator
from rlhf.generation.vllm_engine import VllmGenerator
from rlhf.learner.learner import PolicyLearner

PROMPTS = 4


def settings(folder: Path, model: str, engine: str) -> RunConfig:
    (folder / "prompts.jsonl").write_text("\n".join(f'{{"prompt": "Tell me about {n}."}}' for n in range(20)))
    (folder / "reward.py").write_text(
        "def reward(prompts, completions, **columns):\n    return [float(text.count('e')) for text in completions]\n"
    )
    return RunConfig.model_validate(
        {
            "model": {"name": model},
            "algorithm": {"name": "rloo", "samples_per_prompt": 3},
            "data": {"path": str(folder / "prompts.jsonl")},
            "loop": {"num_steps": 2, "groups_per_step": PROMPTS, "max_staleness": 1},
            "generation": {"engine": engine, "max_new_tokens": 12, "cache_gib": 0.2},
            "learner": {"engine": "torch", "lr": 1e-2},
            "reward": {"function": f"{folder}/reward.py:reward"},
        }
    )


def judged(group: Group) -> Columns:
    """Rewards that differ within a group, and a reference that is the sampler: what is trained does not matter here."""
    rewards = [float(sample.token_ids.sum() % 7) for sample in group.samples]
    reference = [sample.behavior_logprobs for sample in group.samples if sample.behavior_logprobs is not None]
    return Columns(group.prompt.id, {REWARD: rewards}, {REF_LOGPROBS: reference})


@pytest.fixture(params=["tiny", "tiny-untied"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[PolicyLearner, VllmGenerator, PromptSet]]:
    from rlhf.generation.build import build_generator

    config = settings(tmp_path, request.param, "vllm")
    learner = PolicyLearner(config, build(config.algorithm), 0, 1, None)
    learner.setup()
    generator = build_generator(config, "rollout-0", 1)
    assert isinstance(generator, VllmGenerator)
    generator.setup()
    yield learner, generator, PromptSet.load(config)
    generator.close()


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_and_the_learner_agree_at_every_token_before_and_after_each_of_five_updates(
    pair: tuple[PolicyLearner, VllmGenerator, PromptSet],
) -> None:
    """float32, tied and untied head, temperatures 0.7 and 1.0; the policy must really move between the checks."""
    learner, generator, prompts = pair
    moved = []
    for update in range(6):
        weights = learner.publish()
        assert weights is not None
        assert generator.load(weights).probe_abs_max < 1e-4
        groups = []
        for number, temperature in enumerate((0.7, 1.0)):
            asked = [prompts.prompt((update * 2 + number) * PROMPTS + n) for n in range(PROMPTS)]
            groups += list(generator.generate(asked, Sampling(temperature, 1.0, 0, 12), 3, "sample"))
        groups = fill_in(groups, [*learner.annotate_share(groups), *map(judged, groups)])
        gaps = [
            np.abs(sample.tokens[OLD_LOGPROBS] - sample.behavior_logprobs).max()
            for group in groups
            for sample in group.samples
        ]
        assert max(gaps) < 1e-4, f"after {update} updates"
        before = weights.probe.logprobs
        learner.update(learner.prepare(groups))
        after = learner.publish()
        assert after is not None
        moved.append(float(np.abs(after.probe.logprobs - before).max()))
    assert min(moved) > 1e-2


class Listening:
    """An observer that keeps notes and metrics."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[dict[str, float]] = []

    def started(self, config: RunConfig, first_step: int, num_steps: int) -> None:
        pass

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(dict(metrics))

    def note(self, message: str) -> None:
        self.notes.append(message)

    def evaluated(self, step: int, report: HeldoutReport) -> None:
        pass

    def finished(self, outcome: str, message: str) -> None:
        pass


def run_here(folder: Path, config: RunConfig) -> Listening:
    listening = Listening()
    (folder / "run").mkdir()
    run(config, Cluster(), folder / "run", PromptSet.load(config), in_process=True, observer=listening)
    return listening


def test_the_ratio_is_one_and_the_kl_zero_before_the_first_update(tmp_path: Path) -> None:
    first = run_here(tmp_path, settings(tmp_path, "tiny", "transformers")).steps[0]
    assert abs(first["kl/k1"]) < 1e-4 and first["kl/k3"] < 1e-4
    assert first["mismatch/logprob_abs_max"] < 1e-4 and first["clip/fraction"] == 0


@pytest.mark.parametrize("sabotaged", [False, True])
def test_an_engine_that_bends_one_logit_raises_the_mismatch_alarm_in_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sabotaged: bool
) -> None:
    """The probe passes, because only sampling is bent: one logit is 0.3 too high. Without it there is no alarm."""

    def bend(module: torch.nn.Module, states: object, logits: torch.Tensor) -> torch.Tensor:
        return logits + 0.3 * (torch.arange(logits.shape[-1]) == 100)

    honest = TransformersGenerator._draw

    def bent(self: TransformersGenerator, *arguments: object) -> Generator[None, None, object]:
        handle = self._model.get_output_embeddings().register_forward_hook(bend)
        try:
            return (yield from honest(self, *arguments))
        finally:
            handle.remove()

    if sabotaged:
        monkeypatch.setattr(TransformersGenerator, "_draw", bent)
    config = settings(tmp_path, "tiny", "transformers")
    one_step = config.model_copy(update={"loop": config.loop.model_copy(update={"num_steps": 1})})
    alarms = [note for note in run_here(tmp_path, one_step).notes if "mismatch alarm at step 0" in note]
    assert len(alarms) == sabotaged


def test_groups_are_annotated_by_what_they_hold_not_by_where_they_stand(tmp_path: Path) -> None:
    """Columns of a group do not depend on the groups beside it."""
    config = settings(tmp_path, "tiny", "transformers")
    learner = PolicyLearner(config, draw(config).algorithm, 0, 1, None)
    learner.setup()
    generator = TransformersGenerator(_spec(config))
    generator.setup()
    weights = learner.publish()
    assert weights is not None
    generator.load(weights)
    prompts = PromptSet.load(config)
    groups = list(generator.generate([prompts.prompt(n) for n in range(5)], Sampling(1.0, 1.0, 0, 12), 2, "sample"))
    together = {c.prompt_id: c.tokens[OLD_LOGPROBS] for c in learner.annotate_share(groups)}
    for group in groups:
        (alone,) = learner.annotate_share([group])
        for one, other in zip(alone.tokens[OLD_LOGPROBS], together[group.prompt.id], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def _spec(config: RunConfig):  # type: ignore[no-untyped-def]
    from rlhf.generation.build import engine_spec
    from rlhf.models.resolve import resolve

    return replace(engine_spec(config, "rollout-0", resolve(config.model.name), 1))
