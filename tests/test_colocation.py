"""Roles that take turns on the same GPUs: what each gives up and takes back, whose turn it is, and whole runs.

A CPU has no GPU memory, but who sleeps really holds nothing: parameters are empty, passes fail. Ray's GPUs are logical
here, so that places are real and memory is not. Not covered: GPUs (one test is written and was never run), vLLM's
sleep, whose CPU build has none, several nodes.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlhf.admission import Demand
from rlhf.algorithms.table import build
from rlhf.buffer.store import ExperienceBuffer
from rlhf.cli import launch
from rlhf.cli.preflight import check_cheaply, check_prompts
from rlhf.cluster import Cluster
from rlhf.colocation import shared_gpus, turn_takers
from rlhf.config import LoopConfig, RunConfig
from rlhf.config_file import load_cluster, load_run
from rlhf.errors import BadInput, RunFailed, TrainerDied, WorkerLost
from rlhf.experience import REWARD, Group, Prompt, Sampling, fill_in
from rlhf.generation.build import build_generator, build_sleeper
from rlhf.interfaces import Request, Task
from rlhf.judges.reference import ReferenceJudge
from rlhf.learner.paired import PairedLearner
from rlhf.loop import Team, train
from rlhf.observers import Several
from rlhf.sources import JudgeDesk, PolicySource
from rlhf.testing import CountingLearner, LengthJudge, MadeUpGenerator
from rlhf.turns import Turns, take_turns
from rlhf.workers import LocalWorkers, SleepingLocalWorkers, answers, judgement

GROUPS = {
    "colocation": [["trainer", "critic", "rollout", "reference"]],
    "threads_per_role": 1,
    "trainer": {"cpus": 1, "gpus": 1},
    "critic": {"cpus": 1, "gpus": 1},
    "rollout": {"cpus": 0.5, "gpus": 1, "replicas": 2},
    "reference": {"cpus": 0.5, "gpus": 1},
}
RUN = {
    "seed": 3,
    "model": {"name": "tiny"},
    "algorithm": {"name": "rloo", "samples_per_prompt": 2, "kl": {"coef": 0.02}},
    "data": {"path": "prompts.jsonl", "heldout": 2},
    "loop": {"num_steps": 2, "groups_per_step": 2, "checkpoint_every": 1},
    "generation": {"engine": "transformers", "max_new_tokens": 4, "temperature": 0.9},
    "learner": {"engine": "torch", "lr": 1e-3},
    "reward": {"function": "reward.py:reward"},
}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with prompts, a reward function, a run file and two cluster files."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(20)))
    (tmp_path / "reward.py").write_text(
        "def reward(prompts, completions):\n    return [float(len(text)) for text in completions]\n"
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    (tmp_path / "together.yaml").write_text(yaml.safe_dump(GROUPS))
    apart = {name: {**part, "gpus": 0} for name, part in GROUPS.items() if isinstance(part, dict)}
    (tmp_path / "apart.yaml").write_text(yaml.safe_dump({**apart, "threads_per_role": 1}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / "step-000002" / "policy" / "model.safetensors")


# The cluster file.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"trainer": {"gpus": 0.5}}, "colocation: trainer.gpus=0.5; expected 1"),
        ({"rollout": {"gpus": 2}}, "colocation: rollout.gpus=2; expected 1"),
        ({"rollout": {"gpus": 1, "tensor_parallel": 2}}, "rollout.tensor_parallel=2: an engine of a colocation group"),
        ({"rollout": {"gpus": 1, "replicas": 2, "min_replicas": 1}}, "colocation: rollout.min_replicas=1: roles that"),
        ({"colocation": [["trainer", "rollout"], ["critic", "rollout"]]}, "rollout is named 2 times; expected once"),
        ({"colocation": [["trainer", "critic"]]}, "has nobody to take turns with; expected trainer or critic, and"),
        ({"colocation": [["rollout", "reference"]]}, "has nobody to take turns with"),
        ({"colocation": [["trainer", "reward"]]}, "colocation.0.1: found 'reward' (text); expected 'trainer', 'cri"),
        ({"colocation": ["trainer", "rollout"]}, "colocation.0: found 'trainer' (text); expected list"),
    ],
)
def test_a_bad_group_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump({**GROUPS, **changed}))
    with pytest.raises(BadInput) as refused:
        load_cluster(file, [])
    assert message in str(refused.value) and str(file) in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loop.max_staleness=1"], "loop.max_staleness=1: cluster file: colocation of reference, rollout, trainer"),
        (["loop.max_staleness=1", "generation.weights_mid_sequence=true"], "generation.weights_mid_sequence=true: "),
        (["learner.engine=deepspeed", "learner.zero_stage=3"], "learner.zero_stage=3: DeepSpeed moves"),
        (["learner.engine=deepspeed", "learner.zero_stage=1"], "learner.zero_stage=1: DeepSpeed moves"),
        (["learner.engine=deepspeed", "learner.zero_stage=0"], "learner.zero_stage=0: DeepSpeed moves"),
        (["generation.engine=vllm"], "generation.engine=vllm: the CPU build of vLLM"),
    ],
)
def test_a_run_that_cannot_take_turns_is_refused_before_anything_starts(
    workplace: Path, overrides: list[str], message: str
) -> None:
    """And only with such a cluster file: the same run is fine on the other."""
    config = load_run(Path("run.yaml"), overrides)
    check_cheaply(config, load_cluster(Path("apart.yaml"), []))
    if overrides == ["generation.engine=vllm"] and torch.cuda.is_available():
        pytest.skip("this machine's vLLM can sleep")
    with pytest.raises(BadInput) as refused:
        check_cheaply(config, load_cluster(Path("together.yaml"), []))
    assert message in str(refused.value) and "expected" in str(refused.value)


def test_a_group_has_the_roles_that_the_run_has() -> None:
    cluster = Cluster.model_validate(GROUPS)
    present = {name: cluster.roles[name] for name in ("trainer", "rollout", "reference", "reward", "buffer")}
    (shared,) = shared_gpus(cluster, present)
    assert set(shared.roles) == {"trainer", "rollout", "reference"} == turn_takers(cluster, present)
    assert (shared.bundles.replicas, shared.bundles.cpus, shared.bundles.gpus) == (2, 2.0, 1)
    assert 0.99 < sum(shared.part_of(name).gpus for name in shared.roles) <= 1
    assert not list(shared_gpus(cluster, {"trainer": cluster.trainer}))
    both = {"trainer": cluster.trainer, "critic": cluster.critic}
    assert list(shared_gpus(cluster, both)) and not turn_takers(cluster, both), "nobody samples: no turns"


# What each role gives up and takes back.


@pytest.fixture
def learner_of(tiny_run: Callable[..., RunConfig]) -> Callable[..., PairedLearner]:
    def build_one(settings: dict[str, Any]) -> PairedLearner:
        config = tiny_run({}, {"minibatches": 2, **settings}, {}, {})
        learner = PairedLearner(config, build(config.algorithm), 0, 1, None)
        learner.setup()
        return learner

    return build_one


def updated(learner: PairedLearner, groups: list[Group]) -> None:
    learner.update(learner.prepare(fill_in(groups, learner.annotate_share(groups))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_learner_that_gave_its_gpu_up_goes_on_bit_for_bit(
    learner_of: Callable[..., PairedLearner],
    sampled_groups: Callable[..., list[Group]],
    tmp_path: Path,
    dtype: str,
) -> None:
    """Before the first step, when there are no moments, and after one. In between nothing is left, and a pass fails."""
    steps = [sampled_groups(step, 3, 4, step, 1.0) for step in range(2)]
    saved = []
    for taking_turns in (False, True):
        learner = learner_of({"dtype": dtype})
        engine = learner.policy._engine
        for groups in steps:
            if taking_turns:
                learner.offload()
                learner.offload()  # again is nothing new
                held = [*engine.policy.parameters(), *engine._masters]
                held += [state["exp_avg"] for state in engine._optimizer.state.values()]
                assert not any(tensor.numel() for tensor in held)
                with pytest.raises(RunFailed, match="call reload before forward"):
                    learner.publish()
                learner.reload()
            updated(learner, groups)
        folder = tmp_path / str(taking_turns)
        folder.mkdir()
        learner.policy._engine.save(folder)
        saved.append(load_file(folder / "state-00000.safetensors"))
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


DEEPSPEED = """
import pickle, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file
from rlhf.algorithms.table import build
from rlhf.errors import BadInput, RunFailed
from rlhf.experience import fill_in
from rlhf.learner.paired import PairedLearner

