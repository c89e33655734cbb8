"""QLoRA, where bitsandbytes is installed (the lock does not have it); its refusal; the attention that was asked for.

Not covered: GPUs, flash_attention_2 itself, encoder-decoders in 4 bits.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from rlhf.algorithms.table import build
from rlhf.cli.main import main
from rlhf.cli.preflight import check_cheaply
from rlhf.cluster import Cluster
from rlhf.config import LoraConfig, ModelConfig, RunConfig
from rlhf.errors import BadInput
from rlhf.experience import OLD_LOGPROBS, REF_LOGPROBS, Group
from rlhf.generation.build import build_generator
from rlhf.judges.reference import ReferenceJudge
from rlhf.learner.learner import PolicyLearner
from rlhf.models import load
from rlhf.models.load import load_model
from rlhf.models.score import load_score_model, start_score_model

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the 4 bits be on this machine, without the bfloat16 kernels that are why they are refused here."""
    monkeypatch.setattr(load, "check_device", lambda: None)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


FOUR_BITS = {"lora": {"rank": 4, "base": "nf4"}}


@needs_bitsandbytes
@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_published_is_what_the_4_bit_policy_computes(
    tiny_run: Callable[..., RunConfig], sampled_groups: Callable[..., list[Group]], tmp_path: Path, dtype: str
) -> None:
    """The base is really packed and stays as it is; after an update the engine, which has no 4 bits, passes the probe,
    and the saved folder says the same in plain transformers; the adapter off is the base."""
    config = tiny_run(FOUR_BITS, {"dtype": dtype}, {}, {"coef": 0.05})
    learner = PolicyLearner(config, build(config.algorithm), 0, 1, None)
    learner.setup()
    base = learner._engine.policy.base
    packed = {n: p.detach().clone() for n, p in base.named_parameters() if p.dtype == torch.uint8}
    assert sum(name.endswith("base_layer.weight") for name in packed) == 14
    groups = sampled_groups(0, 2, 4, 0, 1.0)
    generator = build_generator(config, "rollout-0", 1)
    generator.setup()
    tolerance = 1e-4 if dtype == "float32" else 0.3
    seen = []
    for _ in range(3):
        weights = learner.publish()
        assert weights is not None and generator.load(weights).probe_abs_max < tolerance
        seen.append(weights.probe.logprobs)
        columns = learner.annotate_share(groups)
        filled = [group.with_columns(column) for group, column in zip(groups, columns, strict=True)]
        learner.update(learner.prepare(filled))
    assert np.abs(seen[2] - seen[0]).max() > 1e-2, "control: it moved"
    after = dict(base.named_parameters())
    assert all(torch.equal(after[name].data, before.data) for name, before in packed.items())
    learner.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert not plain.config.to_dict().get("quantization_config")
    last = learner.publish()
    assert last is not None
    ids = torch.from_numpy(last.probe.token_ids.astype(np.int64))
    with torch.no_grad():
        said = plain(ids[None]).logits[0, :-1].float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    assert np.abs(said.numpy() - last.probe.logprobs).max() < tolerance


@needs_bitsandbytes
@pytest.mark.usefixtures("on_a_cpu")
def test_the_reference_is_the_4_bit_base(
    tiny_run: Callable[..., RunConfig], sampled_groups: Callable[..., list[Group]]
) -> None:
    """Before the first update the learner's own column and the reference's are equal, and not those of 32 bits."""
    config = tiny_run(FOUR_BITS, {"minibatches": 2}, {}, {"coef": 0.05})
    learner = PolicyLearner(config, build(config.algorithm), 0, 1, None)
    learner.setup()
    groups = sampled_groups(0, 2, 2, 0, 1.0)
    judge = ReferenceJudge(tiny_run({}, {}, {}, {}))
    judge.setup()
    for group, filled in zip(groups, learner.annotate_share(groups), strict=True):
        whole = judge.judge(group).tokens[REF_LOGPROBS]
        for own, reference, other in zip(filled.tokens[OLD_LOGPROBS], filled.tokens[REF_LOGPROBS], whole, strict=True):
            np.testing.assert_allclose(own, reference, atol=1e-6)
            assert np.abs(reference - other).max() > 1e-3


