"""Tensor parallelism of engines: places, refusals, the plan, shared weights, ends. vLLM itself: test_vllm_ranks.py."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from actors.capacity import Asked, Node, fitting, missing, report
from actors.placement import options
from actors.rollout import dies_with_its_engine
from rlhf.cli import plan as plan_command
from rlhf.cli.main import main
from rlhf.cluster import Cluster, Engines, Role
from rlhf.config_file import load_cluster
from rlhf.errors import BadInput, EngineLost, RunFailed
from rlhf.experience import Floats
from rlhf.generation.tensor_parallel import indivisible
from rlhf.generation.vllm_weights import ALIGNMENT, shared
from rlhf.planning.devices import Machine
from rlhf.processes import end_with
from rlhf.weights import Probe, pack, probe_ids

ROOT = Path(__file__).parents[1]
RLOO = ROOT / "configs/rloo_tiny.yaml"
MACHINE = Machine(gemm_flops=1e11, bytes_per_s=1e10, hashed_per_s=1e9, cores=2, memory=24e9, bfloat16_gain=2.0)
FOUR = Engines(replicas=2, cpus=1.5, gpus=1, resources={"rollout": 0.01}, tensor_parallel=4)
LLAMA3_70B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
PARAMETERS_70B = 70_553_706_496  # tensors on the hub


def cluster(folder: Path, **content: Any) -> Path:
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def nodes(count: int, gpus: int) -> list[Node]:
    has = {"CPU": 16.0, "GPU": float(gpus), "rollout": 1.0}
    return [Node(f"10.0.0.{number}", has, has) for number in range(count)]


def test_an_engine_takes_so_many_times_as_much_and_all_of_it_on_one_node() -> None:
    """CPUs and GPUs, not the tag; each process keeps its own threads. Eight GPUs hold two such engines where four are
    on a node, and none where two are."""
    roles = Cluster(rollout=FOUR)
    assert roles.rollout.takes == {"CPU": 6.0, "GPU": 4.0, "rollout": 0.01}
    asked = options(roles, "rollout", roles.rollout)
    assert (asked["num_cpus"], asked["num_gpus"], asked["resources"]) == (6.0, 4.0, {"rollout": 0.01})
    assert asked["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "2"
    claim = [Asked("rollout", FOUR, 2, 0)]
    assert not missing(claim, nodes(2, 4)) and fitting(claim, nodes(2, 4)) == {"rollout": 2}
    assert "no single node holds one rollout (CPU: 6, GPU: 4, rollout: 0.01)" in report(claim, nodes(4, 2))
    one = Role(cpus=1.5, gpus=1, resources={"rollout": 0.01})
    assert fitting([Asked("rollout", one, 8, 0)], nodes(4, 2)) == {"rollout": 8}


def test_machines_must_have_a_node_for_a_whole_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `make validate-clusters` finds of the same two sets of machines."""
    monkeypatch.syspath_prepend(str(ROOT))
    from clusters.checks.places import Kind, missing_room

    roles = Cluster(address="auto", rollout=FOUR)
    trains = Kind("trainer", {"CPU": 16.0}, 1)
    assert not list(missing_room(roles, [trains, Kind("four", {"CPU": 8.0, "GPU": 4.0, "rollout": 1.0}, 2)]))
    (fault,) = missing_room(roles, [trains, Kind("two", {"CPU": 8.0, "GPU": 2.0, "rollout": 1.0}, 4)])
    assert fault.field == "rollout.replicas" and "0 of 2 find a place (CPU: 6, GPU: 4" in fault.text


def test_a_cluster_file_gives_each_process_a_gpu_of_its_own_and_only_engines_have_several(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"gpus=0\.5 with tensor_parallel=2.*expected 1, or 0"):
        load_cluster(cluster(tmp_path, rollout={"tensor_parallel": 2, "gpus": 0.5}), [])
    with pytest.raises(BadInput, match=r"unknown key trainer\.tensor_parallel"):
        load_cluster(cluster(tmp_path, trainer={"tensor_parallel": 2}), [])
    assert load_cluster(cluster(tmp_path, rollout={"gpus": 0.5}), []).rollout.takes == {"CPU": 1.0, "GPU": 0.5}


