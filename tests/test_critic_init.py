"""PPO's critic that starts from a reward model. Not covered: DeepSpeed (the same module in another engine)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification

from rlhf.algorithms import ActorCriticAlgorithm
from rlhf.algorithms.table import build
from rlhf.cli.main import main
from rlhf.config import ModelConfig, RunConfig
from rlhf.errors import BadInput
from rlhf.experience import VALUES, Group
from rlhf.learner.critic import CriticLearner
from rlhf.models.load import load_tokenizer
from rlhf.models.score import start_score_model


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    """A reward model on the tiny model's trunk whose head is not small: it would not be drawn by chance."""
    model = start_score_model(ModelConfig(name="tiny"), "float32", 7)
    with torch.no_grad():
        model.score.weight.mul_(5.0)
    model.save_pretrained(tmp_path / "judge")
    load_tokenizer("tiny", trust_remote_code=False).save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


def critic_of(config: RunConfig) -> CriticLearner:
    algorithm = build(config.algorithm)
    assert isinstance(algorithm, ActorCriticAlgorithm)
    return CriticLearner(config, algorithm, 0, 1, None)


def values_of(config: RunConfig, groups: list[Group]) -> list[np.ndarray]:
    learner = critic_of(config)
    learner.setup()
    return [column for filled in learner.annotate_share(groups) for column in filled.tokens[VALUES]]


def ppo(plain: RunConfig, init: str) -> RunConfig:
    algorithm = {"name": "ppo", "samples_per_prompt": 4, "kl": {"coef": 0.0}, "critic": {"init": init}}
    return RunConfig.model_validate(plain.model_dump(exclude_unset=True) | {"algorithm": algorithm})


def test_its_first_values_are_the_reward_models_scores_of_what_stands_before_each_token(
    tiny_run: Callable[..., RunConfig], sampled_groups: Callable[..., list[Group]], judge: Path
) -> None:
    """Against plain transformers, one prefix at a time; the control is a critic with a new head on the policy."""
    plain, groups = tiny_run({}, {}, {}, {}), sampled_groups(0, 2, 2, 0, 1.0)
    found = values_of(ppo(plain, str(judge)), groups)
    fresh = values_of(ppo(plain, "policy"), groups)
    model = AutoModelForSequenceClassification.from_pretrained(judge)
    model.config.pad_token_id = None  # it then reads at the last token, EOS or not
    samples = [(group.prompt.token_ids, sample.token_ids) for group in groups for sample in group.samples]
    for (prompt, answer), mine in zip(samples, found, strict=True):
        whole = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
        with torch.no_grad():
            scores = [model(whole[None, : len(prompt) + t]).logits.item() for t in range(len(answer))]
        np.testing.assert_allclose(mine, scores, atol=1e-5)
    assert max(float(np.abs(a - b).max()) for a, b in zip(found, fresh, strict=True)) > 0.1


def test_one_with_another_vocabulary_is_refused(tiny_run: Callable[..., RunConfig], judge: Path) -> None:
    """It would read the policy's ids as other words, and learn on without a word."""
    tokenizer = load_tokenizer("tiny", trust_remote_code=False)
    tokenizer.add_tokens(["<|another|>"])
    tokenizer.save_pretrained(judge)
    config = ppo(tiny_run({}, {}, {}, {}), str(judge))
    with pytest.raises(BadInput, match=r"algorithm.critic.init: the tokenizer of .* has 321 tokens"):
        critic_of(config).setup()


@pytest.mark.parametrize(
    ("init", "named"),
    [
        ("./judge", None),
        ("tiny", "algorithm.critic.init: tiny is a language model"),
        ("./nowhere", "algorithm.critic.init: "),
    ],
)
def test_a_run_starts_from_it_or_is_refused_at_once(
    init: str, named: str | None, judge: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(judge.parent)
    Path("prompts.jsonl").write_text("".join(f'{{"prompt": "Count to {n}."}}\n' for n in range(6)))
    Path("reward.py").write_text("def share(prompts, completions, **columns):\n    return [1.0 for _ in completions]\n")
    content: dict[str, Any] = {
        "model": {"name": "tiny"},
        "algorithm": {"name": "ppo", "critic": {"init": init, "lr": 1e-3}},
        "data": {"path": "prompts.jsonl"},
        "loop": {"num_steps": 1, "groups_per_step": 2},
        "generation": {"engine": "transformers", "max_new_tokens": 4},
        "learner": {"engine": "torch"},
        "reward": {"function": "reward.py:share"},
    }
    Path("run.yaml").write_text(yaml.safe_dump(content))
    code = main(["run", "run.yaml", "--in-process", "--run-dir", "out"])
    shown = capsys.readouterr()
    assert code == (0 if named is None else 2) and (named or "") in shown.out + shown.err