config, steps = pickle.loads(Path(sys.argv[1]).read_bytes())
for stage, dtype in ((2, "float32"), (2, "bfloat16")):
    saved = []
    for taking_turns in (False, True):
        own = config.model_copy(update={"learner": config.learner.model_copy(
            update={"engine": "deepspeed", "zero_stage": stage, "dtype": dtype})})
        learner = PairedLearner(own, build(own.algorithm), 0, 1, None)
        learner.setup()
        folder = Path(sys.argv[2]) / f"{stage}-{dtype}-{taking_turns}"
        folder.mkdir()
        for groups in steps:
            if taking_turns:
                learner.offload()
                try:
                    learner.publish()
                except RunFailed as error:
                    assert "call reload before forward" in str(error)
                else:
                    raise AssertionError("it computed with what it had given up")
                learner.reload()
            learner.update(learner.prepare(fill_in(groups, learner.annotate_share(groups))))
        if taking_turns:
            learner.offload()
            learner.reload()
        learner.policy._engine.save(folder)
        saved.append(load_file(folder / "state-00000.safetensors"))
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0]), (stage, dtype)
for stage in (0, 1, 3):
    own = config.model_copy(update={"learner": config.learner.model_copy(
        update={"engine": "deepspeed", "zero_stage": stage})})
    learner = PairedLearner(own, build(own.algorithm), 0, 1, None)
    learner.setup()
    try:
        learner.offload()
    except BadInput as error:
        assert f"learner.zero_stage={stage}" in str(error)
    else:
        raise AssertionError(stage)
