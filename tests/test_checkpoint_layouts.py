"""A checkpoint loads on another engine, another ZeRO stage, another number of ranks; on the same ones bitwise.

Two gloo ranks go through all layouts in one launch, because starting them takes seconds. Not covered: NCCL, more than
one machine, more than two ranks.
"""

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.algorithms.table import build
from rlhf.config import RunConfig
from rlhf.experience import Group, fill_in
from rlhf.learner.paired import PairedLearner
from rlhf.learner.state import INDEX_FILE
from rlhf.weights import Weights

# eps is small enough for the second moment to matter and large enough for rounding not to decide a direction.
LEARNER = {"adam_eps": 1e-3, "lr": 0.01, "weight_decay": 0.1, "minibatches": 2, "tokens_per_microbatch": 48}
TOLERANCE = 2e-5

RANKS = """
import pickle, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from rlhf.algorithms.table import build
from rlhf.experience import fill_in
from rlhf.learner import deepspeed_engine
from rlhf.learner.paired import PairedLearner

rank, world, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
cases, steps = pickle.loads((folder / "order").read_bytes())
# A process joins one group in its life, so all cases share it: joined before the first, and not theirs to leave.
deepspeed_engine.join(rank, world, f"127.0.0.1:{port}")

def learner_of(config):
    learner = PairedLearner(config, build(config.algorithm), rank, world, None)
    learner.setup()
    return learner

def train(learner, step, meeting):
    spot = folder / f"columns-{name}-{meeting}"
    spot.with_name(spot.name + f".{rank}").write_bytes(pickle.dumps(learner.annotate_share(steps[step])))
    torch.distributed.barrier()
    shares = [pickle.loads(spot.with_name(spot.name + f".{r}").read_bytes()) for r in range(world)]
    learner.update(learner.prepare(fill_in(steps[step], [c for share in shares for c in share])))

found = {}
for name, (config, start) in cases[world].items():
    seen = found[name] = {}
    learner = learner_of(config)
    learner.load(start)
    seen["loaded"] = learner.publish()
    train(learner, 2, "first")
    (folder / name).mkdir(exist_ok=True)
    learner.save(folder / name)
    train(learner, 3, "on")
    seen["went on"] = learner.publish()
    learner.close()
    learner = learner_of(config)
    learner.load(folder / name)
    seen["version"] = learner.version
    train(learner, 3, "resumed")
    seen["resumed"] = learner.publish()
    learner.close()
(folder / f"found-{world}-{rank}").write_bytes(pickle.dumps(found))
"""

LAYOUTS: Mapping[str, tuple[int, Mapping[str, Any], Mapping[str, Any], int]] = {
    # name: (ZeRO stage, model section, learner section, ranks)
    "zero 0": (0, {}, {}, 2),
    "zero 1": (1, {}, {}, 2),
    "zero 2": (2, {}, {}, 2),
    "zero 3": (3, {}, {}, 2),
    "zero 2, one rank": (2, {}, {}, 1),
    "zero 3, LoRA": (3, {"name": "tiny-untied", "lora": {"rank": 3}}, {}, 2),
    "zero 0, bfloat16": (0, {}, {"dtype": "bfloat16"}, 2),
    "zero 1, bfloat16": (1, {}, {"dtype": "bfloat16"}, 2),
    "zero 3, bfloat16": (3, {}, {"dtype": "bfloat16"}, 2),
    "zero 3, critic": (3, {}, {}, 2),
}


