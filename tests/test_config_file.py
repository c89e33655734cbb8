"""Run and cluster files: what is accepted, and what each fault's message names.

Not covered: files of other encodings than UTF-8 beyond the refusal.
"""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, SecretStr

from rlhf.cli.exit_codes import BAD_INPUT
from rlhf.cli.main import main
from rlhf.cluster import Cluster
from rlhf.config import RunConfig
from rlhf.config_file import differing_keys, dump, load_cluster, load_run
from rlhf.config_keys import all_keys, nearest
from rlhf.errors import BadInput
from rlhf.yaml_reader import parse
from rlhf.yaml_reader import write as dumped

ROOT = Path(__file__).resolve().parent.parent

MINIMAL: dict[str, Any] = {
    "model": {"name": "tiny"},
    "algorithm": {"name": "rloo"},
    "data": {"path": "prompts.jsonl"},
    "loop": {"num_steps": 2, "groups_per_step": 4},
    "generation": {"max_new_tokens": 8},
    "reward": {"function": "json:dumps"},
}


def write(folder: Path, content: object) -> Path:
    path = folder / "run.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(BadInput) as caught:
        load_run(path, overrides)
    return str(caught.value)


def test_defaults_and_overrides_are_applied(tmp_path: Path) -> None:
    """Values of overrides are YAML: numbers in any notation, null, lists and whole sections."""
    overrides = [
        "learner.lr=1e-5",
        "learner.adam_betas=[0.8, 0.95]",
        "model.lora={rank: 4}",
        "data.limit=null",
        "seed=7",
    ]
    config = load_run(write(tmp_path, MINIMAL), overrides)
    assert (config.learner.lr, config.learner.adam_betas, config.seed) == (1e-5, (0.8, 0.95), 7)
    assert config.model.lora is not None and (config.model.lora.rank, config.model.lora.alpha) == (4, 32)
    assert config.generation is not None and config.generation.temperature == 1.0
    assert config.data.limit is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learner.lrr=1", "did you mean learner.lr?"),
        ("learner.learning_rte=1", "did you mean learner.lr?"),
        ("num_steps=3", "did you mean loop.num_steps?"),
        ("generation.temprature=1", "did you mean generation.temperature?"),
        ("algorithm.kl.coeff=1", "did you mean algorithm.kl.coef?"),
        ("algorithm.beta=1", "did you mean algorithm.kl.coef?"),
        ("lerner={}", "did you mean learner?"),
        ("qqqq=1", "keys there: seed, model"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path: Path, override: str, expected: str) -> None:
    message = refusal(write(tmp_path, MINIMAL), override)
    assert f"override '{override}': unknown key {override.partition('=')[0]}" in message
    assert expected in message


@pytest.mark.parametrize(
    ("override", "key", "found", "expected"),
    [
        ("learner.lr=fast", "learner.lr", "'fast'", "number"),
        ("seed='5'", "seed", "'5'", "integer"),
        ("seed=true", "seed", "True", "integer"),
        ("seed=1.5", "seed", "1.5", "integer"),
        ("seed={x: 1}", "seed", "{'x': 1}", "integer"),
        ("data.shuffle=1", "data.shuffle", "1", "boolean"),
        ("loop=3", "loop", "3", "keys with values"),
        ("model.lora.target_modules=3", "model.lora.target_modules", "3", "list or 'all-linear'"),
        ("generation.engine=sglang", "generation.engine", "'sglang'", "'vllm' or 'transformers'"),
        ("generation.temperature=-1", "generation.temperature", "-1", "greater than or equal to 0.01"),
        ("learner.lr=.nan", "learner.lr", "nan", "number"),
        ("algorithm.name=foo", "algorithm.name", "'foo'", "'rloo', 'reinforce'"),
        ("data.path=null", "data.path", "None", "string"),
    ],
)
def test_wrong_value_names_key_found_and_expected(
    tmp_path: Path, override: str, key: str, found: str, expected: str
) -> None:
    """No type is guessed from another: text is no number, true no 1."""
    message = refusal(write(tmp_path, MINIMAL), override)
    line = next(line for line in message.splitlines() if f"{key}: found" in line)
    assert line.startswith(f"override '{override}'") and found in line and expected in line