"""


@pytest.mark.soak
def test_so_does_one_of_deepspeed(
    tiny_run: Callable[..., RunConfig], sampled_groups: Callable[..., list[Group]], tmp_path: Path
) -> None:
    """ZeRO 2 with DeepSpeed's own offloading; the others refuse. One rank, in a process of its own; on a CPU what is
    moved stays where it is, but all references are taken apart and put together again."""
    import pickle

    steps = [sampled_groups(step, 3, 4, step, 1.0) for step in range(2)]
    order = tmp_path / "order"
    order.write_bytes(pickle.dumps((tiny_run({}, {"minibatches": 2}, {}, {}), steps)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", DEEPSPEED, str(order), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def request(prompts: Sequence[Prompt], tokens: int) -> Request:
    return Request(tuple(prompts), Sampling(1.0, 1.0, 0, tokens), 2, "sample")


def prompt(number: int) -> Prompt:
    return Prompt(number, number, 0, "?", "?", np.array([5, 6, 7 + number], dtype=np.int32), {})


@pytest.mark.parametrize("model", ["tiny", "tiny_t5"])
def test_an_engine_that_sleeps_holds_no_weights_and_samples_the_same_when_they_are_loaded_again(
    tiny_run: Callable[..., RunConfig], model: str
) -> None:
    config = tiny_run({"name": model}, {}, {}, {})
    learner = PairedLearner(config, build(config.algorithm), 0, 1, None)
    learner.setup()
    published = learner.publish()
    assert published is not None
    engine = build_sleeper(config, "rollout-0", 1)
    engine.setup()
    wanted = request([prompt(0), prompt(1)], 6)
    ask = partial(engine.generate, wanted.prompts, wanted.sampling, 2, "sample")
    engine.sleep()  # also one that never had a version
    engine.load(published)
    before = list(ask())
    engine.sleep()
    assert not any(parameter.numel() for parameter in engine._model.parameters())
    with pytest.raises(RunFailed, match="sleeps and has given its weights up"):
        next(iter(ask()))
    engine.load(published)
    for old, new in zip(before, ask(), strict=True):
        for a, b in zip(old.samples, new.samples, strict=True):
            assert np.array_equal(a.token_ids, b.token_ids)
            assert a.behavior_logprobs.tobytes() == b.behavior_logprobs.tobytes()
    begun = ask()
    next(begun)
    with pytest.raises(RunFailed, match="asked to sleep with samples in flight"):
        engine.sleep()
    begun.close()
    other = build_generator(config, "rollout-1", 1)
    with pytest.raises(RunFailed, match="was not built to take turns"):
        other.sleep()


def test_the_reference_sleeps_and_says_the_same_again(
    tiny_run: Callable[..., RunConfig], sampled_groups: Callable[..., list[Group]]
) -> None:
    judge = ReferenceJudge(tiny_run({}, {}, {}, {}))
    judge.setup()
    (group,) = sampled_groups(0, 1, 3, 0, 1.0)
    before = judge.judge(group).tokens["ref_logprobs"]
    judge.sleep()
    with pytest.raises(RunFailed, match="sleeps: call wake"):
        judge.judge(group)
    judge.wake()
    for old, new in zip(before, judge.judge(group).tokens["ref_logprobs"], strict=True):
        assert old.tobytes() == new.tobytes()


# Whose turn it is, with stand-ins for models.


class OneGpu:
    """Refuses two holders; the order in which it was held."""

    def __init__(self) -> None:
        self.holders: list[str] = ["samplers"]
        self._free = False

    def give_up(self, who: str) -> None:
        if not self._free and self.holders[-1] == who:
            self._free = True

    def take(self, who: str) -> None:
        if not self._free and self.holders[-1] == who:
            return
        assert self._free, f"{who} came while {self.holders[-1]} had the GPU"
        self.holders.append(who)
        self._free = False

    def used_by(self, who: str) -> None:
        assert self.holders[-1] == who and not self._free, f"{who} computed without the GPU"


class OffloadingCounter(CountingLearner):
    def __init__(self, gpu: OneGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def offload(self) -> None:
        self._gpu.give_up("learner")

    def reload(self) -> None:
        self._gpu.take("learner")

    def update(self, batch: list[Group]) -> Any:
        self._gpu.used_by("learner")
        return super().update(batch)

    def publish(self) -> Any:
        self._gpu.used_by("learner")
        return super().publish()

    def save(self, folder: Path) -> None:
        self._gpu.used_by("learner")


class Supply:
    def prompt(self, prompt_id: int) -> Prompt:
        return prompt(prompt_id)


class Saves:
    """A chronicle that saves and evaluates after every step."""

    def __init__(self, team: Team, source: PolicySource, gpu: OneGpu) -> None:
        self._team, self._source, self._gpu = team, source, gpu
        self.answers = 0

    def step_at(self, step: int, phase: str) -> None:
        """Not looked at."""

    def step_done(self, step: int, measured: Any) -> None:
        """Not looked at."""

    def evaluate_if_due(self, updates: int) -> None:
        self.answers += len(self._source.answer([prompt(900), prompt(901)], Sampling(0.0, 1.0, 0, 4)))

    def checkpoint_if_due(self, updates: int) -> None:
        self._team.learner.save(Path("unused"))


class Bench:
    """The real loop, source, ledger and turns around made-up models on one GPU that allows one holder."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.gpu = OneGpu()
        self.generator, self.steps = MadeUpGenerator(7), steps
        self.buffer = ExperienceBuffer(folder / "experience.db", frozenset({REWARD}), None, 3)
        self.buffer.open()

        def work(asked: Request) -> Iterator[tuple[int, Any]]:
            for answer in answers(self.generator, asked):
                self.gpu.used_by("samplers")
                yield answer

        def load(published: Any) -> Any:
            self.gpu.take("samplers")
            return self.generator.load(published)

        self.rollouts = SleepingLocalWorkers("rollout-0", work, load, partial(self.gpu.give_up, "samplers"), None)
        judges = LocalWorkers("reward", partial(judgement, LengthJudge()), None)
        desk = JudgeDesk("reward", frozenset({REWARD}), True, judges)
        self.learner = OffloadingCounter(self.gpu)
        learner, rollouts, desks = take_turns(self.learner, self.rollouts, [desk])
        wanted = Demand(3, steps, 0, 2, Sampling(1.0, 1.0, 0, 6), 60.0)
        self.source = PolicySource(wanted, Supply(), self.buffer, rollouts, desks, lambda: False)
        self.team = Team(self.source, learner, self.buffer)


