"""DeepSpeed on two gloo ranks against plain torch in one process. Not covered: NCCL, more than one machine.

Ranks are processes of their own, because a process joins one process group in its life. A launch takes seconds, so one
launch answers several questions about one ZeRO stage.
"""

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.algorithms.table import build
from rlhf.config import RunConfig
from rlhf.experience import VALUES, Columns, Group, fill_in
from rlhf.learner.paired import PairedLearner
from rlhf.metrics import Metrics, merge, values
from rlhf.weights import Weights, verify_names

# With eps 1 the first step of AdamW is lr g / (|g| + 1): differences of parameters are those of gradients.
LINEAR = {"adam_eps": 1.0, "lr": 0.1, "max_grad_norm": 1.0, "minibatches": 2, "tokens_per_microbatch": 48}
TOLERANCE = 1e-6

RANK = """
import math, pickle, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from rlhf.algorithms.table import build
from rlhf.experience import fill_in
from rlhf.learner.paired import PairedLearner

rank, world, meeting_point = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
order, folder = Path(sys.argv[4]), Path(sys.argv[5])
config, steps = pickle.loads(order.read_bytes())
plain = build(config.algorithm)
poison = [1.0]

def loss(outputs, batch):
    sums = plain.loss(outputs, batch)
    return sums._replace(loss=sums.loss * poison[0])

learner = PairedLearner(config, plain._replace(loss=loss), rank, world, meeting_point if world > 1 else None)
learner.setup()

def train(groups):
    columns = learner.annotate_share(groups)
    # The driver merges what the ranks filled in; here they meet on disk.
    (folder / f"columns-{learner.version}-{rank}.tmp").write_bytes(pickle.dumps(columns))
    (folder / f"columns-{learner.version}-{rank}.tmp").rename(folder / f"columns-{learner.version}-{rank}")
    torch.distributed.barrier()
    shares = [pickle.loads((folder / f"columns-{learner.version}-{r}").read_bytes()) for r in range(world)]
    return learner.update(learner.prepare(fill_in(groups, [c for share in shares for c in share])))

found = {"metrics": [], "weights": []}
for groups in steps[:-1]:
    found["metrics"].append(train(groups))
    found["weights"].append(learner.publish())
learner.save(folder)
torch.distributed.barrier()
found["columns"] = learner.annotate_share(steps[-1])
train(steps[-1])
found["went on"] = learner.publish()
learner.load(folder)
found["version"] = learner.version
found["loaded"] = learner.publish()
train(steps[-1])
found["repeated"] = learner.publish()
poison[0] = math.nan if rank == world - 1 else 1.0
found["skipped"] = train(steps[-1])
found["unharmed"] = learner.publish()
(folder / f"found-{rank}").write_bytes(pickle.dumps(found))
learner.close()
"""

CRITIC_RANK = """
import pickle, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from rlhf.algorithms.table import build
from rlhf.learner.critic import CriticLearner

rank, world, meeting_point = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
order, folder = Path(sys.argv[4]), Path(sys.argv[5])
config, steps = pickle.loads(order.read_bytes())
learner = CriticLearner(config, build(config.algorithm), rank, world, meeting_point)
learner.setup()
found = {"columns": [], "metrics": []}
for number, (groups, batch) in enumerate(steps):
    if number == 2:
        learner.save(folder)
        torch.distributed.barrier()
    found["columns"].append(learner.annotate_share(groups))
    found["metrics"].append(learner.update(batch))
found["columns"].append(learner.annotate_share(groups))
learner.load(folder)
found["version"] = learner.version
learner.update(batch)
found["repeated"] = learner.annotate_share(groups)
(folder / f"found-{rank}").write_bytes(pickle.dumps(found))
learner.close()
"""