def test_every_fault_has_its_own_line(tmp_path: Path) -> None:
    content = {**MINIMAL, "loop": {"groups_per_step": "x", "foo_bar_baz": 1}, "generation": {}}
    lines = refusal(write(tmp_path, content)).splitlines()
    assert len(lines) == 4
    assert all(str(tmp_path / "run.yaml") in line for line in lines)
    assert sum("missing required key" in line for line in lines) == 2
    assert any("generation.max_new_tokens" in line for line in lines)


def test_checks_across_keys(tmp_path: Path) -> None:
    """Combinations that would be meaningless are refused with the reason."""
    path = write(tmp_path, MINIMAL)
    assert "algorithm: samples_per_prompt must be at least 2" in refusal(path, "algorithm.samples_per_prompt=1")
    for key, value in (("top_p", "0.9"), ("top_k", "40")):  # trap 6: each by itself
        (line,) = refusal(path, f"generation.{key}={value}").splitlines()
        assert f"generation: {key} " in line and "biases every importance ratio" in line
    assert "zero_stage is DeepSpeed's" in refusal(path, "learner.engine=torch", "learner.zero_stage=3")
    assert "learner.minibatches=99 is more than" in refusal(path, "learner.minibatches=99")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("seed: 1\nseed: 2\n", "line 2, column 1: not valid YAML: key 'seed' stands twice, first in line 1"),
        ("model:\n  name: a\n  name: b\n", "line 3, column 3: not valid YAML: key 'name' stands twice"),
        ("seed: [1\n", "not valid YAML"),
        ("- 1\n- 2\n", "found a list at the top"),
        ("", "found nothing at the top"),
        ("? [a]\n: 1\n", "a key must be a plain word"),
        ("seed: 1\n3: 2\n", "line 2, column 1: not valid YAML: a key must be text, found 3; one that is meant so"),
        ("reward: {parts: {yes: {weight: 1}}}\n", "a key must be text, found yes"),
        ("seed: &a [*a]\n", "more than 100,000 values; expected fewer, and no alias (*name) that contains itself"),
        ("model: &a {name: tiny, lora: *a}\n", "no alias (*name) that contains itself"),
        (
            "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(
                f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
            ),
            "more than 100,000 values",
        ),
        ("seed: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("{a: " * 300 + "1" + "}" * 300, "nested too deeply; expected keys with values, at most 50 levels deep"),
        ('{"\\ud83d": 1}', "'\\ud83d' has half a character"),
        ('{data: {path: "x \\ude00\\ud83d"}}', "has half a character"),
        ("seed: " + "9" * 5000, "line 1, column 7: not valid YAML: a whole number of 5000 digits is too large"),
        ("seed: 0x" + "f" * 5000, "a whole number of 5002 digits is too large; expected at most"),
        ("seed: " + "9" * 19, "a whole number of 19 digits is too large"),
        ("seed: !!python/object:os.system 1\n", "not valid YAML"),
    ],
)
def test_broken_yaml_names_the_line(tmp_path: Path, content: str, expected: str) -> None:
    message = refusal(write(tmp_path, content))
    assert message.startswith(str(tmp_path / "run.yaml")) and expected in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.yaml")
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xff\n")
    assert "UTF-8" in refusal(tmp_path / "latin.yaml")


@pytest.mark.parametrize("override", ["learner.lr", "=3", "a..b=1", ".a=1"])
def test_malformed_override(tmp_path: Path, override: str) -> None:
    assert f"override '{override}': expected key.sub=value" in refusal(write(tmp_path, MINIMAL), override)


def test_override_below_a_plain_value(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, {**MINIMAL, "seed": 3}), "seed.x=1")
    assert message == "override 'seed.x=1': seed is 3, which has no keys below it"


def test_paths_are_taken_from_here_then_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What exists in both places is taken from the current directory; what exists in neither is left alone."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "both.jsonl").touch()
    (there / "reward.py").touch()
    monkeypatch.chdir(here)
    content = {**MINIMAL, "data": {"path": "both.jsonl"}, "reward": {"function": "reward.py:score"}}
    config = load_run(write(there, content), [])
    assert config.data.path == str(here / "both.jsonl")
    assert config.reward is not None and config.reward.function == f"{there / 'reward.py'}:score"
    (here / "both.jsonl").unlink()
    assert load_run(there / "run.yaml", []).data.path == str(there / "both.jsonl")
    assert load_run(there / "run.yaml", ["data.path=owner/name"]).data.path == "owner/name"
    assert load_run(there / "run.yaml", ["reward.function=json:dumps"]).reward.function == "json:dumps"