def test_the_gpu_has_one_holder_at_a_time_and_changes_hands_no_more_than_it_must(tmp_path: Path) -> None:
    """With a checkpoint and an evaluation after every step, and the prompts that are trained without turns."""
    bench = Bench(tmp_path, 3)
    loop = LoopConfig(num_steps=3, groups_per_step=3)
    told = Saves(bench.team, bench.source, bench.gpu)
    assert train(bench.team, loop, told, lambda: False) == 3
    # publish and load, evaluate and sample, then each step: train, publish, load; save; evaluate and sample
    assert bench.gpu.holders == ["samplers", *["learner", "samplers"] * (1 + 2 * 3)]
    assert bench.learner.trained == [[0, 1, 2], [3, 4, 5], [6, 7, 8]] and told.answers == 8
    counts = bench.buffer.counts()
    assert (counts.trained, counts.lost, counts.duplicated) == (9, 0, 0)


def test_what_an_engine_was_at_when_the_learner_takes_its_turn_is_given_back(tmp_path: Path) -> None:
    """As when a run is stopped while it samples: the state is saved at once, and every prompt is still there."""
    bench = Bench(tmp_path, 1)
    bench.source.sync(bench.team.learner.publish())
    engines = bench.source._rollouts
    engines.collect(0)
    bench.source._admit()
    first = engines.collect(0)  # one of three
    bench.team.learner.save(Path("unused"))
    assert bench.gpu.holders[-1] == "learner"
    lost = [result for result in bench.rollouts.collect(0) if result.error is not None]
    assert len(first) == 1 and {number for result in lost for number in result.prompt_ids} == {1, 2}
    assert all(isinstance(result.error, WorkerLost) and not result.error.counted for result in lost)


