"""Runs on Ray clusters of several nodes on this machine: real raylets, the real command line.

Not covered: nodes that are other machines (test_cluster_hosts.py), an autoscaler (test_cluster_autoscaler.py), GPUs.
"""

import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ray_nodes import DEADLINE_S, ENVIRONMENT, RLHF, Nodes, Run, ledger, policy, rlhf, seen, workplace

from rlhf.buffer.schema import FILE_NAME, read_meta, reader

BAD_INPUT = 2
NO_CAPACITY = 3
INTERRUPTED = 130
START_S = 900.0  # of the long tests: a busy machine takes minutes to start five nodes and the run's processes
SMALL = {role: {"cpus": 0.1} for role in ("reference", "reward", "buffer")}


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    cluster = Nodes(tmp_path / "ray.log")
    yield cluster
    cluster.end()


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Four nodes for the short tests; one may lose a node that the other one does not need."""
    cluster = Nodes(tmp_path_factory.mktemp("four") / "ray.log")
    four_nodes(cluster, 1)
    yield cluster
    cluster.end()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs in one folder; nothing of them outlives the test."""
    folder, runs = workplace(tmp_path), []

    def build(cluster: Mapping[str, Any], name: str, *settings: str) -> Run:
        runs.append(Run(folder, cluster, name, *settings))
        return runs[-1]

    yield build
    for run in runs:
        run.end()


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_too_big_ends_with_3_and_says_why_and_one_that_must_wait_runs(
    four: Nodes, start: Callable[..., Run]
) -> None:
    """Three CPUs for one engine, where there are five but at most two on a node: the run gives up at its deadline. An
    engine that needs what no node has: the run waits, and gets the node that comes."""
    joined = {"address": four.address, "threads_per_role": 1, "trainer": {"cpus": 0.1}, **SMALL}
    wide = start({**joined, "placement_timeout_s": 9, "rollout": {"cpus": 3}}, "wide")
    spot = {"rollout": {"cpus": 0.1, "resources": {"spot": 1}}}
    slow = start({**joined, "placement_timeout_s": 600, **spot}, "slow")
    said = wide.wait(NO_CAPACITY)
    assert "no single node holds one rollout (CPU: 3), though all together would; they have CPU: 1; CPU: 2." in said
    assert "1 of 1 rollout" in said and "What would fit: 1 of 1 trainer" in said
    assert "waiting for places" in said
    slow.until(lambda: "Missing: spot: asked 1, there are 0" in slow.said())
    four.add("late", 1, spot=1)
    slow.wait(0)
    assert len(slow.rows()) == 2


@pytest.mark.ray
@pytest.mark.slow
def test_a_wrong_token_is_refused_with_a_remedy(four: Nodes, tmp_path: Path) -> None:
    (workplace(tmp_path) / "cluster.yaml").write_text(yaml.safe_dump({"address": four.address}))
    command = [*RLHF, "run", "plain.yaml", "--cluster", "cluster.yaml", "--run-dir", "out"]
    environment = {**ENVIRONMENT, "RAY_AUTH_TOKEN": "f" * 64}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    said = ended.stderr.splitlines()[-1]
    assert ended.returncode == BAD_INPUT, ended.stdout + ended.stderr
    assert said.startswith(f"rlhf: cluster file: address={four.address}: no Ray cluster lets this run join")
    assert "its token in RAY_AUTH_TOKEN with RAY_AUTH_MODE=token" in said and "f" * 64 not in ended.stdout + said


def four_nodes(nodes: Nodes, trainers: float) -> None:
    """The head, one node for the trainer's ranks, two for an engine each."""
    nodes.add("head", 2)
    nodes.add("trainer", 1, trainer=trainers)
    for name in ("engine-0", "engine-1"):
        nodes.add(name, 1, engine=1)


def cluster_of(address: str, ranks: int) -> dict[str, Any]:
    return {
        "address": address,
        "threads_per_role": 1,
        "trainer": {"replicas": ranks, "cpus": 0.1, "resources": {"trainer": 1}, "placement": "strict_pack"},
        "rollout": {"replicas": 2, "min_replicas": 1, "cpus": 0.1, "resources": {"engine": 1}},
        **SMALL,
    }


