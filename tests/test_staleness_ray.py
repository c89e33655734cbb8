"""Staleness on real Ray: the bound under rewards that come late, and the simulated pool against two engine actors, once
with decoding steps that take a fixed time and once with a model.

Not covered: vLLM, several machines, engines of unequal speed.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rlhf.admission import Demand
from rlhf.buffer.store import ExperienceBuffer
from rlhf.cluster import Role
from rlhf.config import LoopConfig
from rlhf.experience import REWARD, Group, Prompt, Sample, Sampling
from rlhf.interfaces import Request
from rlhf.loop import Team, train
from rlhf.metrics import Metrics, values
from rlhf.simulation.engines import EngineCost
from rlhf.simulation.pool import StepCost, Workload, simulate_lengths
from rlhf.sources import JudgeDesk, PolicySource
from rlhf.testing import CountingLearner, LengthJudge
from rlhf.weights import Receipt, Weights

RUN = {
    "seed": 3,
    "model": {"name": "tiny"},
    "algorithm": {"name": "rloo", "samples_per_prompt": 2, "kl": {"coef": 0.0}},
    "data": {"path": "prompts.jsonl"},
    "loop": {"num_steps": 5, "groups_per_step": 4, "checkpoint_every": 0, "eval_every": 100},
    "generation": {"engine": "transformers", "max_new_tokens": 8, "temperature": 0.9},
    "learner": {"engine": "torch", "lr": 1e-3},
    "reward": {"function": "reward.py:reward"},
}
# How late a reward comes depends on the prompt only, so that it is as late in every run.
REWARD_FUNCTION = """
import hashlib, time

def reward(prompts, completions, **columns):
    time.sleep({longest_s} * hashlib.sha256(prompts[0].encode()).digest()[0] / 255)
    return [float(text.count("e")) for text in completions]
