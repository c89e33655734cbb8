"""The KL price that moves: which way, by how much, what it is applied to, and that a restart goes on with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlhf.algorithms.adaptive_kl import COEF, PRICE
from rlhf.algorithms.table import build
from rlhf.cli.main import main
from rlhf.config import RunConfig
from rlhf.experience import Group
from rlhf.learner.collate import collate
from rlhf.learner.plan import units_of
from rlhf.metrics import values
from rlhf.ops.microbatch import Outputs

LENGTHS = [3, 2, 4, 1]
D = 0.5  # log-prob minus reference, at each token


@pytest.fixture
def groups(make_group: Callable[..., Group]) -> list[Group]:
    """Two prompts with four samples each; the sum of k1 is D times the length, 1.25 nats on average."""

    def column(value: float) -> list[list[float]]:
        return [[value] * length for length in LENGTHS]

    tokens = {"behavior_logprobs": column(-1.0), "ref_logprobs": column(-1.0 - D), "old_logprobs": column(-1.0)}
    tokens["values"] = column(0.0)
    return [make_group(n, [0.0, 1.0, 0.5, float(n)], LENGTHS, tokens, {}) for n in range(2)]


def settings(name: str, kl: dict[str, Any]) -> Any:
    return RunConfig.model_validate(
        {
            "model": {"name": "tiny"},
            "algorithm": {"name": name, "kl": kl} | ({} if name in ("ppo", "reinforce") else {"samples_per_prompt": 4}),
            "data": {"path": "unused"},
            "loop": {"num_steps": 1, "groups_per_step": 2},
            "generation": {"max_new_tokens": 8},
            "reward": {"function": "unused:unused"},
        }
    ).algorithm


@pytest.mark.parametrize(
    ("target", "factor"),
    [
        (0.1, 1 + 0.2 * 8 / 100),  # far above the target: by a fifth, and no more
        (1.25 / 1.1, 1 + 0.1 * 8 / 100),  # a tenth above
        (1.25, 1.0),
        (1.25 / 0.9, 1 - 0.1 * 8 / 100),
        (100.0, 1 - 0.2 * 8 / 100),
    ],
)
def test_the_price_rises_above_the_target_and_falls_below_it(groups: list[Group], target: float, factor: float) -> None:
    """8 samples of 1.25 nats, a horizon of 100; the step itself is at the old price."""
    algorithm = build(settings("rloo", {"coef": 0.05, "target": target, "horizon": 100}))
    batch, state = algorithm.prepare(groups, algorithm.initial_state)
    assert state[COEF] == pytest.approx(0.05 * factor, rel=1e-9)
    assert values(batch.metrics)["kl/coef"] == 0.05
    _, later = algorithm.prepare(groups, state)
    assert later[COEF] == pytest.approx(0.05 * factor**2, rel=1e-9)


ONLINE = ["rloo", "reinforce", "grpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo", "raft"]


@pytest.mark.parametrize("place", ["reward", "loss"])
@pytest.mark.parametrize("name", ONLINE)
def test_a_step_is_that_of_the_same_algorithm_at_the_current_price(groups: list[Group], name: str, place: str) -> None:
    """Carried prices of 0.3 and 0.05 against run files that say so: rows, and the loss of random log-probs."""
    if name == "raft" and place == "loss":
        pytest.skip("RAFT has no KL as a loss")
    moving = build(settings(name, {"coef": 0.2, "place": place, "target": 3.0}))
    noise = torch.randn(8, max(LENGTHS), generator=torch.Generator().manual_seed(0))
    losses = []
    for price in (0.3, 0.05):
        fixed = build(settings(name, {"coef": price, "place": place}))
        mine, _ = moving.prepare(groups, {**moving.initial_state, COEF: price})
        theirs, _ = fixed.prepare(groups, fixed.initial_state)
        own = [{key: column for key, column in row.tokens.items() if key != PRICE} for row in mine.rows]
        for row, other in zip(own, theirs.rows, strict=True):
            assert row.keys() == other.tokens.keys()
            assert all((row[key] == other.tokens[key]).all() for key in row)
        found = []
        for algorithm, batch in ((moving, mine), (fixed, theirs)):
            made = collate(units_of(batch.rows), sorted(batch.rows[0].tokens), packed=False).batch
            said = torch.where(made.mask, noise[: len(made.mask), : made.mask.shape[1]] - 1, 0.0)
            found.append(algorithm.loss(Outputs(said, torch.zeros_like(said)), made).loss.item())
        assert found[0] == pytest.approx(found[1], rel=1e-5)
        losses.append(found[0])
    if name != "raft":  # where it only ranks
        assert losses[0] != pytest.approx(losses[1], rel=1e-4), "control: the price matters"


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_a_micro_batch_of_empty_completions_has_a_loss_of_zero(make_group: Callable[..., Group], name: str) -> None:
    """Trap 18: alone in its micro-batch an empty completion has no token that could hold the price."""
    algorithm = build(settings(name, {"coef": 0.2, "place": "loss", "target": 3.0}))
    columns = {"behavior_logprobs": [[], []], "ref_logprobs": [[], []]}
    batch, _ = algorithm.prepare([make_group(0, [1.0, 0.0], [0, 0], columns, {})], algorithm.initial_state)
    made = collate(units_of(batch.rows), sorted(batch.rows[0].tokens), packed=False).batch
    nothing = torch.zeros(made.mask.shape, requires_grad=True)
    assert nothing.shape == (2, 0)
    assert algorithm.loss(Outputs(nothing, nothing.detach()), made).loss.item() == 0.0


def test_a_step_without_samples_moves_nothing() -> None:
    algorithm = build(settings("rloo", {"coef": 0.05, "target": 1.0}))
    _, state = algorithm.prepare([], algorithm.initial_state)
    assert state[COEF] == 0.05


def test_a_target_holds_the_kl_and_a_stopped_run_goes_on_with_its_price(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short horizon, so that six steps show it: with a low target the price rises and the KL ends lower than with a
    high one, where it falls; stopped after three steps, prices and weights are those of the run that was not."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(f'{{"prompt": "Count to {n}."}}\n' for n in range(12)))
    Path("reward.py").write_text(
        "def share(prompts, completions, **columns):\n    return [t.count('e') / max(len(t), 1) for t in completions]\n"
    )

    def run(target: float, steps: int, run_dir: str) -> list[dict[str, float]]:
        content = {
            "model": {"name": "tiny"},
            "algorithm": {
                "name": "rloo", "samples_per_prompt": 4, "kl": {"coef": 2.0, "target": target, "horizon": 8.0},
            },
            "data": {"path": "prompts.jsonl"},
            "loop": {"num_steps": steps, "groups_per_step": 8, "checkpoint_every": 3},
            "generation": {"engine": "transformers", "max_new_tokens": 8},
            "learner": {"engine": "torch", "lr": 1e-2},
            "reward": {"function": "reward.py:share"},
        }  # fmt: skip
        Path("run.yaml").write_text(yaml.safe_dump(content))
        assert main(["run", "run.yaml", "--in-process", "--run-dir", run_dir]) == 0
        return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]

    low, high = run(0.01, 6, "low"), run(1000.0, 6, "high")
    prices = {name: [step["kl/coef"] for step in steps] for name, steps in (("low", low), ("high", high))}
    # In the first step the KL is 0 and the price falls in both.
    assert prices["low"][1:] == sorted(prices["low"][1:]) and prices["low"][-1] > 0.4
    assert prices["high"] == sorted(prices["high"], reverse=True) and prices["high"][-1] < 0.001
    assert low[-1]["kl/k1"] < high[-1]["kl/k1"]
    run(0.01, 3, "stopped")
    stopped = run(0.01, 6, "stopped")
    assert [step["kl/coef"] for step in stopped] == prices["low"]
    weights = [load_file(f"{r}/checkpoints/step-000006/policy/model.safetensors") for r in ("low", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("kl", "named"),
    [
        ({"coef": 0.0, "target": 1.0}, "coef must be above 0"),
        ({"horizon": 5.0}, "horizon would do nothing"),
        ({"loss_estimator": "k3"}, "loss_estimator=k3 would do nothing: place is reward"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(kl: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        settings("rloo", kl)


def test_a_horizon_that_a_step_could_overrun_is_refused(tiny_run: Callable[..., RunConfig]) -> None:
    """Otherwise beta would end below 0, and the run would be paid for leaving the reference."""
    content = tiny_run({}, {}, {}, {}).model_dump()
    loop, algorithm = content["loop"], content["algorithm"]
    samples = loop["groups_per_step"] * algorithm["samples_per_prompt"]
    for horizon, fits in ((samples / 5, False), (samples / 5 + 0.1, True)):
        algorithm["kl"] = {"coef": 0.1, "target": 1.0, "horizon": horizon}
        if fits:
            RunConfig.model_validate(content)
        else:
            with pytest.raises(ValueError, match=f"algorithm.kl.horizon=.*a step of {samples} samples"):
                RunConfig.model_validate(content)
