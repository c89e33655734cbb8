"""An encoder-decoder (T5) in every pass, against plain transformers; whole runs in one process; what is refused.

Not covered: a T5 of real size, bfloat16, GPUs; DeepSpeed's ranks are in test_learner_deepspeed, Ray nowhere.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, T5Config, T5ForConditionalGeneration

from rlhf.algorithms.table import build
from rlhf.cli.main import main
from rlhf.config import ModelConfig, RunConfig
from rlhf.errors import BadInput, WeightMismatch
from rlhf.experience import REF_LOGPROBS, REWARD, Columns, Group, Prompt, Row, Sampling, fill_in
from rlhf.generation.build import build_generator
from rlhf.generation.transformers_engine import TransformersGenerator
from rlhf.interfaces import Generator
from rlhf.judges.reference import ReferenceJudge
from rlhf.learner.collate import collate
from rlhf.learner.learner import PolicyLearner
from rlhf.learner.plan import Unit
from rlhf.models.load import load_model
from rlhf.models.policy import PolicyModel
from rlhf.models.resolve import resolve
from rlhf.models.score import ScoreModel, start_score_model

TOLERANCE = 1e-5
LENGTHS = [(4, 8), (17, 1), (1, 12), (9, 30)]


def make_rows(lengths: Sequence[tuple[int, int]], temperature: float) -> list[Row]:
    """Rows of random ids that end in EOS (1), prompt and completion alike; some tokens are the padding id (0)."""
    random = np.random.default_rng(3)
    rows = []
    for unit, (prompt, completion) in enumerate(lengths):
        asked, said = (random.integers(0, 320, length).astype(np.int32) for length in (prompt, completion))
        asked[-1] = said[-1] = 1
        rows.append(Row(unit, asked, said, np.ones(completion, np.bool_), temperature, {}))
    return rows


def logprobs_of(policy: PolicyModel, rows: Sequence[Row]) -> list[Tensor]:
    collated = collate([Unit((row,)) for row in rows], (), packed=False)
    outputs = collated.outputs(*policy(*collated.inputs))
    return [outputs.logprobs[i, : len(row.completion_ids)] for i, row in enumerate(rows)]


@torch.no_grad()
def plainly(model: torch.nn.Module, prompt_ids: Any, completion_ids: Any, temperature: float) -> Tensor:
    """The independent reference: transformers' own forward, one sequence, no padding, no mask."""
    prompt, said = (torch.from_numpy(np.array(ids, dtype=np.int64)) for ids in (prompt_ids, completion_ids))
    read = torch.cat([torch.tensor([0]), said[:-1]])
    logits = model(input_ids=prompt[None], decoder_input_ids=read[None]).logits[0] / temperature
    return logits.log_softmax(-1).gather(1, said[:, None])[:, 0]


