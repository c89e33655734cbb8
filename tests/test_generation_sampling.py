"""How one token is chosen, what ends a completion, and how an engine's answer is read. No model is loaded here."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf.config import RunConfig
from rlhf.errors import BadInput
from rlhf.experience import Sampling
from rlhf.generation.build import build_generator, engine_spec
from rlhf.generation.engine import longest_sequence, stop_ids
from rlhf.generation.transformers_engine import TransformersGenerator, choose, keep
from rlhf.generation.vllm_engine import VllmGenerator, read_draw
from rlhf.models.resolve import resolve


def sampling(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Sampling:
    return Sampling(temperature, top_p, top_k, 8)


def uniforms(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, -0.74367), (0.7, -0.54172)])
def test_temperature_divides_the_logits(temperature: float, expected: float) -> None:
    """Published value for logits (1,2,1,1), token 1; dividing log-probs would give -1.06238 at 0.7."""
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0]])
    before = math.exp((1 - 2) / temperature) / (1 + 3 * math.exp((1 - 2) / temperature))
    chosen, logprobs = choose(logits, torch.tensor([before + 1e-6], dtype=torch.float64), sampling(temperature))
    assert chosen.item() == 1
    assert logprobs.item() == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_tokens_are_drawn_with_their_probability(temperature: float) -> None:
    """200,000 draws over 5 tokens: Pearson's chi-square below its 99.9 % point of 18.47 at 4 degrees of freedom."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1])
    count = 200_000
    chosen, _ = choose(logits.expand(count, -1), uniforms(count, 3), sampling(temperature))
    expected = (logits.double() / temperature).softmax(0) * count
    statistic = (((torch.bincount(chosen, minlength=5) - expected) ** 2) / expected).sum().item()
    assert statistic < 18.47
    wrong = logits.double().softmax(0) * count if temperature != 1.0 else torch.full((5,), count / 5.0)
    assert (((torch.bincount(chosen, minlength=5) - wrong) ** 2) / wrong).sum().item() > 1000


def test_extreme_draws_never_choose_an_impossible_token() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    chosen, logprobs = choose(logits, uniform, sampling())
    assert chosen.tolist() == [1, 1, 3]
    assert torch.isfinite(logprobs).all()


def test_greedy_takes_the_largest_logit_with_its_log_prob_at_temperature_one() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0]])
    chosen, logprobs = choose(logits, torch.tensor([0.999], dtype=torch.float64), sampling(temperature=0.0, top_k=1))
    assert chosen.item() == 1
    assert logprobs.item() == pytest.approx(-0.74367, abs=5e-6)


def test_truncated_sampling_reports_the_log_prob_of_what_it_drew_from() -> None:
    """pi = (.5,.3,.2) at top_p .8: drawn from (.625,.375,0), and the mean of pi over it is the kept mass .8."""
    pi = torch.tensor([0.5, 0.3, 0.2])
    count = 40_000
    chosen, logprobs = choose(pi.log().expand(count, -1), uniforms(count, 1), sampling(top_p=0.8))
    kept = torch.tensor([0.625, 0.375])
    assert chosen.max() == 1
    assert torch.allclose(logprobs, kept.log()[chosen], atol=1e-6)
    assert (pi[chosen] / logprobs.exp()).mean().item() == pytest.approx(0.8, abs=1e-5)


def test_top_k_keeps_the_k_largest_and_top_p_always_one() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    assert torch.isfinite(keep(logits, sampling(top_k=2))).tolist() == [[False, True, False, True]]
    assert torch.isfinite(keep(logits, sampling(top_k=99))).all()
    assert torch.isfinite(keep(logits, sampling(top_p=1e-9))).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        ({"eos_token_id": [2, 7]}, {"eos_token_id": 9}, 2, {2, 7}),
        ({"eos_token_id": [2, 7]}, {}, 5, {2, 5, 7}),
        ({"eos_token_id": 0}, {}, None, {0}),
        ({}, {}, 3, {3}),
        (None, {"eos_token_id": [4, 6]}, 4, {4, 6}),
    ],
)
def test_every_listed_stop_id_counts(
    tmp_path: Path,
    generation: dict[str, object] | None,
    config: dict[str, object],
    tokenizer: int | None,
    expected: set[int],
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stop_ids(tmp_path, tokenizer) == expected


def test_a_model_that_could_never_stop_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="eos_token_id"):
        stop_ids(tmp_path, None)


def test_sequences_are_bounded_by_the_models_positions(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 256}))
    assert longest_sequence(tmp_path, 100, trust_remote_code=False) == 100
    assert longest_sequence(tmp_path, 5000, trust_remote_code=False) == 256
    assert longest_sequence(tmp_path, 3, trust_remote_code=False) >= 25
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 16}))
    with pytest.raises(BadInput, match="probe"):
        longest_sequence(tmp_path, 100, trust_remote_code=False)


@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_the_sampled_tokens_log_prob_is_read_wherever_it_stands(temperature: float) -> None:
    """Five candidates a position, the sampled one third; the first of the table is another token."""
    logits = np.array([2.0, 1.5, 1.0, 0.5, 0.0]) / temperature
    logprobs = logits - np.log(np.exp(logits).sum())
    table = {
        token: SimpleNamespace(logprob=float(value))
        for token, value in zip([11, 12, 13, 14, 15], logprobs, strict=True)
    }
    output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=(13, 13), logprobs=[table, table])])
    draw = read_draw(output, 4, 99, [7, 8])
    assert (draw.index, draw.seed, draw.token_ids, draw.versions) == (4, 99, [13, 13], [7, 8])
    assert draw.logprobs == [logprobs[2], logprobs[2]]


def run_config(generation: dict[str, object], learner: dict[str, object]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "seed": 11,
            "model": {"name": "tiny"},
            "algorithm": {"name": "rloo"},
            "data": {"path": "prompts.jsonl", "max_prompt_tokens": 50},
            "loop": {"num_steps": 1, "groups_per_step": 2},
            "generation": {"max_new_tokens": 14, **generation},
            "learner": learner,
            "reward": {"function": "rewards:length"},
        }
    )


def test_an_engine_is_built_from_the_run_file() -> None:
    """Precision follows the learner unless it is given, and the probe's tolerance follows it. Nothing starts."""
    assert isinstance(
        build_generator(run_config({"engine": "transformers"}, {}), "rollout-2", 1), TransformersGenerator
    )
    assert isinstance(build_generator(run_config({"engine": "vllm"}, {}), "rollout-2", 1), VllmGenerator)
    model = resolve("tiny")
    spec = engine_spec(run_config({}, {"dtype": "bfloat16"}), "rollout-2", model, 1)
    assert (spec.name, spec.run_seed, spec.dtype, spec.max_sequence_tokens) == ("rollout-2", 11, "bfloat16", 64)
    other = engine_spec(run_config({"dtype": "float32"}, {"dtype": "bfloat16"}), "rollout-2", model, 1)
    assert other.dtype == "float32"
    assert other.probe_tolerance < spec.probe_tolerance
    assert engine_spec(run_config({"probe_tolerance": 0.125}, {}), "rollout-2", model, 1).probe_tolerance == 0.125