def test_resolved_file_reads_back_to_the_same_config(tmp_path: Path) -> None:
    overrides = ["learner.lr=1e-7", "model.lora={}", "learner.adam_betas=[0.5, 0.9]"]
    config = load_run(write(tmp_path, MINIMAL), overrides)
    (tmp_path / "resolved.yaml").write_text(dump(config))
    assert load_run(tmp_path / "resolved.yaml", []) == config


def test_an_override_below_an_alias_changes_its_own_section_alone(tmp_path: Path) -> None:
    text = yaml.safe_dump({key: value for key, value in MINIMAL.items() if key != "data"})
    text += "data: &d {path: a.jsonl}\nmix: {data: *d, rows_per_step: 1}\n"
    config = load_run(write(tmp_path, text), ["data.limit=3"])
    assert config.mix is not None and (config.data.limit, config.mix.data.limit) == (3, None)


def test_a_key_that_stands_twice_on_the_command_line_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(tmp_path, MINIMAL))
    assert main(["plan", path, "seed=1", "--json", "seed=2"]) == BAD_INPUT
    assert "override 'seed=2': key seed stands twice, first as 'seed=1'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("-010", -10), ("0o10", 8), ("0x1F", 31), ("0b11", 3), ("1_000", 1000), ("1e-5", 1e-5), ("08", 8),
        ("1.5", 1.5), (".5", 0.5), ("-1.e3", -1000.0), ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("1.2.3", "1.2.3"),
    ],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(text: str, value: object) -> None:
    """Neither octal by a zero in front nor base 60."""
    found = parse(f"key: {text}", "here")["key"]
    assert found == value and type(found) is type(value)


def test_base_60_is_no_number(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, MINIMAL), "loop.num_steps=1:30")
    assert "override 'loop.num_steps=1:30': loop.num_steps: found '1:30' (text); expected integer" in message


PIECES = [
    *"0123456789", "1e5", "0o7", "0x", "_", ":", ".", "-", "+", "e", "inf", "nan", "~", "null", "yes", " ", "\t", "\n",
    "\r", "#",
    "&", "*", "!", "|", ">", "'", '"', "%", "@", "`", "{", "}", "[", "]", ",", "?", "<<", "=", "\\", "\0", "\x07",
    "\x85", "\u2028", "\u2029", "\ufeff", "\xa0", "ä", "\N{GRINNING FACE}", "\U0010ffff", "word", "---", "2024-01-01",
]  # fmt: skip


def test_whatever_text_is_written_reads_back_equal(tmp_path: Path) -> None:
    """Texts drawn from pieces that mean something to YAML, alone and as keys; and through a whole cluster file."""
    draw = random.Random(0)
    texts = [*PIECES, *("".join(draw.choices(PIECES, k=draw.randint(2, 6))) for _ in range(3000)), "long words " * 40]
    for text in texts:
        value = {"a": text, text: [text, {text: 1}]}
        assert parse(dumped(value), "here") == value, repr(text)
    cluster = Cluster.model_validate({"trainer": {"resources": dict.fromkeys(PIECES, 1.0)}})
    (tmp_path / "cluster.yaml").write_text(dump(cluster), encoding="utf-8", newline="")
    assert load_cluster(tmp_path / "cluster.yaml", []) == cluster


def test_halves_of_one_character_become_it(tmp_path: Path) -> None:
    """As json.dumps writes what is beyond the basic plane."""
    path = write(tmp_path, json.dumps({**MINIMAL, "data": {"path": "a.jsonl", "split": "\N{GRINNING FACE}"}}))
    assert "\\ud83d" in path.read_text() and load_run(path, []).data.split == "\N{GRINNING FACE}"


def test_secrets_are_not_written() -> None:
    class WithSecret(BaseModel):
        token: SecretStr

    assert "hunter2" not in dump(WithSecret(token=SecretStr("hunter2")))