@pytest.mark.parametrize(
    ("model", "learner", "named"),
    [
        ({"lora": {"base": "nf4"}}, {"engine": "torch"}, "model.lora.base=nf4: the package bitsandbytes"),
        ({"lora": {"base": "nf4"}}, {"engine": "deepspeed"}, "model.lora.base=nf4: DeepSpeed"),
        ({"attention": "flash_attention_2"}, {"engine": "torch"}, "model.attention=flash_attention_2: the package"),
    ],
)
def test_what_is_not_installed_is_refused_at_once(
    model: dict[str, Any],
    learner: dict[str, Any],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, a remedy, no run directory; where the package is there, as where it is not."""
    monkeypatch.chdir(tmp_path)
    found = importlib.util.find_spec
    absent = ("bitsandbytes", "flash_attn")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    Path("rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    content = {
        "model": {"name": "tiny", **model},
        "algorithm": {"name": "sft"},
        "data": {"path": "rows.jsonl"},
        "loop": {"num_steps": 1, "groups_per_step": 1},
        "learner": learner,
    }
    Path("run.yaml").write_text(yaml.safe_dump(content))
    assert main(["run", "run.yaml", "--in-process", "--run-dir", "out"]) == 2
    shown = capsys.readouterr()
    assert named in shown.out + shown.err and not Path("out").exists()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_log_prob_pass_runs_the_attention_that_was_asked_for(
    tiny_run: Callable[..., RunConfig], tmp_path: Path, attention: str
) -> None:
    """Learner, reference, transformers engine and a reward model, by what their loaded models say of themselves."""
    config = tiny_run({"attention": attention}, {}, {}, {})
    learner = PolicyLearner(config, build(config.algorithm), 0, 1, None)
    learner.setup()
    judge, generator = ReferenceJudge(config), build_generator(config, "rollout-0", 1)
    judge.setup()
    generator.setup()
    start_score_model(config.model, "float32", 0).save_pretrained(tmp_path)
    load.load_tokenizer("tiny", trust_remote_code=False).save_pretrained(tmp_path)
    scores = load_score_model(ModelConfig(name=str(tmp_path), attention=attention), "float32")
    models = [learner._engine.policy.base, judge._model.base, generator._model, scores]
    assert [model.config._attn_implementation for model in models] == [attention] * 4


def test_a_model_that_runs_another_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a part of a model falls back without a word."""
    honest = load.language_model

    class Falling:
        @staticmethod
        def from_pretrained(*arguments: Any, **keywords: Any) -> Any:
            return honest(keywords["config"]).from_pretrained(
                *arguments, **{**keywords, "attn_implementation": "eager"}
            )

    monkeypatch.setattr(load, "language_model", lambda settings: Falling)
    with pytest.raises(BadInput, match=r"model.attention=sdpa: LlamaForCausalLM runs eager instead"):
        load_model(ModelConfig(name="tiny"), "float32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_4_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything starts, whatever is installed; and by the trainer itself, where the cluster file promised one."""
    found, four_bits = importlib.util.find_spec, LoraConfig(base="nf4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found("json" if name == "bitsandbytes" else name))
    config = RunConfig.model_validate(
        {
            "model": {"name": "tiny", "lora": four_bits.model_dump()},
            "algorithm": {"name": "sft"},
            "data": {"path": "unused"},
            "loop": {"num_steps": 1, "groups_per_step": 1},
            "learner": {"engine": "torch"},
        }
    )
    with pytest.raises(BadInput, match=r"trainer\.gpus=0"):
        check_cheaply(config, Cluster())
    with pytest.raises(BadInput, match="needs an NVIDIA GPU, and this process sees none"):
        load_model(ModelConfig(name="tiny", lora=four_bits), "float32")
