"""A comparison of methods over seeds: which runs there are, how settings are chosen, what is kept.

The one rule for settings, the same for every method: the learning rate of LEARNING_RATES with the best objective
(learned reward - PRICE KL to the start, held-out prompts) at the end, averaged over the two SELECTION_SEEDS; then one
run on each of SEEDS, whose worlds were not looked at before. A tie goes to the lower rate. Everything else is fixed
beforehand in the run files beside this module. Each finished run leaves a JSON file; a second call makes what is
missing.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import laboratory
from .laboratory import World

LEARNING_RATES = (3e-4, 1e-3, 3e-3)
SELECTION_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)
PRICE = 0.1  # of a nat, as in algorithm.kl.coef of online.yaml


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table: its name, the run file it starts from, what differs, whether it learns from the noisy pairs,
    and whose learning rate it takes, where it is another form of that method."""

    name: str
    base: str
    overrides: tuple[str, ...] = ()
    on_pairs: bool = False
    rate_of: str | None = None

    @property
    def folder(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.name.lower()).strip("-")


def compare(root: Path, methods: Sequence[Method], say: Callable[[str], None], *, run_missing: bool) -> dict[str, Any]:
    """Chooses, runs and measures; returns all that a page needs. What is on disk already is not done again.

    Without run_missing nothing is run: seeds that are not whole are left out, and a missing run for the choice raises
    FileNotFoundError.
    """
    if not run_missing:
        say = _refuse
    chosen: dict[str, float] = {}
    looked_at: dict[str, dict[str, float]] = {}
    for method in methods:
        if method.rate_of is not None:
            chosen[method.name] = chosen[method.rate_of]
            continue
        tried = {rate: [_result(root, method, rate, seed, say) for seed in SELECTION_SEEDS] for rate in LEARNING_RATES}
        looked_at[method.name] = {f"{rate:g}": statistics.fmean(map(objective, found)) for rate, found in tried.items()}
        chosen[method.name] = max(LEARNING_RATES, key=lambda rate: (looked_at[method.name][f"{rate:g}"], -rate))
    runs: dict[str, dict[str, Any]] = {method.name: {} for method in methods}
    worlds = {}
    for seed in SEEDS:
        if not run_missing and not all(_file(root, method, chosen[method.name], seed).exists() for method in methods):
            continue
        for method in methods:
            runs[method.name][str(seed)] = _result(root, method, chosen[method.name], seed, say)
        made = laboratory.make_world(root, seed)
        worlds[str(seed)] = json.loads((made.folder / "world.json").read_text())
    return {"learning_rates": chosen, "objectives": looked_at, "worlds": worlds, "runs": runs}


def objective(result: Mapping[str, Any]) -> float:
    """What the online methods maximise, on held-out prompts: learned reward minus the price of the KL."""
    return float(result["learned"] - PRICE * result["kl"])


def main(name: str, methods: Sequence[Method], write: Callable[[dict[str, Any], Path], None]) -> None:
    """The command of a comparison: runs what is missing, then writes docs/results/NAME.json and the page."""
    parser = argparse.ArgumentParser(description=f"the comparison {name}: about half an hour of one core, resumable")
    parser.add_argument("--runs", type=Path, default=Path("runs/miniature"), help="where worlds and runs are kept")
    parser.add_argument("--to", type=Path, default=Path("docs/results"), help="where the results and the page go")
    parser.add_argument(
        "--page-only", action="store_true", help="run nothing; write the page of the seeds whose runs are all there"
    )
    arguments = parser.parse_args()
    found = compare(
        arguments.runs.absolute(),
        methods,
        lambda line: print(line, flush=True),
        run_missing=not arguments.page_only,
    )
    if len(found["worlds"]) < 2:
        sys.exit(f"only {len(found['worlds'])} of {len(SEEDS)} seeds are whole: there is no interval yet")
    arguments.to.mkdir(parents=True, exist_ok=True)
    laboratory.write_json(arguments.to / f"{name}.json", found)
    write(found, arguments.to)
    print(f"written: {arguments.to / name}.json and .md")


def _result(root: Path, method: Method, rate: float, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    file = _file(root, method, rate, seed)
    if not file.exists():
        run_dir = file.with_suffix("")
        say(f"{method.name}, learning rate {rate:g}, seed {seed} …")
        made = laboratory.make_world(root, seed)
        settings = [f"model.name={made.start}", f"learner.lr={rate:g}", f"seed={seed}", *method.overrides]
        seconds = laboratory.run(method.base, run_dir, [*settings, *_sources(made, method)])
        found: dict[str, Any] = {**laboratory.measured(made, laboratory.policy_of(run_dir)), "cpu_seconds": seconds}
        if not method.on_pairs:
            found["curve"] = laboratory.curve(run_dir)
        laboratory.write_json(file, found)
        laboratory.discard(run_dir)
        shown = ", ".join(f"{key} {found[key]:.3g}" for key in ("true", "learned", "kl", "cpu_seconds"))
        say(f"    {shown}")
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def _file(root: Path, method: Method, rate: float, seed: int) -> Path:
    """Where a result is; the run's directory is beside it, without the suffix."""
    return root / method.folder / f"lr-{rate:g}" / f"seed-{seed}.json"


def _refuse(line: str) -> None:
    raise FileNotFoundError(f"not run yet: {line}")


def _sources(made: World, method: Method) -> list[str]:
    if method.on_pairs:
        return [f"data.path={made.pairs}"]
    return [f"data.path={made.train}", f"reward.model={made.reward_model}"]