"""
TWO_ENGINES = "rollout: {replicas: 2}\nthreads_per_role: 1\n"


def run(folder: Path, longest_s: float, overrides: Mapping[str, Any]) -> list[dict[str, float]]:
    """A run on Ray with two rollout actors: its metrics, one row a step."""
    folder.mkdir()
    rows = [json.dumps({"prompt": f"Tell me about number {n:03}."}) for n in range(400)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    (folder / "reward.py").write_text(REWARD_FUNCTION.format(longest_s=longest_s))
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    (folder / "cluster.yaml").write_text(TWO_ENGINES)
    settings = [f"{key}={value}" for key, value in overrides.items()]
    command = [sys.executable, "-m", "rlhf.cli.main", "run", "run.yaml", *settings, "--cluster", "cluster.yaml"]
    done = subprocess.run(
        [*command, "--run-dir", "run"], cwd=folder, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.ray
@pytest.mark.slow
def test_bound_holds_on_ray_and_is_reached(tmp_path: Path) -> None:
    """Two engine actors, rewards up to .3 s late: ages from 0 to 2, the histogram adds up, idle time is measured."""
    rows = run(tmp_path / "late", 0.3, {"loop.max_staleness": 2})
    assert len(rows) == 5
    assert max(row["staleness/max"] for row in rows) == 2
    assert all(0 <= row["staleness/mean"] <= row["staleness/max"] for row in rows)
    for row in rows:
        assert sum(share for name, share in row.items() if name.startswith("staleness/fraction_")) == pytest.approx(1)
        assert 0 <= row["time/engine_idle_s"] <= 2 * row["time/step_s"] + 1
        assert row["off_policy/ess_fraction"] <= 1
    assert max(row["off_policy/kl"] for row in rows) > 0
    assert sum(row["time/engine_idle_s"] for row in rows) > 0


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_weights_change_inside_sequences_of_a_whole_run(tmp_path: Path) -> None:
    """vLLM, two engines, k = 2, long answers: some have tokens of several versions, in order; none that is trained
    is too old by its oldest token; engine and learner agree wherever one version sampled all of an answer."""
    long = {"generation.max_new_tokens": 480, "algorithm.samples_per_prompt": 8, "loop.num_steps": 8}
    settings = {"generation.engine": "vllm", "generation.cache_gib": 0.3, "generation.weights_mid_sequence": "true"}
    folder = tmp_path / "mid"
    rows = run(folder, 0.0, {**long, **settings, "loop.max_staleness": 2, "generation.max_sequences": 16})
    assert len(rows) == 8 and max(row["staleness/max"] for row in rows) <= 2
    assert max(row.get("mismatch/logprob_abs_max", 0.0) for row in rows) < 1e-4
    assert max(row["sync/probe_abs_max"] for row in rows) < 1e-3
    buffer = ExperienceBuffer(folder / "run" / "experience.db", frozenset({REWARD}), None, 3)
    buffer.open()
    groups = [group for step in range(8) for group in buffer.replay(step)]
    buffer.close()
    versions = [sample.versions for group in groups for sample in group.samples]
    assert all(own is not None and (np.diff(own) >= 0).all() for own in versions)
    mixed = sum(len(set(own.tolist())) > 1 for own in versions if own is not None)
    assert mixed > 0, "no sequence was under way when weights came"


def lengths_of(folder: Path, steps: int) -> dict[int, list[int]]:
    """The tokens of each sample of each prompt of a finished run."""
    buffer = ExperienceBuffer(folder / "run" / "experience.db", frozenset({REWARD}), None, 3)
    buffer.open()
    groups = [group for step in range(steps) for group in buffer.replay(step)]
    buffer.close()
    return {group.prompt.id: [len(sample.token_ids) for sample in group.samples] for group in groups}


def median(rows: list[dict[str, float]], name: str) -> float:
    """Over the steps after the first, in which everything is done for the first time."""
    return statistics.median(row[name] for row in rows if row["step"] > 0)


def mean(rows: list[dict[str, float]], name: str) -> float:
    """Over all steps: what is booked in bursts has no middle."""
    return statistics.mean(row[name] for row in rows)


def per_step(seconds: Sequence[float], staleness: int) -> float:
    """The median over k + 1 steps on end, of which one waits, per step; without the first step and the last k, for
    which nothing new is sampled."""
    settled = seconds[1 : len(seconds) - staleness]
    size = staleness + 1
    windows = [settled[i : i + size] for i in range(0, len(settled) - staleness, size)]
    return statistics.median(sum(window) for window in windows) / size


STEPS, SAMPLES, GROUPS, LIMIT = 10, 4, 8, 300
MEASURED = {
    "loop.num_steps": STEPS,
    "loop.groups_per_step": GROUPS,
    "generation.max_new_tokens": LIMIT,
    "algorithm.samples_per_prompt": SAMPLES,
    "learner.lr": 1e-6,
}


def costs_of(rows: list[dict[str, float]], lengths: Mapping[int, Sequence[int]]) -> tuple[EngineCost, StepCost]:
    """What a decoding step of an engine, an update and the rest of a step cost in this run.

    The transformers engine answers one group after the other, and each step of a group decodes all of its samples. Its
    seconds are those of the whole run: with k = 1 a row holds what was sampled for one step, for two or for none.
    """
    engine = EngineCost(
        step_s=sum(row["time/generate_s"] for row in rows) / sum(max(own) for own in lengths.values()),
        sequence_s=0.0,
        prompt_token_s=0.0,
        max_sequences=SAMPLES,
        continuous=False,
        load_s=median(rows, "sync/seconds"),
    )
    publish_s = median(rows, "time/sync_s") - median(rows, "sync/seconds")
    judge_s, annotate_s, store_s = (mean(rows, f"time/{name}_s") for name in ("judge", "annotate", "store"))
    rest = StepCost(median(rows, "time/update_s"), publish_s, judge_s / GROUPS, annotate_s, store_s / (2 * GROUPS))
    return engine, rest


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_simulated_pool_agrees_with_two_engine_actors(tmp_path: Path) -> None:
    """The step time of runs with a model at k = 0 and k = 1, within 15 %. What a decoding step and an update cost is
    taken from the same run, since engines and learner share two cores and slow each other down; how the pieces follow
    one another, who waits for whom and for the longest of a step, is predicted."""
    report = []
    for staleness in (0, 1):
        folder = tmp_path / f"k{staleness}"
        rows = run(folder, 0.0, {**MEASURED, "loop.max_staleness": staleness})
        lengths = lengths_of(folder, STEPS)
        workload = Workload(GROUPS, SAMPLES, 1, 1.0, 0.0, LIMIT, 0)
        engine, rest = costs_of(rows, lengths)
        found = simulate_lengths(2, staleness, STEPS, workload, lengths.__getitem__, engine, rest, learner_waits=True)
        predicted = per_step([step.step_s for step in found.steps], staleness)
        measured = per_step([row["time/step_s"] for row in rows], staleness)
        report.append((staleness, round(predicted, 3), round(measured, 3), round(predicted / measured - 1, 3)))
        print(f"k = {staleness}: simulated {predicted:.3f} s a step, measured {measured:.3f} s; {engine}; {rest}")
    assert all(abs(error) <= 0.15 for *_, error in report), report


# Decoding steps, updates and loads that take as long on any machine, as those of a GPU do not depend on the driver's.
PACED = EngineCost(step_s=0.04, sequence_s=0.0, prompt_token_s=0.0, max_sequences=2, continuous=False, load_s=0.3)
PACED_UPDATE_S = 2.0
LONG_TAILED = Workload(6, 2, 1, 24.0, 0.8, 120, 5)
PACED_STEPS = 8


class PacedEngine:
    """A rollout actor's class whose decoding steps take PACED.step_s of real time and whose samples are made up."""

    def __init__(self) -> None:
        self._version = 0

    def where(self) -> object:
        from actors.worker import place_of_this_actor

        return place_of_this_actor()

    def setup(self) -> None:
        pass

    def load(self, weights: Weights) -> Receipt:
        time.sleep(PACED.load_s)
        self._version = weights.version
        return Receipt("paced", weights.version, weights.fingerprint, 0.0, PACED.load_s)

    def work(self, request: Request) -> Iterator[object]:
        yield None
        yield None
        due = time.monotonic()
        for prompt in request.prompts:
            lengths = LONG_TAILED.lengths(prompt.id)
            for step in range(max(lengths)):
                due += PACED.step_s
                time.sleep(max(0.0, due - time.monotonic()))
                if step % 25 == 24:
                    yield None
                    yield None
            yield Group(prompt, tuple(made_up(index, n, self._version) for index, n in enumerate(lengths)), "policy")
            yield prompt.id, max(lengths) * PACED.step_s


