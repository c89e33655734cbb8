"""`rlhf run` with a reward model: in one process, and what is refused before anything starts.

Not covered: the same on Ray, where the judge is hosted like a reward function.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.cli.main import main
from rlhf.config import ModelConfig
from rlhf.models.load import load_tokenizer
from rlhf.models.score import start_score_model

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """A run file that names the reward model beside it."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Count to {n}."}) + "\n" for n in range(6)))
    model = start_score_model(ModelConfig(name="tiny"), "float32", 0)
    model.save_pretrained(tmp_path / "judge")
    load_tokenizer("tiny", trust_remote_code=False).save_pretrained(tmp_path / "judge")
    return {
        "model": {"name": "tiny"},
        "algorithm": {"name": "rloo", "samples_per_prompt": 2, "kl": {"coef": 0.0}},
        "data": {"path": "prompts.jsonl", "heldout": 1},
        "loop": {"num_steps": 1, "groups_per_step": 2},
        "generation": {"engine": "transformers", "max_new_tokens": 4},
        "learner": {"engine": "torch"},
        "reward": {"model": "./judge"},
    }


def run(folder: Path, content: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return subprocess.run(
        [sys.executable, "-m", "rlhf.cli.main", "run", "run.yaml", "--in-process", "--run-dir", "out"],
        cwd=folder, capture_output=True, text=True, timeout=240, check=False, env=dict(os.environ),
    )  # fmt: skip


def test_a_run_is_rewarded_by_a_model(content: dict[str, Any], tmp_path: Path) -> None:
    """One step, rewarded and evaluated by the folder beside the run file."""
    finished = run(tmp_path, content)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    (step,) = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert step["reward/std"] > 0 and step["faults/unscorable"] == 0


def test_an_exported_reward_model_is_read_at_the_eos_by_transformers(tmp_path: Path) -> None:
    """transformers reads at the last token that is not the padding id. The tiny model pads with its EOS: exported like
    that, others would read scores one token too early. The reference is the head on the state of the EOS."""
    settings = ["loop.num_steps=1", "learner.engine=torch", "--in-process", "--run-dir", str(tmp_path / "run")]
    assert main(["run", str(CONFIGS / "reward_model_tiny.yaml"), *settings]) == 0
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "judge")]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "judge", padding_side="right")
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id == model.config.eos_token_id
    texts = [text + tokenizer.eos_token for text in ("one", "two, and somewhat longer", "three")]
    with torch.no_grad():
        batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        together = model(**batch).logits[:, 0]
        for text, score in zip(texts, together, strict=True):
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            states = model.base_model(input_ids=ids).last_hidden_state
            assert float(score) == pytest.approx(float(model.score(states[0, -1])), abs=1e-5)
            assert abs(float(score) - float(model.score(states[0, -2]))) > 1e-3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"reward": {"model": "tiny"}}, "reward.model: tiny is a language model"),
        ({"reward": {"model": "./nowhere"}}, "reward.model"),
        ({"reward": {"model": "./judge", "timeout_s": 3}}, "timeout_s would do nothing"),
        ({"reward": {}}, "exactly one of function, model, server, llm and ranker says what is good; none is set"),
    ],
)
def test_bad_input_is_refused(content: dict[str, Any], tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    """Exit code 2, a message with the key, no run directory."""
    refused = run(tmp_path, content | changes)
    assert refused.returncode == 2 and named in refused.stdout + refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("where", "heldout", "code", "said"),
    [
        ("all", 1, 2, "reward.model: the score of LlamaForSequenceClassification is nan: its weights are broken"),
        ("eos", 1, 4, "evaluation after 0 steps: none of 1 held-out answers could be scored"),
        ("eos", 0, 4, "8 groups in a row could not be judged"),
    ],
)
def test_a_reward_model_that_says_nan_only_ends_the_run(
    content: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    where: str,
    heldout: int,
    code: int,
    said: str,
) -> None:
    """NaN weights, and NaN for the token at which every answer is scored: named, and no 0 is trained on."""
    model = start_score_model(ModelConfig(name="tiny"), "float32", 0)
    rows = slice(None) if where == "all" else slice(1, 2)  # the EOS
    model.get_input_embeddings().weight.data[rows] = float("nan")
    model.save_pretrained(tmp_path / "judge")
    content["data"]["heldout"] = heldout
    content["data"]["path"], content["reward"]["model"] = str(tmp_path / "prompts.jsonl"), str(tmp_path / "judge")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    found = main(["run", str(tmp_path / "run.yaml"), "--in-process", "--run-dir", str(tmp_path / "out")])
    shown = capsys.readouterr().err
    assert (found, said in shown) == (code, True), shown
    assert not (tmp_path / "out" / "metrics.jsonl").exists() or not (tmp_path / "out" / "metrics.jsonl").read_text()
    if heldout == 0:
        assert "gave a score that is not finite for 2, and 0 do not fit in it" in shown