@pytest.mark.parametrize(
    ("parts", "settings", "said"),
    [
        (2, ["generation.engine=transformers"], "transformers computes in one process; expected 1, or generation.eng"),
        (4, ["generation.engine=vllm"], "tiny has 2 attention heads (num_attention_heads), which it does not divide; "
            "expected one of 1, 2"),
        (2, ["generation.engine=vllm", "model.name=smollm2"], "smollm2 has 9 attention heads (num_attention_heads), "
            "which it does not divide; expected one of 1, 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused_before_anything_starts(
    parts: int, settings: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the run, on Ray and in one process, and by the plan."""
    roles, run_dir = cluster(tmp_path, rollout={"tensor_parallel": parts}), tmp_path / "run"
    run = ["run", str(RLOO), *settings, "--cluster", str(roles), "--run-dir", str(run_dir)]
    for command in (run, [*run, "--in-process"], ["plan", str(RLOO), *settings, "--cluster", str(roles)]):
        assert main(command) == 2
        message = capsys.readouterr().err
        assert f"cluster file: rollout.tensor_parallel={parts}: " in message and said in message, message
    assert not run_dir.exists()


def test_equal_shares() -> None:
    """Heads of keys and values may be repeated, not cut; the vocabulary is filled up to a multiple of 64 first."""
    model = {"num_attention_heads": 24, "num_key_value_heads": 4, "intermediate_size": 1536, "vocab_size": 32000}
    assert [parts for parts in range(1, 25) if indivisible(model, parts) is None] == [1, 2, 4, 8]
    assert "4 heads of keys and values" in (indivisible(model, 3) or "")
    assert "32000 tokens" in (indivisible({**model, "num_key_value_heads": 12}, 12) or "")
    assert indivisible({**model, "vocab_size": 32040}, 4) is None  # 32064 = 4 x 8016
    assert indivisible({}, 7) is None


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    """Runs `rlhf plan --json` on a known machine: exit code, plan."""
    monkeypatch.setattr(plan_command, "this_machine", lambda: MACHINE)

    def run(*arguments: str | Path) -> tuple[int, Any]:
        code = main(["plan", *map(str, arguments), "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out or said.err)

    return run


def test_the_plan_divides_weights_and_cache(tmp_path: Path, plan: Callable[..., tuple[int, Any]]) -> None:
    """Llama-3-70B in bfloat16 on H100s, by hand: 1 does not hold it, 8 do. Of 8 heads of keys and values each of 8
    processes has one; 16 processes have one each too, twice as many in all."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA3_70B))
    settings = [f"model.name={folder}", "learner.dtype=bfloat16", "generation.gpu_memory_fraction=0.9"]
    settings += ["generation.engine=vllm", "generation.max_new_tokens=60000", "loop.groups_per_step=100"]
    found = {}
    for parts in (1, 8, 16):
        file = cluster(tmp_path, address="auto", rollout={"gpus": 1, "tensor_parallel": parts})
        _, found[parts] = plan(RLOO, *settings, "--cluster", file, "--gpu", "h100")
        problems = " ".join(found[parts]["problems"])
        assert ("larger rollout.tensor_parallel" in problems) == (parts == 1), problems
        assert found[parts]["demand"]["GPU"] == parts
        (placed,) = (role for role in found[parts]["placement"] if role["role"] == "rollout")
        assert (placed["processes"], placed["takes"]["GPU"]) == (parts, parts)
    sizes = {parts: engine_parts(each) for parts, each in found.items()}
    for parts in (1, 8, 16):
        assert sizes[parts]["weights"] == 2 * PARAMETERS_70B / parts
    for parts, share in ((8, 8), (16, 8)):
        decoding, lengths = found[parts]["time"]["decoding"], found[parts]["lengths"]
        cached = sizes[parts]["KV cache"] / (2 * 2 * 80 * 8 * 128 / share)  # tokens: K and V, 80 layers, 8 heads of 128
        assert decoding["sequences_at_once"] == int(cached // (lengths["prompt"] + lengths["longest"]))
        weights = decoding["weights_s"] / (decoding["steps"] - decoding["tail_steps"])
        assert weights == pytest.approx(2 * (PARAMETERS_70B - 128256 * 8192) / (parts * 3350e9 * 0.7), rel=1e-6)


def test_processes_on_a_cpu_share_its_memory(tmp_path: Path, plan: Callable[..., tuple[int, Any]]) -> None:
    """Weights and cache together are those of one process; what each has whole, its libraries too, comes once more."""
    found = {}
    for parts in (1, 2):
        file = cluster(tmp_path, rollout={"tensor_parallel": parts, "cpus": 1})
        code, found[parts] = plan(RLOO, "generation.engine=vllm", "--cluster", file)
        assert code == 0
    one, two = engine_parts(found[1]), engine_parts(found[2])
    assert all(one[name] == two[name] for name in ("weights", "KV cache", "packed head"))
    assert one["activations and logits"] < two["activations and logits"] < 2 * one["activations and logits"]
    assert two["libraries"] == 3 * one["libraries"]
    assert two["copy that its processes read"] == two["received copy"] == one["received copy"]
    assert found[2]["demand"]["CPU"] == found[1]["demand"]["CPU"] + 1


def engine_parts(found: Any) -> dict[str, float]:
    (role,) = (role for role in found["memory"] if role["role"] == "rollout")
    return {part["name"]: part["size"] for part in role["parts"]}


def test_a_run_on_rows_of_data_has_no_engine_to_refuse(tmp_path: Path, plan: Callable[..., tuple[int, Any]]) -> None:
    file = cluster(tmp_path, rollout={"tensor_parallel": 7})
    code, found = plan(ROOT / "configs/dpo_tiny.yaml", "--cluster", file)
    assert code == 0 and all(role["role"] != "rollout" for role in found["placement"])


def test_shared_weights_are_the_same_bits_under_the_same_names_and_are_gone_afterwards() -> None:
    """Of several types, a scalar and an empty one among them; another process reads the same bytes."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "odd": torch.randn(7, 3, generator=generator),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "none": torch.empty(0, 4),
        "one": torch.tensor(2.5, dtype=torch.float64),
        "whole": torch.arange(-3, 3),
    }
    logprobs: Floats = torch.zeros(23).numpy()
    weights = pack(1, tensors.items(), Probe(probe_ids(320), logprobs))
    with shared(weights) as lent:
        read = dict(lent.tensors())
        assert list(read) == list(tensors) and all(place.offset % ALIGNMENT == 0 for place in lent.places)
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
        content = Path(lent.path).read_bytes()
        program = "import sys, hashlib; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())"
        answer = subprocess.run([sys.executable, "-c", program, lent.path], capture_output=True, text=True, check=True)
        assert answer.stdout.strip() == hashlib.sha256(content).hexdigest()
    assert not Path(lent.path).exists()


def in_a_child(action: Callable[[], None]) -> int:
    """How a process that does this ended: its signal, or 0."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def test_an_actor_ends_with_an_engine_that_lost_a_process_and_with_no_other_error() -> None:
    def lose() -> None:
        with dies_with_its_engine():
            raise EngineLost("rollout-0: one of its 2 processes has died")

    assert in_a_child(lose) == -signal.SIGKILL
    with pytest.raises(RunFailed, match="another"), dies_with_its_engine():
        raise RunFailed("another")


def test_a_process_ends_with_its_parent() -> None:
    """Killed, the parent says nothing; one that had gone before the child asked counts as well. A control lives on."""
    for before, asks in ((False, True), (True, True), (False, False)):
        said, says = os.pipe()
        hold, release = os.pipe()
        parent = os.fork()
        if parent == 0:
            me, child = os.getpid(), os.fork()
            if child != 0:
                os.read(hold, 1)
                os._exit(0)
            os.close(release)
            if before:
                os.kill(me, signal.SIGKILL)
                while os.getppid() == me:
                    os.sched_yield()
            if asks:
                end_with(me)
            os.write(says, b"%d" % os.getpid())
            os.read(hold, 1)  # for ever, or until this process closes `release`
            os.write(says, b"!")
            os._exit(0)
        os.close(says)
        os.close(hold)
        child = os.read(said, 32)
        assert bool(child) != before
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        if asks:
            assert os.read(said, 1) == b""  # nobody holds the other end: all are dead
        os.close(release)
        if not asks:
            assert os.read(said, 1) == b"!"
        os.close(said)