def test_differing_keys_are_found_at_any_depth(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    old, new = load_run(path, []), load_run(path, ["loop.num_steps=9", "algorithm.kl.coef=0", "model.lora={}"])
    assert differing_keys(old, new) == [
        "algorithm.kl.coef",
        "loop.num_steps",
        "model.lora",
        "model.lora.alpha",
        "model.lora.base",
        "model.lora.rank",
        "model.lora.target_modules",
    ]
    assert differing_keys(old, old) == []


def test_cluster_files(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("trainer: {replicas: 2, gpus: 0.5}\n")
    assert load_cluster(path, []).trainer.replicas == 2
    path.write_text("trainer: {replica: 2}\nbuffer: {replicas: 2}\n")
    with pytest.raises(BadInput, match=r"cluster.yaml: unknown key trainer.replica; did you mean trainer.replicas\?"):
        load_cluster(path, [])
    path.write_text("buffer: {replicas: 2}\n")
    with pytest.raises(BadInput, match=r"buffer.replicas must be 1.*found 2"):
        load_cluster(path, [])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_run_files_load(path: Path) -> None:
    """Their data and reward files exist. Not covered here: that they train."""
    config = load_run(path, [])
    assert Path(config.data.path).is_file()
    assert config.reward is None or Path(config.reward.function.rpartition(":")[0]).is_file()


def test_a_pool_may_be_a_range_and_trainer_and_buffer_may_not(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("rollout: {replicas: 4, min_replicas: 1}")
    cluster = load_cluster(path, [])
    assert (cluster.rollout.needed, cluster.rollout.replicas, cluster.reward.needed) == (1, 4, 1)
    for text, message in (
        ("rollout: {replicas: 2, min_replicas: 3}", "min_replicas=3 is more than replicas=2"),
        ("trainer: {replicas: 2, min_replicas: 1}", "trainer.min_replicas: the trainer does not grow or shrink"),
        ("buffer: {min_replicas: 1}", "buffer.min_replicas"),
    ):
        path.write_text(text)
        with pytest.raises(BadInput, match=message):
            load_cluster(path, [])


@pytest.mark.parametrize("path", sorted((ROOT / "clusters").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_cluster_files_load(path: Path) -> None:
    load_cluster(path, [])


@pytest.mark.parametrize("kind", [RunConfig, Cluster])
def test_a_key_is_nearest_to_itself_with_a_letter_missing(kind: type[BaseModel]) -> None:
    """An invariance over all keys that are not sections: dropping the last letter but one is found again."""
    for key in (key.name for key in all_keys(kind) if not key.is_section and len(key.name.rpartition(".")[2]) > 3):
        found = nearest(key[:-2] + key[-1], kind)
        assert found == key, f"{key[:-2] + key[-1]} -> {found}"


def test_reading_settings_loads_nothing_heavy() -> None:
    """In a new interpreter: neither torch nor ray nor transformers nor datasets is imported."""
    heavy = {"torch", "ray", "transformers", "datasets", "vllm", "deepspeed"}
    code = f"import sys, rlhf.config_file, rlhf.observers; print(sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert result.stdout.strip() == "[]"


def test_weights_in_the_middle_of_sequences_need_stale_samples(tmp_path: Path) -> None:
    """With max_staleness 0 no sequence is under way when weights come."""
    path = write(tmp_path, MINIMAL)
    assert "loop.max_staleness above 0" in refusal(path, "generation.weights_mid_sequence=true")
    stale = ["generation.weights_mid_sequence=true", "loop.max_staleness=1"]
    assert load_run(path, stale).generation.weights_mid_sequence


@pytest.mark.parametrize("key", ["data.path", "mix.data.path", "reward.reference.path"])
def test_an_empty_path_of_data_is_refused(tmp_path: Path, key: str) -> None:
    """It would be the current folder with everything below it."""
    assert f"{key}: '' is empty; expected a file, a folder or a hub name" in refusal(
        write(tmp_path, MINIMAL), f"{key}=''"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "trainer.resources={a: -1}",
            "resources.a: found -1 (whole number); expected greater than or equal to 0",
        ),
        ("rollout.gpus=1.5", "gpus=1.5: Ray lends a share of one GPU, or whole ones"),
        ("placement_timeout_s=1e10", "placement_timeout_s: found 10000000000.0 (number); expected less than or equal"),
        (
            "threads_per_role=100000",
            "found 100000 (whole number); expected less than or equal to 4096",
        ),
    ],
)
def test_amounts_that_ray_does_not_have(tmp_path: Path, override: str, expected: str) -> None:
    """Control: shares of a GPU and several whole ones."""
    path = write(tmp_path, "trainer: {gpus: 0.5}\nrollout: {gpus: 2}\n")
    assert load_cluster(path, []).rollout.gpus == 2
    with pytest.raises(BadInput, match=re.escape(expected)):
        load_cluster(path, [override])
