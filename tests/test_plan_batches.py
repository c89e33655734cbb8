"""The plan's batch arithmetic against what runs really do: every pass and optimizer step of the learner is counted.

Not covered: groups that are dropped (the plan says what is trained on when none is), packing on several ranks.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.algorithms.table import build
from rlhf.cli.main import main
from rlhf.config import RunConfig
from rlhf.config_file import load_run
from rlhf.experience import OLD_LOGPROBS, Columns, Group, Row
from rlhf.learner import learner as learner_module
from rlhf.learner.build import build_policy
from rlhf.learner.learner import PolicyLearner
from rlhf.learner.torch_engine import TorchEngine
from rlhf.planning.batches import OptimizerStep, UnitLengths, optimizer_steps

ROOT = Path(__file__).parents[1]


class Record:
    """What the learner of this process did: for each of its steps the units, and the passes of each optimizer step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.units: list[tuple[list[UnitLengths], list[UnitLengths]]] = []
        self.steps: list[list[list[tuple[int, int]]]] = []  # step, optimizer step, pass: (sequences, tokens)
        self._passes: list[tuple[int, int]] = []
        update, step, forward = PolicyLearner.update, TorchEngine.step, TorchEngine.forward

        def watched_update(learner: PolicyLearner, batch: Any) -> Any:
            beside = batch.beside.rows if hasattr(batch, "beside") else ()
            self.units.append((lengths_of(batch.rows), lengths_of(beside)))
            self.steps.append([])
            return update(learner, batch)

        def watched_forward(engine: TorchEngine, inputs: Any) -> Any:
            if torch.is_grad_enabled() and is_policy(engine):
                rows = inputs.input_ids.shape[0]
                starts = int((inputs.position_ids == 0).sum()) if inputs.attention_mask is None else rows
                self._passes.append((starts, inputs.input_ids.numel()))
            return forward(engine, inputs)

        def watched_step(engine: TorchEngine, lr: float) -> Any:
            if is_policy(engine):
                self.steps[-1].append(self._passes)
                self._passes = []
            return step(engine, lr)

        monkeypatch.setattr(PolicyLearner, "update", watched_update)
        monkeypatch.setattr(TorchEngine, "forward", watched_forward)
        monkeypatch.setattr(TorchEngine, "step", watched_step)


def is_policy(engine: TorchEngine) -> bool:
    return type(engine.policy).__name__ == "PolicyModel"


def lengths_of(rows: tuple[Row, ...]) -> list[UnitLengths]:
    units: dict[int, list[tuple[int, int]]] = {}
    for row in rows:
        units.setdefault(row.unit, []).append((len(row.prompt_ids), len(row.completion_ids)))
    return [tuple(members) for members in units.values()]


def said(step: OptimizerStep) -> tuple[int, int, int]:
    return step.sequences, step.microbatches, step.largest_microbatch


def seen(passes: list[tuple[int, int]]) -> tuple[int, int, int]:
    return sum(sequences for sequences, _ in passes), len(passes), max(tokens for _, tokens in passes)


RUNS = {
    "rloo_tiny.yaml": ["learner.minibatches=3", "learner.epochs=2", "learner.tokens_per_microbatch=150"],
    "ppo_ptx_tiny.yaml": ["learner.minibatches=2", "learner.tokens_per_microbatch=400", "learner.packing=true"],
    "dpo_tiny.yaml": ["learner.minibatches=2", "learner.tokens_per_microbatch=300", "data.shuffle=true"],
}