def assert_bitwise_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"{len(different)} of {len(left)} tensors differ: {different[:3]}"


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_an_engine_s_node_is_killed_and_four_nodes_end_as_one_process(
    four: Nodes, start: Callable[..., Run], tmp_path: Path
) -> None:
    """Four four. A clean ledger, each prompt trained once, and bitwise the parameters of the run in one process."""
    run = start(cluster_of(four.address, 1), "four", "loop.num_steps=3000")
    run.until(lambda: any(row["sync/engines"] == 2 for row in run.rows()), START_S)
    four.kill("engine-0")
    run.until(lambda: any(row["faults/workers_left"] + row["faults/workers_died"] for row in run.rows()))
    run.steps(2)
    run.process.terminate()
    run.wait(INTERRUPTED)
    steps = len(run.rows())
    assert run.rows()[-1]["sync/engines"] == 1 and not sum(row["faults/restarts"] for row in run.rows())
    settings = [f"loop.num_steps={steps}", "--cluster", "four.cluster.yaml", "--run-dir", "alone", "--in-process"]
    rlhf(tmp_path, "run", "plain.yaml", *settings)
    assert_bitwise_equal(policy(run.run_dir, steps), policy(tmp_path / "alone", steps))
    assert ledger(run.run_dir)["trained"] == ledger(tmp_path / "alone")["trained"] == steps * 4


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_ranks_on_one_of_four_nodes_survive_the_death_of_their_node(
    nodes: Nodes, start: Callable[..., Run], tmp_path: Path
) -> None:
    """Two DeepSpeed ranks that must share a node. First an engine's node dies, then theirs: the run waits for another
    one, says so, builds the ranks again there, and ends bitwise as two ranks on this machine alone, and within rounding
    as one process. Every node but the head has died at the end."""
    four_nodes(nodes, 2)
    settings = ["learner.engine=deepspeed", "learner.zero_stage=2", "loop.checkpoint_every=10"]
    cluster = {**cluster_of(nodes.address, 2), "placement_timeout_s": 900}
    run = start(cluster, "four", *settings, "loop.num_steps=3000")
    run.until(lambda: any(row["sync/engines"] == 2 for row in run.rows()), START_S)
    nodes.kill("engine-0")
    run.steps(3)
    nodes.add("engine-2", 1, engine=1)
    before = len(run.rows())
    nodes.kill("trainer")
    run.until(lambda: "waiting for places" in run.said())
    came = time.monotonic()
    nodes.add("another", 1, trainer=2)
    run.until(lambda: any(row["faults/trainer_restarts"] for row in run.rows()[before:]))
    again_s = time.monotonic() - came
    nodes.kill("engine-1")
    run.steps(3)
    run.process.terminate()
    said, steps = run.wait(INTERRUPTED), len(run.rows())
    settings.append(f"loop.num_steps={steps}")
    assert run.rows()[-1]["faults/restarts"] == 0 and "trainer alone is built again" in said
    local = {"threads_per_role": 1, "trainer": {"replicas": 2}, "rollout": {"replicas": 2}}
    start(local, "local", *settings).wait(0)
    assert_bitwise_equal(policy(run.run_dir, steps), policy(tmp_path / "local", steps))
    alone = ["--cluster", "local.cluster.yaml", "--run-dir", "alone", "--in-process"]
    rlhf(tmp_path, "run", "plain.yaml", *settings, *alone)
    one, two = policy(tmp_path / "alone", steps), policy(run.run_dir, steps)
    assert all(torch.allclose(one[name], two[name], atol=1e-5, rtol=1e-3) for name in one)
    assert ledger(run.run_dir)["trained"] == ledger(tmp_path / "local")["trained"] == steps * 4
    seen(
        "nodes",
        f"- The node of both ranks killed: they trained again {again_s:.0f} s after another node was there. The end "
        "was that of two ranks on one machine, bitwise.",
    )


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_drained_node_s_engine_leaves_and_sigterm_on_the_head_saves_for_the_next_try(
    nodes: Nodes, start: Callable[..., Run], tmp_path: Path
) -> None:
    """`ray drain-node` for the node of one of two engines: it finishes what it has and leaves, the run goes on with the
    other one and takes a new node; no prompt is generated twice. SIGTERM to the driver: saved, 130, and the same
    command ends as one process would. SIGTERM while a run waits for places ends it with 130 too."""
    four_nodes(nodes, 1)
    run = start(cluster_of(nodes.address, 1), "drained", "loop.num_steps=3000")
    run.until(lambda: any(row["sync/engines"] == 2 for row in run.rows()), START_S)
    nodes.drain("engine-0")
    before, began = len(run.rows()), time.monotonic()
    run.until(lambda: run.rows()[-1]["sync/engines"] == 1)
    left_s, without = time.monotonic() - began, len(run.rows()) - before
    assert "is drained; another is asked for" in run.said()
    run.steps(3)
    assert run.rows()[-1]["sync/engines"] == 1, "no engine came back on the drained node"
    nodes.add("engine-2", 1, engine=1)
    run.until(lambda: run.rows()[-1]["sync/engines"] == 2)
    run.process.terminate()
    run.wait(INTERRUPTED)
    faults = ["faults/restarts", "faults/workers_died", "faults/workers_hung", "faults/prompts_set_aside"]
    assert not sum(row[name] for row in run.rows() for name in faults)
    with reader(run.run_dir / FILE_NAME) as connection:
        meta = read_meta(connection)
    assert int(meta["ticket"]) == int(meta["issued"]), "one lease a prompt"
    saved = len(run.rows())
    assert (run.run_dir / f"checkpoints/step-{saved:06d}/manifest.json").exists()

    steps = saved + 2
    again = start(cluster_of(nodes.address, 1), "drained", f"loop.num_steps={steps}")
    again.wait(0)
    settings = [f"loop.num_steps={steps}", "--cluster", "drained.cluster.yaml", "--run-dir", "alone", "--in-process"]
    rlhf(tmp_path, "run", "plain.yaml", *settings)
    assert_bitwise_equal(policy(run.run_dir, steps), policy(tmp_path / "alone", steps))
    assert ledger(run.run_dir)["trained"] == steps * 4

    never = start({**cluster_of(nodes.address, 3), "placement_timeout_s": 900}, "never", "learner.engine=deepspeed")
    never.until(lambda: "waiting for places" in never.said())
    never.process.terminate()
    never.wait(INTERRUPTED)
    seen(
        "drain",
        f"- `ray drain-node` for one of two engines' nodes: its engine had left after {left_s:.0f} s, in which "
        f"{without} steps were done; no prompt was leased twice.\n"
        "- SIGTERM to the driver: a checkpoint and exit code 130; the same command ended with the parameters of an "
        "undisturbed run, bitwise.",
    )