def test_a_change_of_turns_that_fails_is_made_whole_by_the_next() -> None:
    class Dying(OffloadingCounter):
        deaths = 1

        def offload(self) -> None:
            if self.deaths:
                self.deaths -= 1
                raise TrainerDied("rank 0 ended")
            super().offload()

    gpu = OneGpu()
    learner = Dying(gpu)
    engine = SleepingLocalWorkers(
        "rollout-0", None, lambda _: gpu.take("samplers"), lambda: gpu.give_up("samplers"), None
    )
    turns = Turns(learner, [engine])
    turns.learner()
    published = learner.publish()
    with pytest.raises(TrainerDied):
        turns.new_weights(engine, published)
    turns.learner()
    gpu.used_by("learner")
    turns.new_weights(engine, published)
    gpu.used_by("samplers")


# Whole runs.


def run(folder: Path, name: str, cluster: str, *, in_process: bool, stop_after: int | None = None) -> Path:
    config, run_dir = load_run(folder / "run.yaml", []), folder / name
    run_dir.mkdir(exist_ok=True)
    if stop_after is not None:
        config = config.model_copy(update={"loop": config.loop.model_copy(update={"num_steps": stop_after})})
    found = launch.run(
        config,
        load_cluster(folder / cluster, []),
        run_dir,
        check_prompts(config),
        in_process=in_process,
        observer=Several([]),
    )
    assert found == "done"
    return run_dir


class Watch:
    """Looks into the actors of a team whenever its turns change. Kills an engine once, while it sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, list[int], list[int]]] = []  # whose turn, numbers that each rank and engine holds
        self.places: dict[str, list[str]] = {}  # Ray's GPUs of the trainer and of each engine
        self.killed: list[str] = []
        learner_turn, new_weights = Turns.learner, Turns.new_weights

        def watched_learner(turns: Turns) -> None:
            changes = turns._whose != "learner"
            learner_turn(turns)
            if changes:
                self._look(turns, "learner")
                self._kill_once(turns)

        def watched_weights(turns: Turns, rollouts: Any, published: Any) -> Any:
            receipts = new_weights(turns, rollouts, published)
            until(rollouts, ("ready",))
            self._look(turns, "samplers")
            return receipts

        monkeypatch.setattr(Turns, "learner", watched_learner)
        monkeypatch.setattr(Turns, "new_weights", watched_weights)

    def _look(self, turns: Turns, whose: str) -> None:
        import ray

        def of_rank(actor: Any) -> tuple[int, list[str]]:
            held = sum(each.numel() for each in actor._learner._engine.policy.parameters())
            return held, ray.get_runtime_context().get_accelerator_ids()["GPU"]

        def of_engine(actor: Any) -> tuple[int, list[str]]:
            held = sum(each.numel() for each in actor._generator._model.parameters())
            return held, ray.get_runtime_context().get_accelerator_ids()["GPU"]

        ranks = ray.get([rank.__ray_call__.remote(of_rank) for rank in turns._learner._policy.ranks])
        up = [worker for worker in turns._samplers[0]._workers if worker.phase in ("ready", "asleep")]
        engines = ray.get([worker.actor.__ray_call__.remote(of_engine) for worker in up])
        self.seen.append((whose, [held for held, _ in ranks], [held for held, _ in engines]))
        self.places["trainer"] = ranks[0][1]
        self.places.update({worker.name: ids for worker, (_, ids) in zip(up, engines, strict=True)})

    def _kill_once(self, turns: Turns) -> None:
        """The pool would find an idle one dead by its missing sign of life; it is told."""
        pool: Any = turns._samplers[0]
        if len(self.seen) > 2 and not self.killed:
            worker = pool._workers[1]
            with pool._changed:
                pool._lose(worker, "died", "killed by the test", counted=False)
            self.killed.append(worker.name)
            until(pool, ("asleep", "waiting its turn"))


def until(pool: Any, phases: Sequence[str]) -> None:
    """Until every worker of a pool is in one of the phases."""
    deadline = time.monotonic() + 200
    with pool._changed:
        while not all(worker.phase in phases for worker in pool._workers):
            assert time.monotonic() < deadline, [(worker.name, worker.phase) for worker in pool._workers]
            pool._changed.wait(0.1)


@pytest.mark.slow
@pytest.mark.ray
def test_on_ray_ranks_and_engines_share_a_gpu_by_turns_and_the_result_is_the_same(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer and two engines on two GPUs of Ray's counting, a reference beside the trainer. An engine is killed in
    its sleep: another one waits with its set-up for its turn."""
    watch = Watch(monkeypatch)
    with logical_gpus(8):
        together = run(workplace, "together", "together.yaml", in_process=False)
    apart = run(workplace, "apart", "apart.yaml", in_process=True)
    ours, theirs = weights(together), weights(apart)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for whose, ranks, engines in watch.seen:
        assert ranks and engines, watch.seen
        assert all(bool(held) == (whose == "learner") for held in ranks), watch.seen
        assert all(bool(held) == (whose == "samplers") for held in engines), watch.seen
    order = [whose for whose, _, _ in watch.seen]
    assert order.count("samplers") == 3 and order[:2] == ["learner", "samplers"], "versions 0, 1 and 2"
    places = watch.places
    assert watch.killed == ["rollout-1"] and set(places) == {"trainer", "rollout-0", "rollout-1", "rollout-1.1"}
    assert all(len(ids) == 1 for ids in places.values())
    assert places["trainer"] == places["rollout-0"] != places["rollout-1"] == places["rollout-1.1"]