def made_up(index: int, length: int, version: int) -> Sample:
    ids, sampling = np.ones(length, dtype=np.int32), Sampling(1.0, 1.0, 0, LONG_TAILED.max_new_tokens)
    logprobs, versions = -np.ones(length, dtype=np.float32), np.full(length, version, dtype=np.int32)
    mask = np.ones(length, dtype=np.bool_)
    return Sample(index, ids, mask, "", "length", logprobs, versions, sampling, 0, {}, {})


class PacedLearner(CountingLearner):
    def update(self, batch: list[Group]) -> Metrics:
        time.sleep(PACED_UPDATE_S)
        return super().update(batch)


class Opening(ExperienceBuffer):
    """Opens the references that actors hand over, as Ray does on the way to the buffer actor."""

    def add_group(self, prompt_id: int, ticket: int, group: Any) -> bool:
        import ray

        return super().add_group(prompt_id, ticket, ray.get(group, timeout=60))

    def add_columns(self, prompt_id: int, columns: Any) -> bool:
        import ray

        return super().add_columns(prompt_id, ray.get(columns, timeout=60))


class Times:
    """The length of each step."""

    def __init__(self) -> None:
        self.step_s: list[float] = []

    def step_at(self, step: int, phase: str) -> None:
        pass

    def step_done(self, step: int, measured: Metrics) -> None:
        self.step_s.append(values(measured)["time/step_s"])

    def evaluate_if_due(self, updates: int) -> None:
        pass

    def checkpoint_if_due(self, updates: int) -> None:
        pass


