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
    (tmp_path / "itself.yaml").symlink_to(tmp_path / "itself.yaml")
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
        (["plan", "run.yaml", "data.path=~nouser/x"], "'~nouser/x': there is no such home folder"),
        (["plan", "run.yaml", "model.name=~nouser/x"], "'~nouser/x': there is no such home folder"),
        (["plan", "run.yaml", "reward.function=~nouser/r.py:f"], "'~nouser/r.py': there is no such home folder"),
        (["plan", "run.yaml", 'data.path="a\\0b"'], "holds a NUL character"),
        (["plan", "file/run.yaml"], "'file/run.yaml': cannot be read: Not a directory; expected a YAML file"),
        (["plan", "itself.yaml"], "'itself.yaml': cannot be read: Too many levels of symbolic links"),
        (["plan", "a\0b"], "cannot be read: embedded null byte"),
        (["plan", "run.yaml", "a\udcff=1"], "has half a character"),
        (["plan", "run.yaml", ".".join("a" * 300) + "=1"], "nested too deeply"),
        (["plan", "x" * 300], f"'{'x' * 200}': cannot be read: File name too long"),
        (["inspect", "x" * 300], "File name too long; expected the name of a file"),
        (["verify", "x" * 300], "File name too long; expected the name of a file"),
        (["chat", "x" * 300], "File name too long; expected the name of a file"),
        (["chat", "~nouser/x"], "there is no such home folder"),
        (["data", "show", "x" * 300], "File name too long; expected the name of a file"),
        (["plan", "run.yaml", "learner.adam_betas=[0.9]"], "found [0.9] (list); expected a value at place 2, too"),
        (["plan", "run.yaml", "learner.adam_betas=[]"], "learner.adam_betas: found [] (list); expected a value at"),
        (
            ["plan", "run.yaml", "learner.adam_betas=[0.9, 1.0]"],
            "found 1.0 (number); expected less than 1",
        ),
        (
            ["plan", "run.yaml", "reward={llm: {address: 'http://a/v1', model: m, score_range: [1]}}"],
            "score_range: found [1] (list); expected a value at place 2, too",
        ),
        (["plan", "run.yaml", "loop.wait_timeout_s=1e10"], "expected less than or equal to 31536000"),
        (["plan", "run.yaml", "reward.timeout_s=1e10"], "expected less than or equal to 31536000"),
        (["plan", "run.yaml", "learner.threads=9999999999"], "expected less than or equal to 4096"),
        (["plan", "run.yaml", "learner.warmup_steps=" + "9" * 400], "a whole number of 400 digits is too large"),
        (["plan", "run.yaml", "seed=" + "9" * 5000], "a whole number of 5000 digits is too large"),
        (["plan", "run.yaml", "evaluation.temperature=1e-300"], "engines sample at 0.01 or more; expected that, or 0"),
        (["chat", "tiny", "--temperature", "nan"], "--temperature nan: expected 0 (greedy), or 0.01 to 100"),
        (["chat", "tiny", "--temperature", "1e-300"], "--temperature 1e-300: expected 0 (greedy), or 0.01 to 100"),
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
