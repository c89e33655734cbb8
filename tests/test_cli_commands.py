"""The commands on a real run of three steps: tiny model, transformers, torch, in one process.

Not covered: Ray and vLLM, which have their own tests; `doctor`'s imports of them.
"""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rlhf.cli.doctor import differing_from_lock
from rlhf.cli.main import COMMANDS, main
from rlhf.config_file import load_cluster
from rlhf.metric_names import METRICS
from rlhf.models.resolve import resolve
from rlhf.observers import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (
    "generation.engine=transformers",
    "learner.engine=torch",
    "loop.groups_per_step=2",
    "loop.checkpoint_every=2",
)

pytestmark = pytest.mark.slow

Result = subprocess.CompletedProcess[str]


def rlhf(*words: str, stdin: str = "") -> Result:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rlhf.cli.main", *words]
    return subprocess.run(command, env=environment, input=stdin, capture_output=True, text=True, check=False)


def train(run_dir: Path, *more: str) -> Result:
    config = str(ROOT / "configs" / "rloo_tiny.yaml")
    return rlhf("run", config, *SETTINGS, "data.heldout=2", *more, "--in-process", "--run-dir", str(run_dir))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps. Tests must not change it: `copy` is for those that do."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    result = train(run_dir, "loop.num_steps=3")
    assert result.returncode == 0, result.stderr
    assert "step 3/3" in result.stdout and "done: report in" in result.stdout
    return run_dir


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_help_and_unknown_commands() -> None:
    result = rlhf("--help")
    assert result.returncode == 0 and all(command in result.stdout for command in COMMANDS)
    assert rlhf("fly").returncode == 2
    assert rlhf("run").returncode == 2
    for command in COMMANDS:
        assert rlhf(command, "--help").returncode == 0


def test_run_directory_is_complete(finished: Path) -> None:
    for name in ("config.yaml", "cluster.yaml", "metrics.jsonl", "experience.db", "report.html", "evaluations.jsonl"):
        assert (finished / name).stat().st_size > 0
    assert list((finished / "tensorboard").iterdir())
    assert [row["step"] for row in read_jsonl(finished / "evaluations.jsonl")] == [0, 3]


def test_without_a_cluster_file_each_model_may_use_the_whole_machine(finished: Path) -> None:
    cluster = load_cluster(finished / "cluster.yaml", [])
    assert cluster.threads_of(cluster.trainer) == cluster.threads_of(cluster.rollout) == os.cpu_count()


