"""Bad input through the real command line: exit code 2, a message that names the place, and nothing left behind.

The time of each refusal is printed (pytest -s), not asserted. Not covered: a hub that cannot be reached.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Refuse = Callable[..., str]


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """A run file that would run, on three prompts."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Count to {n}."}) + "\n" for n in range(3)))
    (tmp_path / "reward.py").write_text(
        "def score(prompts, completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    return {
        "model": {"name": "tiny"},
        "algorithm": {"name": "rloo"},
        "data": {"path": "prompts.jsonl"},
        "loop": {"num_steps": 1, "groups_per_step": 2},
        "generation": {"engine": "transformers", "max_new_tokens": 4},
        "learner": {"engine": "torch"},
        "reward": {"function": "reward.py:score"},
    }


@pytest.fixture
def refuse(tmp_path: Path) -> Refuse:
    """Runs `rlhf run`, asserts exit code 2 without a traceback or a run directory, and returns the message."""

    def call(content: object, *arguments: str) -> str:
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        (tmp_path / "run.yaml").write_text(text)
        command = [sys.executable, "-m", "rlhf.cli.main", "run", "run.yaml", *arguments, "--in-process"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        began = time.monotonic()
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        print(f"refused after {time.monotonic() - began:.1f} s: {result.stderr.strip()}")
        assert result.returncode == 2, result.stdout + result.stderr
        assert result.stderr.startswith("rlhf: ")  # not with a traceback of ours
        assert not (tmp_path / "runs").exists()
        return result.stderr

    return call


def test_unknown_key(refuse: Refuse, content: dict[str, Any]) -> None:
    content["learner"]["learning_rte"] = 1
    assert "run.yaml: unknown key learner.learning_rte; did you mean learner.lr?" in refuse(content)


def test_wrong_type(refuse: Refuse, content: dict[str, Any]) -> None:
    content["loop"]["num_steps"] = "many"
    assert "run.yaml: loop.num_steps: found 'many' (text); expected integer" in refuse(content)


def test_override_without_value(refuse: Refuse, content: dict[str, Any]) -> None:
    assert "override 'learner.lr': expected key.sub=value" in refuse(content, "learner.lr")


def test_rloo_with_one_sample(refuse: Refuse, content: dict[str, Any]) -> None:
    message = refuse(content, "algorithm.samples_per_prompt=1")
    assert "samples_per_prompt must be at least 2" in message


def test_broken_yaml(refuse: Refuse) -> None:
    message = refuse("model: {name: tiny\nseed: 0\n")
    assert "run.yaml, line 2" in message and "not valid YAML" in message


def test_yaml_that_is_a_list(refuse: Refuse) -> None:
    assert "run.yaml: found a list at the top" in refuse("- seed\n- 0\n")


def test_missing_run_file_and_missing_data(refuse: Refuse, content: dict[str, Any]) -> None:
    assert "data.path=nowhere.jsonl: no such file or folder" in refuse(content, "data.path=nowhere.jsonl")
    assert "none.yaml: no such file" in refuse(content, "--cluster", "none.yaml")


def test_empty_data_set(refuse: Refuse, content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    message = refuse(content, "data.path=empty.jsonl")
    assert "empty.jsonl: the data set is empty" in message


def test_row_without_the_prompt_column(refuse: Refuse, content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    message = refuse(content)
    assert "prompts.jsonl:2: no column 'prompt' (data.prompt_column); columns there: question" in message


def test_line_that_is_no_json(refuse: Refuse, content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": \n')
    assert "prompts.jsonl:3: not a JSON object" in refuse(content)


def test_prompt_over_the_limit(refuse: Refuse, content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "word " * 99}) + "\n")
    message = refuse(content, "data.too_long=refuse", "data.max_prompt_tokens=32")
    assert "1 of 2 prompts are longer than data.max_prompt_tokens=32" in message
    assert "prompts.jsonl:2 has" in message


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("nowhere.py:score", "nowhere.py"),
        ("reward.py:scores", "scores"),
        ("no_such_package.module:score", "no_such_package"),
        ("broken.py:score", "broken.py"),
        ("reward.py", "reward.py"),
    ],
)
def test_reward_function_that_cannot_be_imported(
    refuse: Refuse, content: dict[str, Any], tmp_path: Path, function: str, expected: str
) -> None:
    (tmp_path / "broken.py").write_text("def score(:\n")
    content["reward"]["function"] = function
    message = refuse(content)
    assert "reward.function" in message and expected in message


def test_model_folder_with_a_missing_shard(refuse: Refuse, content: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00002.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    message = refuse(content, "model.name=./model")
    assert "model-00002-of-00002.safetensors" in message


def test_a_run_directory_with_another_run(refuse: Refuse, content: dict[str, Any], tmp_path: Path) -> None:
    """The keys that differ are named with both values."""
    from rlhf.config_file import dump, load_run

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "old").mkdir()
    old = load_run(tmp_path / "run.yaml", [f"data.path={tmp_path / 'prompts.jsonl'}"])
    (tmp_path / "old" / "config.yaml").write_text(dump(old))
    message = refuse(content, "seed=5", "learner.lr=0.5", "loop.num_steps=7", "--run-dir", "old")
    assert "seed was 0, now 5" in message and "learner.lr was 1e-06, now 0.5" in message
    assert "num_steps" not in message
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    assert "foreign: holds thesis.tex but no config.yaml" in refuse(content, "--run-dir", "foreign")