@pytest.fixture(params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return a_t5(request.param, tmp_path)


def a_t5(kind: str, tmp_path: Path) -> str:
    """The tiny T5, whose head is its scaled embedding, or one as T5 1.1: gated, with a head of its own."""
    if kind == "tied":
        return "tiny_t5"
    shutil.copytree(resolve("tiny_t5"), tmp_path / "t5")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=320, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, tie_word_embeddings=False,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
        model.lm_head.weight = torch.nn.Parameter(torch.randn(320, 32) / 8)
    model.save_pretrained(tmp_path / "t5")
    return str(tmp_path / "t5")


def settings(model: str, learner: dict[str, Any], lora: dict[str, Any] | None) -> RunConfig:
    return RunConfig.model_validate(
        {
            "seed": 1,
            "model": {"name": model, "lora": lora},
            "algorithm": {"name": "rloo", "samples_per_prompt": 4, "kl": {"coef": 0.05}},
            "data": {"path": "unused.jsonl"},
            "loop": {"num_steps": 8, "groups_per_step": 4},
            "generation": {"engine": "transformers", "max_new_tokens": 12, "temperature": 0.7},
            "learner": {"engine": "torch", "lr": 1e-2, "tokens_per_microbatch": 128, **learner},
            "reward": {"function": "unused:unused"},
        }
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_plain_forward_however_rows_are_batched(folder: str, temperature: float) -> None:
    """Each row alone, and all together with padding on both sides of the model; a row without a completion beside."""
    model = load_model(ModelConfig(name=folder), "float32")
    policy, rows = PolicyModel(model, 5), make_rows(LENGTHS, temperature)
    empty = Row(9, np.array([7, 8, 1], np.int32), np.zeros(0, np.int32), np.zeros(0, np.bool_), temperature, {})
    together = logprobs_of(policy, [rows[0], empty, *rows[1:]])
    assert together.pop(1).shape == (0,)
    for row, among in zip(rows, together, strict=True):
        expected = plainly(model, row.prompt_ids, row.completion_ids, temperature)
        assert torch.allclose(logprobs_of(policy, [row])[0], expected, atol=TOLERANCE, rtol=0)
        assert torch.allclose(among, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_gradient_is_that_of_the_models_own_loss(attention: str) -> None:
    """transformers' cross entropy of labels, one row at a time, against one padded batch with recomputation."""
    model = load_model(ModelConfig(name="tiny_t5", attention=attention), "float32")
    assert model.config._attn_implementation == attention
    rows = make_rows(LENGTHS, 1.0)
    policy = PolicyModel(model, 5)
    (-sum(column.sum() for column in logprobs_of(policy, rows))).backward()
    mine = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row in rows:
        prompt, said = (torch.from_numpy(ids.astype(np.int64))[None] for ids in (row.prompt_ids, row.completion_ids))
        (model(input_ids=prompt, labels=said).loss * said.numel()).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(mine[name], parameter.grad, atol=1e-4, rtol=1e-4), name


def prompts() -> list[Prompt]:
    return [Prompt(row.unit, row.unit, 0, "", "", row.prompt_ids, {}) for row in make_rows(LENGTHS, 1.0)]


def sampled(generator: Generator, temperature: float) -> list[Group]:
    return list(generator.generate(prompts(), Sampling(temperature, 1.0, 0, 12), 3, "sample"))


@pytest.mark.parametrize(("kind", "lora"), [("tied", None), ("untied", None), ("tied", {"rank": 4})])
def test_engine_learner_and_reference_agree_at_every_token_before_and_after_updates(
    kind: str, lora: dict[str, Any] | None, tmp_path: Path
) -> None:
    """What was said while sampling (cache, one prompt a batch) against the plain model that the learner saves, which
    is loaded anew; the learner's own pass over all groups and the reference's are held against it too."""
    config = settings(a_t5(kind, tmp_path), {}, lora)
    learner = PolicyLearner(config, build(config.algorithm), 0, 1, None)
    learner.setup()
    generator, judge = build_generator(config, "rollout-0", 1), ReferenceJudge(config)
    generator.setup()
    judge.setup()
    for update in range(2):
        weights = learner.publish()
        assert weights is not None and len(weights.probe.logprobs) == 12
        assert generator.load(weights).probe_abs_max < TOLERANCE
        saved = tmp_path / f"saved-{update}"
        saved.mkdir()
        learner.save(saved)
        model = T5ForConditionalGeneration.from_pretrained(saved / "policy")
        groups = sampled(generator, 0.7)
        for group in groups:
            for sample in group.samples:
                expected = plainly(model, group.prompt.token_ids, sample.token_ids, 0.7).numpy()
                np.testing.assert_allclose(sample.behavior_logprobs, expected, atol=TOLERANCE, rtol=0)
        references = [judge.judge(group) for group in groups]
        if update == 0:
            for group, said in zip(groups, references, strict=True):
                for sample, column in zip(group.samples, said.tokens[REF_LOGPROBS], strict=True):
                    np.testing.assert_allclose(sample.behavior_logprobs, column, atol=TOLERANCE, rtol=0)
        columns = [
            Columns(g.prompt.id, {REWARD: [float(s.token_ids.sum() % 7) for s in g.samples]}, {}) for g in groups
        ]
        measured = learner.update(
            learner.prepare(fill_in(groups, [*references, *columns, *learner.annotate_share(groups)]))
        )
        assert measured["mismatch/logprob_abs_max"].total < TOLERANCE
    last = learner.publish()
    assert last is not None and np.abs(last.probe.logprobs - weights.probe.logprobs).max() > 1e-3, "control: it moved"
    generator.close()


@pytest.mark.parametrize("left_out", ["encoder.block.1.layer.0.SelfAttention.q.weight", "shared.weight"])
def test_the_probe_sees_an_encoder_that_kept_its_old_weights(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor does not arrive where the engine computes; of a prompt of one token the queries would not be seen."""
    config = settings("tiny_t5", {}, None)
    learner = PolicyLearner(config, build(config.algorithm), 0, 1, None)
    learner.setup()
    generator = build_generator(config, "rollout-0", 1)
    generator.setup()
    with torch.no_grad():
        for parameter in learner._engine.policy.parameters():
            parameter.mul_(1.3)
    honest = TransformersGenerator._take

    def forgetful(self: TransformersGenerator, weights: Any) -> None:
        kept = self._model.get_parameter(left_out).detach().clone()
        honest(self, weights)
        with torch.no_grad():
            self._model.get_parameter(left_out).copy_(kept)

    weights = learner.publish()
    assert weights is not None
    generator.load(weights)
    monkeypatch.setattr(TransformersGenerator, "_take", forgetful)
    fresh = build_generator(config, "rollout-1", 1)
    fresh.setup()
    with pytest.raises(WeightMismatch, match="does not compute with them"):
        fresh.load(weights)


def test_a_score_is_that_of_transformers_classifier_and_knows_no_padding() -> None:
    """Encoder and decoder read the whole text; the first token of a row is a prompt, the rest the answer."""
    model = start_score_model(ModelConfig(name="tiny_t5"), "float32", 0)
    scorer, rows = ScoreModel(model, "token"), make_rows(LENGTHS, 1.0)
    rows = [
        Row(r.unit, np.where(r.prompt_ids == 1, 5, r.prompt_ids), r.completion_ids, r.loss_mask, 1.0, {}) for r in rows
    ]
    collated = collate([Unit((row,)) for row in rows], (), packed=False)
    scores = collated.scores(*scorer(*collated.inputs)).values
    for i, row in enumerate(rows):
        whole = torch.from_numpy(np.concatenate([row.prompt_ids, row.completion_ids]).astype(np.int64))
        whole[:-1][whole[:-1] == 1] = 5
        with torch.no_grad():
            expected = model(input_ids=whole[None]).logits.item()
        assert scores[i, len(row.completion_ids) - 1].item() == pytest.approx(expected, abs=TOLERANCE)
    with pytest.raises(BadInput, match="PPO needs a decoder-only model"):
        ScoreModel(model, "predictor")


ANIMALS, COLOURS = ("cat", "dog", "fox", "hen", "owl", "cow"), ("red", "blue", "green", "black")
PAIRS = [
    {"prompt": f"What is the {a}?", "chosen": f"It is {c}.", "rejected": f"{c} {c} {c}"}
    for a in ANIMALS
    for c in COLOURS
]


@pytest.fixture
def content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run file of SFT on the tiny T5 in the current folder, beside 24 pairs."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    monkeypatch.chdir(tmp_path)
    return {
        "seed": 5,
        "model": {"name": "tiny_t5"},
        "algorithm": {"name": "sft"},
        "data": {"path": "pairs.jsonl", "completion_column": "chosen", "heldout": 2},
        "loop": {"num_steps": 8, "groups_per_step": 8, "checkpoint_every": 4},
        "learner": {"engine": "torch", "lr": 1e-2},
    }


@pytest.fixture
def rlhf(content: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def call(run_dir: str) -> tuple[int, str]:
        Path("run.yaml").write_text(yaml.safe_dump(content))
        code = main(["run", "run.yaml", "--in-process", "--run-dir", run_dir])
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return call


def heldout(run_dir: str) -> list[dict[str, float]]:
    return [json.loads(line)["values"] for line in (Path(run_dir) / "evaluations.jsonl").read_text().splitlines()]


def test_sft_learns_and_goes_on_bitwise(rlhf: Callable[..., tuple[int, str]], content: dict[str, Any]) -> None:
    """Stopped half-way and gone on with, it ends with the same weights; they load and answer in plain transformers."""
    assert rlhf("straight")[0] == 0
    before, after = (values["loss/nll"] for values in heldout("straight"))
    assert after < 0.7 * before
    content["loop"]["num_steps"] = 4
    assert rlhf("stopped")[0] == 0
    content["loop"]["num_steps"] = 8
    assert rlhf("stopped")[0] == 0
    weights = [f"{run}/checkpoints/step-000008/policy/model.safetensors" for run in ("straight", "stopped")]
    assert Path(weights[0]).read_bytes() == Path(weights[1]).read_bytes()
    assert main(["verify", "stopped"]) == 0
    assert main(["replay", "straight", "--step", "6"]) == 0
    folder = "straight/checkpoints/step-000008/policy"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer(PAIRS[0]["prompt"], return_tensors="pt")
    said = T5ForConditionalGeneration.from_pretrained(folder).generate(**asked, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(said[0], skip_special_tokens=True).count(" is ")


def test_dpo_starts_at_ln_2_and_tells_held_out_pairs_apart(
    rlhf: Callable[..., tuple[int, str]], content: dict[str, Any]
) -> None:
    content["algorithm"] = {"name": "dpo", "loss": {"beta": 0.1}}
    content["data"] = {"path": "pairs.jsonl", "heldout": 2}
    content["learner"]["lr"] = 1e-3
    assert rlhf("dpo")[0] == 0
    before, after = heldout("dpo")
    assert before["loss/preference"] == pytest.approx(0.693147, abs=1e-4)
    assert after["rewards/accuracies"] == 1.0 and after["rewards/margins"] > 0.1


def test_a_reward_model_of_t5_is_trained_and_judges_two_rounds_of_rso(
    rlhf: Callable[..., tuple[int, str]], content: dict[str, Any]
) -> None:
    """Bradley-Terry on the pairs, then RSO under the folder that it wrote, which plain transformers loads too."""
    content["algorithm"] = {"name": "reward_model"}
    content["data"] = {"path": "pairs.jsonl", "heldout": 4}
    content["learner"]["lr"] = 3e-3
    assert rlhf("scores")[0] == 0
    before, after = heldout("scores")
    assert before["loss/bradley_terry"] == pytest.approx(0.69, abs=0.1) and after["rewards/accuracies"] == 1.0
    judge = "scores/checkpoints/step-000008/policy"
    loaded = AutoModelForSequenceClassification.from_pretrained(judge)
    tokenizer = AutoTokenizer.from_pretrained(judge)
    both = [
        loaded(**tokenizer(PAIRS[3]["prompt"] + PAIRS[3][side], return_tensors="pt")).logits.item()
        for side in ("chosen", "rejected")
    ]
    assert both[0] > both[1]
    content["algorithm"] = {
        "name": "rso",
        "samples_per_prompt": 8,
        "rejection": {"beta": 0.5, "accept": 4},
        "loss": {"beta": 0.1},
    }
    content["reward"] = {"model": judge}
    content["generation"] = {"engine": "transformers", "max_new_tokens": 8}
    content["loop"] = {"num_steps": 2, "groups_per_step": 4}
    assert rlhf("rounds")[0] == 0
    steps = [json.loads(line) for line in Path("rounds/metrics.jsonl").read_text().splitlines()]
    assert [step["faults/unscorable"] for step in steps] == [0, 0] and all(step["pairs/made"] > 0 for step in steps)
    assert steps[0]["reward/std"] > 0 and abs(steps[0]["kl/k1"]) < 1e-4 < steps[1]["kl/k3"]
    assert main(["verify", "rounds"]) == 0


SAMPLED = {
    "generation": {"engine": "transformers", "max_new_tokens": 4},
    "reward": {"function": "reward.py:nothing", "isolate": False},
}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learner": {"engine": "torch", "packing": True}}, "learner.packing: tiny_t5 is an encoder-decoder"),
        (
            {
                **SAMPLED,
                "algorithm": {"name": "rloo"},
                "generation": {"engine": "vllm", "max_new_tokens": 4},
                "data": {"path": "pairs.jsonl"},
            },
            "generation.engine=vllm: tiny_t5 is an encoder-decoder",
        ),
        ({**SAMPLED, "algorithm": {"name": "ppo"}, "data": {"path": "pairs.jsonl"}}, "algorithm.name=ppo: tiny_t5"),
        ({"data": {"path": "texts.jsonl"}}, "has no prompt for this model's encoder"),
    ],
)
def test_what_an_encoder_decoder_cannot_do_is_refused(
    rlhf: Callable[..., tuple[int, str]], content: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    Path("texts.jsonl").write_text(json.dumps({"text": "a whole text"}) + "\n")
    Path("reward.py").write_text("def nothing(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n")
    content |= changes
    code, shown = rlhf("refused")
    assert code == 2 and named in shown
    assert not Path("refused").exists()