@contextmanager
def logical_gpus(count: int) -> Iterator[None]:
    """Ray with GPUs that it only counts."""
    import ray

    ray.init(num_cpus=8, num_gpus=count, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_in_one_process_runs_that_take_turns_stop_resume_and_evaluate_as_others_do(workplace: Path) -> None:
    """A run that is ended after a step and goes on, together; one that is not interrupted, apart."""
    run(workplace, "together", "together.yaml", in_process=True, stop_after=1)
    together = run(workplace, "together", "together.yaml", in_process=True)
    apart = run(workplace, "apart", "apart.yaml", in_process=True)
    ours, theirs = weights(together), weights(apart)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    rows = [
        [json.loads(line) for line in (d / "evaluations.jsonl").read_text().splitlines()] for d in (together, apart)
    ]
    assert rows[0][-1] == rows[1][-1]


def test_a_task_that_was_not_begun_is_kept_by_an_engine_that_sleeps() -> None:
    engine = SleepingLocalWorkers("rollout-0", partial(answers, MadeUpGenerator(7)), None, lambda: None, lambda: None)
    for number in (0, 1):
        engine.submit(Task(number, (number,), request([prompt(number)], 4)), None)
    engine.sleep()
    engine.wake()
    assert [engine.collect(0)[0].prompt_ids for _ in range(2)] == [(0,), (1,)]


@pytest.mark.gpu
@pytest.mark.vllm
def test_vllm_gives_its_gpu_up_and_samples_the_same_again(tiny_run: Callable[..., RunConfig]) -> None:
    """Never run yet, for want of a GPU: the memory that sleep frees, and tokens and log-probs before and after."""
    plain = tiny_run({}, {}, {}, {}).model_dump()
    plain["generation"] |= {"engine": "vllm", "gpu_memory_fraction": 0.4}
    config = RunConfig.model_validate(plain)
    learner = PairedLearner(config, build(config.algorithm), 0, 1, None)
    learner.setup()
    published = learner.publish()
    assert published is not None
    learner.offload()
    engine = build_sleeper(config, "rollout-0", 1)
    engine.setup()
    try:
        wanted = request([prompt(0), prompt(1)], 16)
        ask = partial(engine.generate, wanted.prompts, wanted.sampling, 2, "sample")
        engine.load(published)
        before = {group.prompt.id: group for group in ask()}
        used, _ = torch.cuda.mem_get_info()
        engine.sleep()
        free, whole = torch.cuda.mem_get_info()
        assert free - used > 0.3 * whole
        engine.load(published)
        for group in ask():
            for old, new in zip(before[group.prompt.id].samples, group.samples, strict=True):
                assert np.array_equal(old.token_ids, new.token_ids)
                assert np.allclose(old.behavior_logprobs, new.behavior_logprobs, atol=1e-5)
    finally:
        engine.close()