def leases_and_prompts(run_dir: Path) -> tuple[int, int]:
    """How many leases were given, and how many prompts were issued."""
    with reader(run_dir / FILE_NAME) as connection:
        meta = read_meta(connection)
    return int(meta["ticket"]), int(meta["issued"])


def done_steps(said: str) -> list[int]:
    """The steps in the order in which they were trained."""
    return [int(found) for found in re.findall(r"^step (\d+)/", said, re.MULTILINE)]


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_trainer_leaves_a_drained_node_if_it_can_and_stays_if_it_cannot(
    nodes: Nodes, start: Callable[..., Run], tmp_path: Path
) -> None:
    """`ray drain-node` for the trainer's node, three times. A spare node is there: it saves and moves. None is there:
    it saves, says so, stays, and moves when one comes. None comes: it stays until its node dies, and goes back to the
    checkpoint of the notice. Each step but those after that checkpoint is trained once, each prompt leased once, and
    the end is bitwise that of one process. No checkpoint is due by itself."""
    four_nodes(nodes, 1)
    settings = ["loop.checkpoint_every=0", "loop.keep_checkpoints=100"]
    cluster = {**cluster_of(nodes.address, 1), "placement_timeout_s": 900}
    run = start(cluster, "drained", *settings, "loop.num_steps=3000")
    run.until(lambda: any(row["sync/engines"] == 2 for row in run.rows()), START_S)

    def moves() -> float:
        return run.rows()[-1]["faults/trainer_moves"]

    nodes.add("spare", 1, trainer=1)
    began = time.monotonic()
    nodes.drain("trainer")
    run.until(lambda: moves() == 1)
    moved_s = time.monotonic() - began
    run.steps(2)

    nodes.drain("spare")
    run.until(lambda: "there is no other place yet" in run.said())
    run.steps(3)
    assert moves() == 1 and "Missing: trainer: asked 1, there are 0" in run.said()
    nodes.add("late", 1, trainer=1)
    run.until(lambda: moves() == 2)
    run.steps(2)
    trained = done_steps(run.said())
    assert trained == list(range(1, len(trained) + 1)), "a step was trained twice"
    assert not sum(row["faults/trainer_restarts"] + row["faults/restarts"] for row in run.rows())

    nodes.drain("late")
    run.until(lambda: run.said().count("there is no other place yet") == 2)
    run.steps(3)
    nodes.kill("late")
    run.until(lambda: "waiting for places" in run.said())
    nodes.add("last", 1, trainer=1)
    run.until(lambda: run.rows()[-1]["faults/trainer_restarts"] == 1)
    run.steps(2)
    run.process.terminate()
    said, steps = run.wait(INTERRUPTED), len(run.rows())
    saved = sorted(int(folder.name.removeprefix("step-")) for folder in (run.run_dir / "checkpoints").iterdir())
    moved_at = [int(found) for found in re.findall(r"goes on at step (\d+); nothing is trained", said)]
    assert moved_at == [saved[0], saved[2]] and f"step-{saved[3]:06d}" in said.split("trainer alone is built again")[1]
    assert len(saved) == 5 and saved[-1] == steps
    assert run.rows()[-1]["faults/restarts"] == 0 and moves() == 2
    leases, prompts = leases_and_prompts(run.run_dir)
    assert leases == prompts, "one lease a prompt"
    alone = [f"loop.num_steps={steps}", "--cluster", "drained.cluster.yaml", "--run-dir", "alone", "--in-process"]
    rlhf(tmp_path, "run", "plain.yaml", *settings, *alone)
    assert_bitwise_equal(policy(run.run_dir, steps), policy(tmp_path / "alone", steps))
    assert ledger(run.run_dir)["trained"] == ledger(tmp_path / "alone")["trained"] == steps * 4
    seen(
        "trainer drained",
        "- `ray drain-node` for the trainer's node, another one free: the first step on that one was done "
        f"{moved_s:.0f} s later; no step was trained twice, no prompt leased twice, and the end was that of one "
        "process, bitwise.\n"
        "- The same with no other node: the run went on, moved when one came, and the next time, when none did, went "
        "back to the checkpoint of the notice after its node had died.",
    )


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_one_of_two_ranks_leaves_a_drained_node(nodes: Nodes, start: Callable[..., Run], tmp_path: Path) -> None:
    """Two DeepSpeed ranks on a node each, of which one is drained, and room for one more: the other rank's place is
    given back and found again. The end is that of two ranks on one machine, bitwise."""
    nodes.add("head", 2)
    for name, resource in (("rank-0", "trainer"), ("rank-1", "trainer"), ("engine", "engine")):
        nodes.add(name, 1, **{resource: 1})
    settings = ["learner.engine=deepspeed", "learner.zero_stage=2", "loop.checkpoint_every=0"]
    cluster = cluster_of(nodes.address, 2)
    cluster["trainer"]["placement"], cluster["rollout"]["replicas"] = "pack", 1
    run = start(cluster, "drained", *settings, "loop.num_steps=3000")
    run.until(lambda: len(run.rows()) >= 2, START_S)
    nodes.add("spare", 1, trainer=1)
    nodes.drain("rank-1")
    run.until(lambda: run.rows()[-1]["faults/trainer_moves"] == 1)
    run.steps(2)
    run.process.terminate()
    said, steps = run.wait(INTERRUPTED), len(run.rows())
    assert done_steps(said) == list(range(1, steps + 1)) and not run.rows()[-1]["faults/trainer_restarts"]
    local = {"threads_per_role": 1, "trainer": {"replicas": 2}}
    start(local, "local", *settings, f"loop.num_steps={steps}").wait(0)
    assert_bitwise_equal(policy(run.run_dir, steps), policy(tmp_path / "local", steps))
    assert ledger(run.run_dir)["trained"] == steps * 4