@pytest.fixture
def config_of(tiny_run: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """The run file of a layout, on its DeepSpeed engine or, with torch, in one process."""

    def build_config(layout: str, *, torch_engine: bool) -> RunConfig:
        stage, model, learner, _ = LAYOUTS[layout]
        engine = {} if torch_engine else {"engine": "deepspeed", "zero_stage": stage}
        plain = tiny_run(model, {**LEARNER, **learner, **engine}, {}, {})
        if "critic" not in layout:
            return plain
        ppo = {"name": "ppo", "samples_per_prompt": 4, "kl": {"coef": 0.0}, "critic": {"lr": 0.02}}
        return RunConfig.model_validate({**plain.model_dump(exclude_unset=True), "algorithm": ppo})

    return build_config


def learner_of(config: RunConfig) -> PairedLearner:
    learner = PairedLearner(config, build(config.algorithm), 0, 1, None)
    learner.setup()
    return learner


def train(learner: PairedLearner, groups: list[Group]) -> None:
    learner.update(learner.prepare(fill_in(groups, learner.annotate_share(groups))))


def published(learner: PairedLearner) -> Weights:
    weights = learner.publish()
    assert weights is not None
    return weights


def straight(config: RunConfig, steps: list[list[Group]], folder: Path) -> tuple[Weights, Weights]:
    """Four steps in one process, saved after two: the weights then and at the end."""
    learner = learner_of(config)
    for groups in steps[:2]:
        train(learner, groups)
    learner.save(folder)
    middle = published(learner)
    for groups in steps[2:]:
        train(learner, groups)
    return middle, published(learner)


def tensors(weights: Weights) -> dict[str, Tensor]:
    return {name: tensor.unpack().float() for name, tensor in weights.tensors.items()}


def furthest(one: Weights, other: Weights) -> float:
    mine, theirs = tensors(one), tensors(other)
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


def equal_to_rounding(one: Weights, other: Weights) -> bool:
    """Where weights are published in bfloat16: to two units in their last place."""
    if all(tensor.dtype == "float32" for tensor in one.tensors.values()):
        return furthest(one, other) <= TOLERANCE
    mine, theirs = tensors(one), tensors(other)
    return all(torch.allclose(mine[name], theirs[name], rtol=2**-6, atol=2e-3) for name in mine)


def launch(cases: Mapping[int, Mapping[str, Any]], steps: list[list[Group]], folder: Path) -> dict[str, dict[str, Any]]:
    """What rank 0 found in each case; cases by the number of ranks."""
    (folder / "order").write_bytes(pickle.dumps((cases, steps)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = []
    for world in cases:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(world):
            command = [sys.executable, "-c", RANKS, str(rank), str(world), str(port), str(folder)]
            log = (folder / f"log-{world}-{rank}").open("w")
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    try:
        codes = [process.wait(timeout=280) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert set(codes) == {0}, "".join(log.read_text()[-3000:] for log in sorted(folder.glob("log-*")))
    found: dict[str, dict[str, Any]] = {}
    for world in cases:
        found |= pickle.loads((folder / f"found-{world}-0").read_bytes())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts",
    [
        ["zero 0", "zero 2, one rank", "zero 2", "zero 3, LoRA", "zero 1, bfloat16"],
        pytest.param(list(LAYOUTS), marks=pytest.mark.soak),
    ],
    ids=["some", "all"],
)
def test_every_layout_goes_on_from_every_other(
    config_of: Callable[..., RunConfig],
    sampled_groups: Callable[..., list[Group]],
    tmp_path: Path,
    layouts: list[str],
) -> None:
    """torch writes, each layout reads, trains, writes; itself and torch read that. Loaded weights are the same bits
    everywhere; on the same layout later ones too; on another they agree to rounding, with a control: moments at zero
    lead more than ten times as far away."""
    torch.set_num_threads(1)
    steps = [sampled_groups(step, 4, 4, step, 0.05) for step in range(4)]
    start: dict[str, Weights] = {}
    whole: dict[str, Weights] = {}
    cases: dict[int, dict[str, Any]] = {1: {}, 2: {}}
    for layout in layouts:
        ranks = LAYOUTS[layout][-1]
        alone = config_of(layout, torch_engine=True)
        folder = tmp_path / f"start {alone.algorithm.name} {alone.learner.dtype} {alone.model.name}"
        if not folder.exists():
            folder.mkdir()
            start[folder.name], whole[folder.name] = straight(alone, steps, folder)
        cases[ranks][layout] = (config_of(layout, torch_engine=False), folder)
    found = launch(cases, steps, tmp_path)

    for layout, seen in found.items():
        alone = config_of(layout, torch_engine=True)
        kind = f"start {alone.algorithm.name} {alone.learner.dtype} {alone.model.name}"
        assert seen["loaded"].fingerprint == start[kind].fingerprint, layout
        assert seen["version"] == 3
        assert equal_to_rounding(seen["went on"], whole[kind]), layout
        assert seen["resumed"].fingerprint == seen["went on"].fingerprint, layout
        learner = learner_of(alone)
        learner.load(tmp_path / layout)
        assert learner.version == 3
        train(learner, steps[3])
        assert equal_to_rounding(published(learner), whole[kind]), layout

    forgetful = learner_of(config_of("zero 2", torch_engine=True))
    forgetful.load(tmp_path / "zero 2")
    forgetful.policy._engine._optimizer.state.clear()
    train(forgetful, steps[3])
    away = whole["start rloo float32 tiny"]
    assert furthest(published(forgetful), away) > 10 * TOLERANCE
    assert not list(tmp_path.rglob("*.pt")), "a pickle in a checkpoint"
    assert ("zero 3, critic" in layouts) == bool(list(tmp_path.glob(f"zero 3, critic/trainer/critic/{INDEX_FILE}")))
