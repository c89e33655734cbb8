"""`rlhf data pairs`: what it writes, that it repeats itself, and that it asks nothing twice.

Not covered: Ray and vLLM, which `rlhf run` is tested with.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.cli.main import main
from rlhf.data.pairs import pairs_from
from rlhf.experience import Group
from rlhf.observers import read_jsonl

REWARD = """
def length(prompts, completions):
    if prompts[0] == "say 2":
        return [None] * len(completions)
    return [float(len(c)) for c in completions]
"""


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"say {n}", "kind": "test"} for n in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARD)
    return {
        "model": {"name": "tiny"},
        "algorithm": {"name": "rloo", "samples_per_prompt": 4},
        "data": {"path": str(tmp_path / "prompts.jsonl"), "shuffle": False},
        "loop": {"num_steps": 1, "groups_per_step": 2},
        "generation": {"engine": "transformers", "max_new_tokens": 5},
        "learner": {"engine": "torch"},
        "reward": {"function": f"{tmp_path / 'rewards.py'}:length", "isolate": False},
    }


@pytest.fixture
def pairs(tmp_path: Path, content: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def call(name: str, *arguments: str) -> dict[str, Any]:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        command = ["data", "pairs", str(tmp_path / "run.yaml"), "--to", str(tmp_path / name), "--in-process", "--json"]
        code = main([*command, *arguments])
        shown = capsys.readouterr()
        if code:
            return {"code": code, "said": shown.err}
        found: dict[str, Any] = json.loads(shown.out.splitlines()[-1])
        return found

    return call


def test_pairs_are_seeded_resumed_and_read_by_a_run(
    tmp_path: Path, content: dict[str, Any], pairs: Callable[..., dict[str, Any]]
) -> None:
    """The same bytes again in another folder; more prompts add rows and change none; nothing is judged again, or the
    function, which is broken by then, would end it; `rlhf run` with DPO trains on the file."""
    found = pairs("one.jsonl", "--prompts", "4")
    assert found["prompts"] == 4 and list(found["dropped"].values()) == [1]  # prompt 2, replaced by prompt 4
    first = read_jsonl(tmp_path / "one.jsonl")
    assert [row["prompt_id"] for row in first] == [0, 1, 3, 4] and found["made"] == 4
    for row in first:
        assert row["prompt"] == f"say {row['prompt_id']}" and row["kind"] == "test"
        assert row["score_chosen"] == len(row["chosen"]) > row["score_rejected"] == len(row["rejected"])
    pairs("two.jsonl", "--prompts", "6")
    assert read_jsonl(tmp_path / "two.jsonl")[:4] == first
    (tmp_path / "rewards.py").write_text("def length(prompts, completions):\n    raise KeyError('asked again')\n")
    written = (tmp_path / "one.jsonl").read_bytes()
    (tmp_path / "one.jsonl").unlink()
    pairs("one.jsonl", "--prompts", "4")
    assert (tmp_path / "one.jsonl").read_bytes() == written
    dpo = content | {
        "algorithm": {"name": "dpo", "loss": {"beta": 0.1}},
        "data": {"path": str(tmp_path / "two.jsonl")},
    }
    (tmp_path / "dpo.yaml").write_text(
        yaml.safe_dump({k: v for k, v in dpo.items() if k not in ("generation", "reward")})
    )
    assert main(["run", str(tmp_path / "dpo.yaml"), "--in-process", "--run-dir", str(tmp_path / "dpo")]) == 0


def test_each_pairing_and_what_makes_no_pair(make_group: Callable[..., Group]) -> None:
    """Scores 1, 3, 3, 2 and one without: by hand; random pairings repeat themselves and follow the seed."""
    groups = [make_group(number, [1.0, 3.0, 3.0, 2.0, None], [2] * 5, {}, {}) for number in range(3)]
    scores = lambda rows: [(row["score_chosen"], row["score_rejected"]) for row in rows]  # noqa: E731
    rows, counts = pairs_from(groups, "best_worst", 0)
    assert scores(rows) == [(3.0, 1.0)] * 3 and counts == {"made": 3, "ties": 0, "identical": 0, "empty": 0}
    assert (rows[0]["chosen"], rows[0]["rejected"], rows[2]["prompt_id"]) == ("answer 1", "answer 0", 2)
    rows, counts = pairs_from(groups, "all", 0)
    assert len(rows) == 15 and counts["ties"] == 3
    for pairing, compared in (("first_round", 2), ("tournament", 3)):
        rows, counts = pairs_from(groups, pairing, 0)
        assert counts["made"] + counts["ties"] == 3 * compared and pairs_from(groups, pairing, 0)[0] == rows
        assert any(pairs_from(groups, pairing, seed)[0] != rows for seed in range(1, 5))
    assert pairs_from([make_group(0, [None, None], [1, 1], {}, {})], "all", 0)[0] == []


def test_run_files_that_cannot_make_pairs_are_refused(
    tmp_path: Path, content: dict[str, Any], pairs: Callable[..., dict[str, Any]]
) -> None:
    assert "a pair needs two answers" in pairs("a.jsonl", "algorithm={name: reinforce, samples_per_prompt: 1}")["said"]
    assert "expected a file that ends in .jsonl" in pairs("a.json")["said"]
    assert "--prompts 0: expected 1 or more" in pairs("a.jsonl", "--prompts", "0")["said"]
    content["algorithm"] = {"name": "sft"}
    del content["generation"], content["reward"]
    refused = pairs("a.jsonl")
    assert refused["code"] == 2 and "samples nothing" in refused["said"]
    assert not (tmp_path / "a.jsonl.run").exists()
