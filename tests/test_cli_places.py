"""Places, numbers and variables that no run can work with: refused with the option that named them, in this process."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.cli.disk import DiskFull, names_a_full_disk
from rlhf.cli.exit_codes import BAD_INPUT
from rlhf.cli.folders import writing
from rlhf.cli.main import main
from rlhf.cli.preflight import check_cheaply
from rlhf.cli.run_directory import settled
from rlhf.cluster import Cluster
from rlhf.config import RunConfig
from rlhf.config_file import dump
from rlhf.errors import BadInput, RunFailed

SECTIONS = {
    "model": {"name": "tiny"},
    "algorithm": {"name": "rloo"},
    "data": {"path": "prompts.jsonl"},
    "loop": {"num_steps": 1, "groups_per_step": 2},
    "generation": {"max_new_tokens": 4},
    "learner": {"engine": "torch"},
    "reward": {"function": "reward.py:score"},
}


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    (tmp_path / "reward.py").write_text("def score(prompts, completions):\n    return [0.0] * len(completions)\n")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(SECTIONS))
    (tmp_path / "file").touch()
    return tmp_path / "run.yaml"


@pytest.mark.parametrize("place", ["file/below", "x" * 300])
def test_a_run_directory_that_cannot_be_made(run_file: Path, place: str) -> None:
    config = RunConfig.model_validate(SECTIONS)
    with pytest.raises(BadInput, match=rf"^--run-dir {place}: cannot be written: (Not a directory|File name too long)"):
        settled(Path(place), config, Cluster(), "training", fresh=False).__enter__()


def test_a_run_is_not_put_inside_another(tmp_path: Path) -> None:
    """Control: a folder with a config.yaml of somebody's own is no run."""
    config = RunConfig.model_validate(SECTIONS)
    (tmp_path / "config.yaml").write_text(dump(config))
    with settled(tmp_path / "runs" / "a", config, Cluster(), "training", fresh=False):
        pass
    (tmp_path / "experience.db").touch()
    with pytest.raises(BadInput, match=f"is inside another run, {tmp_path}; expected a folder outside"):
        settled(tmp_path / "checkpoints" / "b", config, Cluster(), "training", fresh=False).__enter__()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data", "split", "prompts.jsonl", "--to", "file/x", "--heldout", "1"], "--to file/x: cannot be written"),
        (["plan", "run.yaml", "--network-gbit", "nan"], "--network-gbit nan: expected a speed above 0"),
        (["plan", "run.yaml", "--network-gbit", "inf"], "--network-gbit inf: expected a speed above 0"),
        (["plan", "run.yaml", "data.path=" + "x" * 5000], "cannot be looked for: File name too long"),
        (["plan", "run.yaml", "generation.temperature=0.001"], "found 0.001 (number); expected greater than or equal"),
        (["plan", "run.yaml", "algorithm.lam=0.5"], "algorithm.lam is a key of other kinds of algorithm only"),
        (["plan", "run.yaml", 'data.system_prompt="\\ud83d"'], "has half a character"),
        (["chat", "tiny", "--temperature", "nan"], "--temperature nan: expected a number of 0 (greedy) or more"),
        (["chat", "tiny", "--max-new-tokens", "0"], "--max-new-tokens 0: expected 1 or more"),
        (["chat", "tiny", "--seed", "-1"], "--seed -1: expected a whole number"),
    ],
)
def test_refused_at_once(run_file: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert main(words) == BAD_INPUT
    assert said in capsys.readouterr().err


def test_a_full_disk_is_no_bad_input(tmp_path: Path) -> None:
    """And bad input is no full disk, also where nothing can ever be stored, as in /proc."""
    with pytest.raises(RunFailed, match="make room"), writing("--to", tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    proc = Path("/proc")
    with pytest.raises(BadInput, match="Permission denied"), names_a_full_disk(proc), writing("--run-dir", proc):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    with pytest.raises(DiskFull), names_a_full_disk(proc):
        raise ValueError("a library's own words") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_variable_that_would_replace_a_key(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM reads it before what it is given. The transformers engine has no such memory."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    sections: dict[str, Any] = SECTIONS | {"reward": {"function": f"{run_file.parent / 'reward.py'}:score"}}
    with pytest.raises(
        BadInput, match=r"VLLM_CPU_KVCACHE_SPACE=4, which vLLM takes in place of generation.cache_gib=1"
    ):
        check_cheaply(RunConfig.model_validate(sections), Cluster())
    sections["generation"] = {"max_new_tokens": 4, "engine": "transformers"}
    check_cheaply(RunConfig.model_validate(sections), Cluster())