@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_run_passes_and_steps_as_often_as_planned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps of a whole run in this process; RLOO, PPO with rows of data beside it, and DPO on preferences."""
    config = str(ROOT / "configs" / name)
    settings = ["loop.num_steps=2", "loop.groups_per_step=5", "data.heldout=2", "learner.engine=torch", *RUNS[name]]
    if name != "dpo_tiny.yaml":
        settings += ["generation.engine=transformers", "generation.max_new_tokens=7"]
    assert main(["plan", config, *settings, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["batches"]

    record = Record(monkeypatch)
    assert main(["run", config, *settings, "--in-process", "--run-dir", str(tmp_path / "run")]) == 0
    trained = capsys.readouterr().out

    assert [len(step) for step in record.steps] == [planned["optimizer_steps_per_step"]] * 2
    assert sum(map(len, record.steps)) == planned["optimizer_steps"]
    for sampled, rows in record.units:
        assert len(sampled) + len(rows) == planned["units_per_step"]
        assert sum(map(len, [*sampled, *rows])) == planned["sequences_per_step"]
    biggest = max(sequences for step in record.steps for sequences, _, _ in map(seen, step))
    assert biggest == planned["sequences_per_optimizer_step"] == planned["sequences_per_rank"]
    # Real rows are shorter than the limits that are assumed without a tokenizer.
    assert (
        max(count for step in record.steps for _, count, _ in map(seen, step))
        <= planned["microbatches_per_optimizer_step"]
    )
    assert f"{planned['prompts_in_data']} " in trained  # "176 prompts to train on", as the run counts them
    assert main(["verify", str(tmp_path / "run"), "--json"]) == 0
    ledger = json.loads(capsys.readouterr().out)["ledger"]
    assert ledger["trained"] == planned["prompts_used"] + 2 * planned["rows_of_data_per_step"]
    exact = load_run(tmp_path / "run" / "config.yaml", [])
    for number, (done, (sampled, rows)) in enumerate(zip(record.steps, record.units, strict=True)):
        expected = optimizer_steps(exact, sampled, rows, 1, number)
        assert [seen(passes) for passes in done] == [said(step) for step in expected]


@pytest.mark.parametrize(
    ("config", "settings", "units", "sequences"),
    [
        ("reward_model_tiny.yaml", [], 2, 8),
        ("dpo_tiny.yaml", ["algorithm.compare=best_worst"], 2, 4),
        ("dpo_tiny.yaml", ["algorithm.compare=all"], 12, 24),
    ],
)
def test_a_row_of_four_ranked_answers_is_planned_as_it_is_trained(
    config: str, settings: list[str], units: int, sequences: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Two rows a step: a reward model scores their answers in one unit each, DPO makes one or six pairs of them. The
    reference reads each answer once, however often it is compared."""
    data = tmp_path / "ranked.jsonl"
    rows = [{"prompt": f"q{n}", "completions": ["a", "bb", "c c", "d"], "ranks": [3, 0, 1, 2]} for n in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = [f"data.path={data}", "data.heldout=0", "loop.num_steps=2", "loop.groups_per_step=2", "learner.engine=torch"]
    assert main(["plan", str(ROOT / "configs" / config), *told, *settings, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    record = Record(monkeypatch)
    arguments = [*told, *settings, "--in-process", "--run-dir", str(tmp_path / "run")]
    assert main(["run", str(ROOT / "configs" / config), *arguments]) == 0
    batches = planned["batches"]
    assert (batches["units_per_step"], batches["sequences_per_step"]) == (units, sequences)
    for trained, beside in record.units:
        assert (len(trained), sum(map(len, trained)), beside) == (units, sequences, [])
    if config == "dpo_tiny.yaml":
        assert max(sum(count for count, _ in passes) for step in record.steps for passes in step) == sequences
        assert len(record.units) == 2


@pytest.mark.parametrize("learner", [{"minibatches": 3, "epochs": 2}, {"packing": True}, {"tokens_per_microbatch": 40}])
def test_each_of_two_ranks_does_what_is_planned_for_it(
    learner: dict[str, Any],
    tiny_run: Callable[..., RunConfig],
    sampled_groups: Callable[..., list[Group]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The learner's own code as rank 0 and rank 1 of two, on an engine that knows no other rank: each makes the same
    number of passes, fillers included, and the sequences of both are those of the batch."""
    config = tiny_run({}, learner, {}, {})
    record = Record(monkeypatch)
    monkeypatch.setattr(
        learner_module,
        "build_engine",
        lambda config, rank, ranks, place: TorchEngine(build_policy(config), config.learner, torch.device("cpu")),
    )
    groups = sampled_groups(3, 5, 4, 0, 1.0)
    for rank in (0, 1):
        alone = PolicyLearner(config, build(config.algorithm), rank, 2, None)
        alone.setup()
        alone.update(alone.prepare(with_old_logprobs(groups)))
    expected = optimizer_steps(config, *record.units[0], 2, 0)
    for first, second, planned in zip(*record.steps, expected, strict=True):
        assert len(first) == len(second) == planned.microbatches
        fillers = [passes.count((1, 2)) for passes in (first, second)]
        counts = [
            sum(rows for rows, _ in passes) - extra for passes, extra in zip((first, second), fillers, strict=True)
        ]
        assert sum(counts) == planned.sequences and max(counts) == planned.sequences_of_a_rank
        assert max(tokens for passes in (first, second) for _, tokens in passes) == planned.largest_microbatch


def with_old_logprobs(groups: list[Group]) -> list[Group]:
    """As `annotate` leaves them; the values do not matter here."""
    filled = []
    for group in groups:
        old = [sample.behavior_logprobs for sample in group.samples]
        assert all(column is not None for column in old)
        filled.append(group.with_columns(Columns(group.prompt.id, {}, {OLD_LOGPROBS: old})))  # type: ignore[dict-item]
    return filled


def test_a_wrong_plan_would_be_seen(tiny_run: Callable[..., RunConfig]) -> None:
    """A control: another budget, number of minibatches or of ranks gives another plan for the same rows."""
    units: list[UnitLengths] = [((10, length),) for length in (3, 9, 14, 2, 7, 7, 5, 12)]

    def planned(ranks: int, **learner: Any) -> list[OptimizerStep]:
        return optimizer_steps(tiny_run({}, learner, {}, {}), units, [], ranks, 0)

    found = [planned(1), planned(2), planned(1, tokens_per_microbatch=50), planned(1, minibatches=2)]
    found += [planned(1, minibatches=2, epochs=2), planned(1, packing=True)]
    assert len({str(steps) for steps in found}) == len(found)