def test_metrics_are_documented(finished: Path) -> None:
    rows = read_jsonl(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert set().union(*rows) <= METRICS.keys()


def test_inspect_and_verify(finished: Path) -> None:
    state = json.loads(rlhf("inspect", str(finished), "--json").stdout)
    assert (state["steps_trained"], state["experience"]["counts"]["trained"]) == (3, 6)
    assert "3 of 3 steps trained" in rlhf("inspect", str(finished)).stdout
    result = rlhf("verify", str(finished), "--json")
    found = json.loads(result.stdout)
    assert result.returncode == 0 and found["ok"] and found["problems"] == []
    assert found["ledger"]["trained"] == 6 and found["ledger"]["lost"] == found["ledger"]["duplicated"] == 0
    assert rlhf("inspect", str(finished.parent)).returncode == 2
    assert rlhf("verify", str(finished.parent)).returncode == 2


def test_verify_finds_a_flipped_byte_in_a_checkpoint(copy: Path) -> None:
    file = next((copy / "checkpoints").glob("*/policy/model.safetensors"))
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    result = rlhf("verify", str(copy))
    assert result.returncode == 1 and "model.safetensors" in result.stdout and "checksum differs" in result.stdout


def test_a_terminal_that_lacks_a_character_gets_another(finished: Path) -> None:
    """The ± of an evaluation; where it can be shown, it is."""
    for encoding, shown in (("ascii", "?"), ("utf-8", "±")):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        command = [sys.executable, "-m", "rlhf.cli.main", "inspect", str(finished)]
        result = subprocess.run(command, env=environment, capture_output=True, encoding=encoding, check=False)
        assert result.returncode == 0 and f" {shown} " in result.stdout, result.stderr


@pytest.mark.parametrize(("unbuffered", "code"), [("", 0), ("1", 141)])
@pytest.mark.parametrize("words", [["inspect"], ["--help"]])
def test_a_closed_pipe_is_no_error(finished: Path, words: list[str], unbuffered: str, code: int) -> None:
    """With a buffer the command is done when it is noticed, without one it is not. argparse passes over it."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "rlhf.cli.main", *words, *([str(finished)] if words == ["inspect"] else [])]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert result.stderr == "" and result.returncode == (code if words == ["inspect"] else 0)


def test_replay_gives_the_recorded_weights_and_notices_others(copy: Path) -> None:
    result = rlhf("replay", str(copy), "--step", "1")
    assert result.returncode == 0 and "bit for bit" in result.stdout, result.stdout + result.stderr
    assert rlhf("replay", str(copy), "--step", "3").returncode == 2
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("epochs: 1", "epochs: 3"))
    control = rlhf("replay", str(copy), "--step", "1")
    assert control.returncode == 1 and "the weights differ" in control.stdout


def test_export_of_policy_and_experience(finished: Path, tmp_path: Path) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert rlhf("export", str(finished), "--to", str(tmp_path / "policy")).returncode == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    AutoTokenizer.from_pretrained(tmp_path / "policy")
    again = rlhf("export", str(finished), "--to", str(tmp_path / "policy"))
    assert again.returncode == 2 and "exists already" in again.stderr
    assert rlhf("export", str(finished), "--to", str(tmp_path / "data"), "--what", "experience").returncode == 0
    rows = load_dataset(str(tmp_path / "data"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 24 and sorted(set(rows["step"])) == [0, 1, 2]


def test_chat_answers_each_line_of_a_pipe(finished: Path) -> None:
    words = ("chat", str(finished), "--max-new-tokens", "3", "--temperature", "1")
    first, second = (rlhf(*words, stdin="hello\nand then?\n") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout and first.stdout == second.stdout  # the same seed says the same


def chat(monkeypatch: pytest.MonkeyPatch, words: bytes, errors: str = "strict") -> int:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(words), encoding="utf-8", errors=errors))
    return main(["chat", "tiny", "--max-new-tokens", "3"])


def test_chat_passes_over_empty_lines_of_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for words in (b"hello\nand then?\n", b"\nhello\n \n\nand then?"):
        assert chat(monkeypatch, words) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].count("\n") >= 2


def test_chat_refuses_a_line_that_the_model_cannot_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """1024 positions. The lines around it are answered as if it had not been there."""
    assert chat(monkeypatch, b"hello\nand then?\n") == 0
    alone = capsys.readouterr().out
    assert chat(monkeypatch, b"hello\n" + b"z" * 2000 + b"\nand then?\n") == 2
    with_it = capsys.readouterr()
    assert with_it.out == alone
    assert "this turn is not answered" in with_it.err and "the model has 1024 positions" in with_it.err
    assert chat(monkeypatch, b"z" * 990) == 0  # the template takes a few; the answer ends at the last position


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_chat_refuses_bytes_that_are_no_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], errors: str
) -> None:
    """surrogateescape is how Python reads where no language is set."""
    assert chat(monkeypatch, b"caf\xe9\n", errors) == 2
    assert "standard input: a line is not text in utf-8" in capsys.readouterr().err


def test_chat_refuses_a_model_that_diverged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(resolve("tiny"), broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in sorted(tensors) if "norm" in name)
    tensors[name][0] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert main(["chat", str(broken)]) == 2
    assert f"values that are no finite numbers, first in {name}" in capsys.readouterr().err


def test_going_on_keeps_history_and_fresh_moves_it_aside(copy: Path) -> None:
    before = (copy / "metrics.jsonl").read_text()
    result = train(copy, "loop.num_steps=4")
    assert result.returncode == 0 and "goes on at step 3" in result.stdout, result.stdout + result.stderr
    assert (copy / "metrics.jsonl").read_text().startswith(before)
    assert [row["step"] for row in read_jsonl(copy / "metrics.jsonl")] == [0, 1, 2, 3]
    refused = train(copy, "loop.num_steps=4", "seed=1")
    assert refused.returncode == 2 and "seed was 0, now 1" in refused.stderr
    fresh = train(copy, "loop.num_steps=1", "seed=1", "--fresh")
    assert fresh.returncode == 0, fresh.stderr
    assert len(read_jsonl(copy / "metrics.jsonl")) == 1
    assert len(read_jsonl(copy.with_name("run.old-1") / "metrics.jsonl")) == 4


def test_failure_of_the_reward_function_is_exit_code_4(tmp_path: Path) -> None:
    """With the user's own traceback, and a report that says so."""
    (tmp_path / "bad.py").write_text("def score(prompts, completions, **columns):\n    raise KeyError('colour')\n")
    result = train(tmp_path / "run", "loop.num_steps=1", f"reward.function={tmp_path / 'bad.py'}:score")
    assert result.returncode == 4, result.stdout + result.stderr
    assert "KeyError: 'colour'" in result.stderr and "failed:" in result.stdout


@pytest.mark.parametrize("line", ["no-such-package==1.0", "numpy==0.0.1"])
def test_doctor_compares_with_the_lock(line: str) -> None:
    from importlib.metadata import version

    (found,) = differing_from_lock(f"# comment\n{line}\nnumpy=={version('numpy')}\n-r other.txt\n")
    assert found.startswith(line.partition("==")[0])