class OnePrompt:
    def prompt(self, prompt_id: int) -> Prompt:
        return Prompt(prompt_id, prompt_id, 0, "p", "p", np.array([1], dtype=np.int32), {})


def paced_run(folder: Path, staleness: int) -> list[float]:
    """The real loop, source, ledger and pools with two engine actors and a judge's host on Ray."""
    import ray

    from actors.judge import JudgeActor
    from actors.pool import ActorWorkers, PoolSpec

    def pool(role: str, size: int, hire: Any) -> ActorWorkers:
        limits = (60.0, 60.0, 120.0, 60.0, 3, math.inf, False)
        spec = PoolSpec(role, size, size, role == "rollout", False, Role(cpus=0), *limits)
        return ActorWorkers(spec, hire, ray.kill, print)

    engine, judge = ray.remote(PacedEngine).options(num_cpus=0), JudgeActor.options(num_cpus=0)
    rollouts = pool("rollout", 2, lambda name: engine.remote())
    judges = pool("reward", 1, lambda name: judge.remote(LengthJudge, ()))
    buffer = Opening(folder / f"experience-{staleness}.db", frozenset({REWARD}), None, 3)
    buffer.open()
    groups, told = LONG_TAILED.groups_per_step, Times()
    wanted = Demand(groups, PACED_STEPS, staleness, 2, Sampling(1.0, 1.0, 0, LONG_TAILED.max_new_tokens), 120.0)
    desk = JudgeDesk("reward", frozenset({REWARD}), True, judges)
    source = PolicySource(wanted, OnePrompt(), buffer, rollouts, [desk], lambda: False)
    loop = LoopConfig(num_steps=PACED_STEPS, groups_per_step=groups, max_staleness=staleness)
    try:
        for each in (rollouts, judges):
            each.wait_until_up()
        train(Team(source, PacedLearner(), buffer), loop, told, lambda: False)
    finally:
        for each in (rollouts, judges):
            each.close()
            for worker in each._workers:
                ray.kill(worker.actor)
        buffer.close()
    return told.step_s


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_simulated_pool_agrees_with_two_paced_engine_actors(tmp_path: Path) -> None:
    """Nothing is fitted: the simulation gets the costs that the actors are paced by, and long-tailed lengths. The step
    time of the real loop, source, ledger and pool at k = 0, 1 and 2 within 5 %. What it leaves out is the machine: an
    engine of a model on two shared cores is slower while the learner trains."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        report = []
        for staleness in (0, 1, 2):
            seconds = paced_run(tmp_path, staleness)
            rest = StepCost(PACED_UPDATE_S, 0.0, 0.0, 0.0, 0.0)
            lengths = LONG_TAILED.lengths
            found = simulate_lengths(2, staleness, PACED_STEPS, LONG_TAILED, lengths, PACED, rest, learner_waits=True)
            predicted = statistics.mean(step.step_s for step in found.steps)
            measured = statistics.mean(seconds)
            report.append((staleness, round(predicted, 2), round(measured, 2), round(predicted / measured - 1, 3)))
            print(report[-1])
        # A learner that does not wait for busy engines would be 10 % quicker at k = 2, so 15 % would not tell.
        assert all(abs(error) <= 0.05 for *_, error in report), report
        assert report[0][2] > 1.15 * report[1][2], "staleness buys step time, in the run that was measured, too"
    finally:
        ray.shutdown()