def launch(script: str, config: RunConfig, steps: Sequence[Any], world: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank found."""
    order = folder / "order"
    order.write_bytes(pickle.dumps((config, steps)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting_point = f"127.0.0.1:{probe.getsockname()[1]}"
    ranks = []
    for rank in range(world):
        log = (folder / f"log-{rank}").open("w")
        command = [sys.executable, "-c", script, str(rank), str(world), meeting_point, str(order), str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    try:
        codes = [process.wait(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0] * world, (folder / "log-0").read_text()[-4000:]
    return [pickle.loads((folder / f"found-{rank}").read_bytes()) for rank in range(world)]


def in_one_process(config: RunConfig, steps: list[list[Group]]) -> tuple[list[Weights], list[Metrics]]:
    learner = PairedLearner(config, build(config.algorithm), 0, 1, None)
    learner.setup()
    weights, measured = [], []
    for groups in steps:
        measured.append(learner.update(learner.prepare(fill_in(groups, learner.annotate_share(groups)))))
        published = learner.publish()
        assert published is not None
        weights.append(published)
    return weights, measured


def tensors(weights: Weights) -> dict[str, Tensor]:
    return {name: tensor.unpack().float() for name, tensor in weights.tensors.items()}


def furthest(one: Weights, other: Weights) -> float:
    mine, theirs = tensors(one), tensors(other)
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


@pytest.fixture
def steps(sampled_groups: Callable[..., list[Group]]) -> list[list[Group]]:
    """Uneven batches, so that ranks get fillers: 16 rows, then 3 rows, then 16."""
    return [
        sampled_groups(0, 4, 4, 0, 0.05),
        sampled_groups(1, 1, 3, 1, 0.05),
        sampled_groups(2, 4, 4, 2, 0.05),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "model"),
    [
        (0, {"name": "tiny"}),
        (2, {"name": "tiny-untied", "lora": {"rank": 4}}),
        (2, {"name": "tiny"}),
        (3, {"name": "tiny"}),
        (3, {"name": "tiny_t5", "lora": {"rank": 4}}),
    ],
)
def test_two_ranks_equal_one_process(
    tiny_run: Callable[..., RunConfig],
    steps: list[list[Group]],
    tmp_path: Path,
    stage: int,
    model: Mapping[str, Any],
) -> None:
    """Gradients to 1e-6 over four optimizer steps, metrics, publication, checkpoints, a NaN on one rank only.

    Traps 30, 33, 51, 63 and 75. Annotation is split over ranks and put together again.
    """
    config = tiny_run(model, {**LINEAR, "engine": "deepspeed", "zero_stage": stage}, {}, {})
    alone = tiny_run(model, LINEAR, {}, {})
    torch.set_num_threads(1)
    weights, measured = in_one_process(alone, steps)
    ranks = launch(RANK, config, steps, 2, tmp_path)
    first = ranks[0]

    for mine, theirs in zip(first["weights"], weights, strict=False):
        verify_names(mine, {name: tensor.shape for name, tensor in theirs.tensors.items()}, "DeepSpeed")
        assert furthest(mine, theirs) <= TOLERANCE
        assert abs(mine.probe.logprobs - theirs.probe.logprobs).max() <= 1e-5
    assert furthest(first["weights"][0], weights[1]) > 10 * TOLERANCE, "control: the steps differ"
    assert all(rank["weights"] == [None, None] for rank in ranks[1:])

    for step, expected in enumerate(measured[:2]):
        merged = values(merge([rank["metrics"][step] for rank in ranks]))
        assert merged == pytest.approx(values(expected), rel=1e-4, abs=1e-6)
        assert merged["grad_norm"] > 0.01

    columns = [column.prompt_id for rank in ranks for column in rank["columns"]]
    assert sorted(columns) == [0, 1, 2, 3]

    assert first["version"] == 2
    assert first["loaded"].fingerprint == first["weights"][1].fingerprint
    assert furthest(first["went on"], weights[2]) <= TOLERANCE
    assert furthest(first["repeated"], first["went on"]) <= 1e-7
    merged = values(merge([rank["skipped"] for rank in ranks]))
    assert merged["faults/nonfinite_step"] == 2
    assert furthest(first["unharmed"], first["repeated"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_one_rank_in_bfloat16_follows_plain_torch(
    tiny_run: Callable[..., RunConfig], steps: list[list[Group]], tmp_path: Path, stage: int
) -> None:
    """Published values differ by at most a few units in the last place of bfloat16; masters are float32 in both."""
    settings = {**LINEAR, "dtype": "bfloat16", "minibatches": 1}
    weights, _ = in_one_process(tiny_run({}, settings, {}, {}), steps)
    found = launch(
        RANK, tiny_run({}, {**settings, "engine": "deepspeed", "zero_stage": stage}, {}, {}), steps, 1, tmp_path
    )[0]
    for mine, theirs in zip(found["weights"], weights, strict=False):
        assert {tensor.dtype for tensor in mine.tensors.values()} == {"bfloat16"}
        ours, others = tensors(mine), tensors(theirs)
        for name, tensor in ours.items():
            assert torch.allclose(tensor, others[name], rtol=2**-6, atol=2e-3), name
    assert furthest(found["repeated"], found["went on"]) <= 2e-3
    assert values(found["skipped"])["faults/nonfinite_step"] == 1
    assert furthest(found["unharmed"], found["repeated"]) == 0


@pytest.mark.slow
def test_a_reward_model_with_adapters_follows_plain_torch(
    tiny_run: Callable[..., RunConfig], steps: list[list[Group]], tmp_path: Path
) -> None:
    """ZeRO 2 on one rank: adapters and the whole head to 1e-6, and what is saved is taken back bit for bit."""

    def config(learner: Mapping[str, Any]) -> RunConfig:
        plain = tiny_run({"lora": {"rank": 4}}, {**LINEAR, **learner}, {}, {})
        scores = {"algorithm": {"name": "reward_model"}, "generation": None, "reward": None}
        return RunConfig.model_validate({**plain.model_dump(exclude_unset=True), **scores})

    def ranked(group: Group) -> Group:
        samples = (replace(sample, scores={"rank": float(sample.index)}) for sample in group.samples)
        return replace(group, samples=tuple(samples))

    ordered = [[ranked(group) for group in groups] for groups in (steps[0], steps[2], steps[0])]
    weights, measured = in_one_process(config({}), ordered)
    found = launch(RANK, config({"engine": "deepspeed", "zero_stage": 2}), ordered, 1, tmp_path)[0]
    for mine, theirs in zip(found["weights"], weights, strict=False):
        assert furthest(mine, theirs) <= TOLERANCE
    assert furthest(found["weights"][0], weights[1]) > 10 * TOLERANCE, "control: the steps differ"
    assert values(found["metrics"][1]) == pytest.approx(values(measured[1]), rel=1e-4, abs=1e-6)
    assert found["loaded"].fingerprint == found["weights"][1].fingerprint
    assert furthest(found["repeated"], found["went on"]) == 0


@pytest.mark.slow
def test_a_critic_on_two_ranks_of_its_own_equals_one_beside_its_policy(
    tiny_run: Callable[..., RunConfig], steps: list[list[Group]], tmp_path: Path
) -> None:
    """The policy on one rank, its critic on two of ZeRO-3 in a process group of their own: values, losses and gradient
    norms are those of both in one process. A checkpoint of three processes: the two ranks go on from it with the same
    bits, and one process goes on from it too."""

    def config(learner: Mapping[str, Any]) -> RunConfig:
        plain = tiny_run({}, {**LINEAR, **learner}, {}, {})
        ppo = {"name": "ppo", "samples_per_prompt": 4, "kl": {"coef": 0.0}, "critic": {"lr": 0.1}}
        return RunConfig.model_validate({**plain.model_dump(exclude_unset=True), "algorithm": ppo})

    def values_in(shares: Sequence[Columns]) -> dict[int, np.ndarray]:
        found = {share.prompt_id: np.concatenate(share.tokens[VALUES]) for share in shares if VALUES in share.tokens}
        return found

    def furthest_values(one: Sequence[Columns], other: Sequence[Columns]) -> float:
        mine, theirs = values_in(one), values_in(other)
        assert mine.keys() == theirs.keys()
        return max(float(np.abs(mine[number] - theirs[number]).max()) for number in theirs)

    torch.set_num_threads(1)
    both = PairedLearner(config({}), build(config({}).algorithm), 0, 1, None)
    both.setup()
    handed, columns, measured = [], [], []
    for number, groups in enumerate(steps):
        if number == 2:
            both.policy.save(tmp_path)  # the critic's part is that of the two ranks
        columns.append(both.annotate_share(groups))
        batch = both.prepare(fill_in(groups, columns[-1]))
        handed.append((groups, batch))
        measured.append(both.update(batch))
    columns.append(both.annotate_share(steps[2]))

    ranks = launch(CRITIC_RANK, config({"engine": "deepspeed", "zero_stage": 3}), handed, 2, tmp_path)
    for step, expected in enumerate(columns):
        shares = [share for rank in ranks for share in rank["columns"][step]]
        assert furthest_values(shares, expected) <= 1e-5
    assert furthest_values(columns[3], columns[2]) > 1e-3, "control: a step moves the values"
    for step, expected in enumerate(measured):
        merged = values(merge([rank["metrics"][step] for rank in ranks]))
        assert merged == pytest.approx({name: values(expected)[name] for name in merged}, rel=1e-3, abs=1e-5)
        assert merged.keys() == {"loss/value", "clip/value_fraction", "value/grad_norm", "value/lr"}
    for rank in ranks:
        assert rank["version"] == 2
        went_on, repeated = values_in(rank["columns"][3]), values_in(rank["repeated"])
        assert all(np.array_equal(went_on[number], repeated[number]) for number in went_on)

    again = PairedLearner(config({}), build(config({}).algorithm), 0, 1, None)
    again.setup()
    again.load(tmp_path)
    assert furthest_values(again.annotate_share(steps[2]), columns[2]) <= 1e-5
    again.update(handed[2][1])
    assert furthest_values(again.annotate_share(steps[2]), columns[3]) <= 1e-5
