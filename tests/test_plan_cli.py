"""`rlhf plan`: what it prints, what it refuses, what it says does not fit, and that it loads nothing.

Not covered: whether its figures are right (tests/test_plan_*.py beside this one).
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.capacity import total
from rlhf.blueprint import draw
from rlhf.cli import plan as command
from rlhf.cli.main import main
from rlhf.cluster import Cluster
from rlhf.colocation import places_of
from rlhf.config_file import load_cluster, load_run
from rlhf.models.resolve import resolve
from rlhf.passes import needs_reference
from rlhf.planning.devices import GPUS, Machine
from rlhf.planning.placement import demand_of, placed_roles
from rlhf.planning.shapes import BUILT_CONFIGS, shape_of

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CLUSTERS = sorted((ROOT / "clusters").glob("*.yaml"))
MACHINE = Machine(gemm_flops=1e11, bytes_per_s=1e10, hashed_per_s=1e9, cores=2, memory=24e9, bfloat16_gain=2.0)
LLAMA3_70B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


@pytest.fixture(autouse=True)
def same_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of two cores and 24 GB, whatever this one is."""
    monkeypatch.setattr(command, "this_machine", lambda: MACHINE)


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `rlhf plan` with these arguments: exit code, what was printed, what was said about faults."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = main(["plan", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def model(folder: Path, config: dict[str, Any]) -> str:
    """A model folder without weights: the plan reads nothing but its config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return f"model.name={folder}"


def cluster(folder: Path, **content: Any) -> Path:
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_run_file_has_a_plan_on_every_cluster_file(config: Path, plan: Callable[..., Any]) -> None:
    """With the engine that a cluster file of several ranks needs, as JSON; without a cluster file, in words."""
    for file in CLUSTERS:
        roles = load_cluster(file, [])
        options = ["--gpu", "h100"] if roles.trainer.gpus else []
        settings = ["learner.engine=deepspeed"] if roles.trainer.replicas > 1 else []
        code, printed, said = plan(config, *settings, "--cluster", file, *options, "--json")
        assert code == 0, (file.name, said, printed)
        found = json.loads(printed)
        assert found["fits"] and found["time"]["step_s"] > 0
    code, shown, _ = plan(config)
    assert code == 0 and f"{found['model']['parameters']:,} parameters" in shown


def test_names_of_the_json_form(plan: Callable[..., Any]) -> None:
    """They are a contract: docs/plan.md lists them."""
    code, printed, _ = plan(ROOT / "configs/ppo_tiny.yaml", "--json")
    found = json.loads(printed)
    assert code == 0
    assert set(found) == {
        "model", "lengths", "placement", "demand", "batches", "memory", "turns", "published_bytes",
        "object_store_bytes", "update_flops", "time", "devices", "problems", "fits",
    }  # fmt: skip
    page = (ROOT / "docs/plan.md").read_text()
    for section in ("model", "lengths", "batches", "time"):
        assert all(f"`{name}`" in page for name in found[section]), section
    for section in ("placement", "memory"):
        assert all(f"`{name}`" in page for name in found[section][0]), section
    assert all(f"`{name}`" in page for name in found)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_roles_are_those_that_a_team_has(config: Path) -> None:
    """Against the blueprint that teams are built from, also with adapters, and without a frozen reference."""
    cases = [[], ["model.lora.rank=4"]]
    cases += {"rloo_tiny.yaml": [["algorithm.kl.coef=0"]], "rso_tiny.yaml": [["algorithm.reference=sampler"]]}.get(
        config.name, []
    )
    for overrides in cases:
        run = load_run(config, overrides)
        drawn = draw(run)
        roles = {placed.role for placed in placed_roles(run, Cluster())}
        assert ("reference" in roles) == drawn.reference_judge
        assert ("rollout" in roles) == drawn.samples
        assert ("critic" in roles) == drawn.has_critic
        assert ("reward" in roles) == (run.reward is not None)
        assert {"trainer", "buffer"} <= roles
        assert needs_reference(run) == ("ref_logprobs" in drawn.algorithm.needs)


def test_demand_is_what_the_actors_ask_for() -> None:
    """Against what real teams ask for."""
    run = load_run(ROOT / "configs/ppo_tiny.yaml", [])
    for file in CLUSTERS:
        roles = load_cluster(file, [])
        asked = [role.takes for role in places_of(roles, roles.roles).values() for _ in range(role.replicas)]
        assert demand_of(placed_roles(run, roles), least=False) == pytest.approx(total(asked))
    by_turns = load_cluster(ROOT / "clusters/eight_gpu_colocated.yaml", [])
    assert demand_of(placed_roles(run, by_turns), least=True)["GPU"] == 8


@pytest.mark.parametrize("name", ["tiny", "tiny-untied", "tiny_t5"])
def test_models_that_are_built_on_the_spot(name: str) -> None:
    """What is known of them without building equals what is built."""
    built = json.loads((resolve(name) / "config.json").read_text())
    assert shape_of(BUILT_CONFIGS[name], name) == shape_of(built, name)


def test_it_loads_nothing_heavy() -> None:
    """In a new interpreter, planning leaves torch, transformers, Ray and vLLM alone."""
    code = (
        "import sys; from rlhf.cli.main import main; code = main(['plan', 'configs/rloo_smollm2.yaml']); "
        "print(code, sorted({'torch', 'transformers', 'ray', 'vllm', 'deepspeed', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--gpu", "v100", "--cluster", ROOT / "clusters/one_gpu.yaml"], [*GPUS, "v100"]),
        (["--cluster", ROOT / "clusters/one_gpu.yaml"], [*GPUS, "trainer.gpus="]),
        (["--gpu", "h100", "--cluster", ROOT / "clusters/local.yaml"], ["would do nothing", "trainer.gpus"]),
        (["--prompt-tokens", "97"], ["data.max_prompt_tokens=96"]),
        (["--completion-tokens", "0"], ["generation.max_new_tokens=24"]),
        (["--network-gbit", "-1"], ["--network-gbit"]),
        (["loop.num_stepz=3"], ["num_stepz", "num_steps"]),
        (["data.heldout=100000"], ["data.heldout=100000"]),
        (["model.name=/nowhere/at/all"], ["model.name", "/nowhere/at/all"]),
        (["learner.engine=torch", "--cluster", ROOT / "clusters/local_two_ranks.yaml"], ["trainer.replicas=2"]),
        (["model.lora.target_modules=[nothing]"], ["target_modules", "q_proj"]),
        (["loop.groups_per_step=10000000000"], ["loop.groups_per_step=10000000000", "at most 1000000 samples"]),
        (["generation.max_new_tokens=10000000000"], ["generation.max_new_tokens", "10000000"]),
        (["generation.max_new_tokens=1024"], ["generation.max_new_tokens=1024", "no room", "holds 1024"]),
        (["reward.function=no.such.module:f"], ["reward.function"]),
    ],
)
def test_bad_input_is_refused(arguments: list[str | Path], named: list[str], plan: Callable[..., Any]) -> None:
    """As `rlhf run` does: exit code 2, and a message with what was found and what is expected."""
    code, printed, said = plan(ROOT / "configs/rloo_tiny.yaml", *arguments)
    assert code == 2 and printed == ""
    assert all(name in said for name in named), said


def test_a_model_of_an_unknown_kind_is_refused(tmp_path: Path, plan: Callable[..., Any]) -> None:
    code, _, said = plan(ROOT / "configs/rloo_tiny.yaml", model(tmp_path / "m", {"model_type": "mamba"}))
    assert code == 2 and "mamba" in said and "llama" in said


def test_what_does_not_fit_is_said(tmp_path: Path, plan: Callable[..., Any]) -> None:
    """Exit code 3, as where a cluster cannot hold a run, and one line a cause; the plan is printed all the same."""
    tiny, large = ROOT / "configs/rloo_tiny.yaml", model(tmp_path / "m", LLAMA3_70B)
    code, printed, _ = plan(tiny, "--cluster", cluster(tmp_path, cpus=2))
    assert code == 3 and "CPU: asked" in printed and "cpus of the cluster file is 2" in printed
    code, printed, _ = plan(tiny, "--cluster", cluster(tmp_path, rollout={"resources": {"spot": 1}}))
    assert code == 3 and "spot: asked 1" in printed
    code, printed, _ = plan(tiny, large)
    assert code == 3 and "memory:" in printed and "object store:" in printed and "batches" in printed
    two_gpus = cluster(tmp_path, address="auto", trainer={"gpus": 1}, rollout={"gpus": 1}, reference={"gpus": 1})
    code, printed, _ = plan(tiny, large, "--cluster", two_gpus, "--gpu", "h100")
    assert code == 3 and "trainer:" in printed.split("does not fit")[1]


def test_sharding_makes_a_run_fit(tmp_path: Path, plan: Callable[..., Any]) -> None:
    """A control: 8 billion parameters with AdamW do not fit on one 80 GB GPU and do, with ZeRO 3, on eight; more ranks
    take less each."""
    small = {**LLAMA3_70B, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    settings = [model(tmp_path / "m", small), "learner.dtype=bfloat16", "learner.zero_stage=3"]
    settings += ["model.gradient_checkpointing=true", "generation.gpu_memory_fraction=0.9"]
    peaks = []
    for ranks in (1, 8):
        roles = cluster(tmp_path, address="auto", trainer={"gpus": 1, "replicas": ranks}, rollout={"gpus": 1},
                        reference={"gpus": 1})  # fmt: skip
        code, printed, _ = plan(
            ROOT / "configs/rloo_tiny.yaml", *settings, "--cluster", roles, "--gpu", "h100", "--json"
        )
        found = json.loads(printed)
        assert (code == 0) == found["fits"] == (ranks == 8)
        peaks.append(found["memory"][0]["device_peak"])
    assert peaks[1] < peaks[0] / 3


def test_parts_of_one_gpu_are_added_up(tmp_path: Path, plan: Callable[..., Any]) -> None:
    """Two roles of half a GPU: an engine that takes 90 % of it leaves too little for a trainer of 0.5 billion."""
    qwen = {**LLAMA3_70B, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    qwen |= {"num_attention_heads": 16, "tie_word_embeddings": True}
    shared = cluster(tmp_path, trainer={"gpus": 0.5}, rollout={"gpus": 0.5}, object_store_gib=8)
    for fraction, fits in ((0.9, False), (0.3, True)):
        settings = [f"generation.gpu_memory_fraction={fraction}", "algorithm.kl.coef=0", "learner.dtype=bfloat16"]
        arguments = [*settings, model(tmp_path / "m", qwen), "--cluster", shared, "--gpu", "a100-40"]
        code, printed, _ = plan(ROOT / "configs/rloo_tiny.yaml", *arguments)
        assert (code == 0) == fits, printed
        assert fits or "shared GPUs:" in printed


def test_a_gpu_that_is_taken_by_turns_needs_the_larger_turn(tmp_path: Path, plan: Callable[..., Any]) -> None:
    """The trainer and the engine that do not fit beside each other above; an engine and a reference that do not fit."""
    code, printed, _ = plan(
        ROOT / "configs/ppo_tiny.yaml",
        "--cluster",
        ROOT / "clusters/eight_gpu_colocated.yaml",
        "--gpu",
        "h100",
        "--json",
    )
    found = json.loads(printed)
    peaks = {each["role"]: each["device_peak"] for each in found["memory"]}
    assert code == 0 and found["turns"] == [
        {"turn": "train", "roles": ["trainer", "critic"], "device_peak": peaks["trainer"] + peaks["critic"]},
        {"turn": "sample", "roles": ["rollout", "reference"], "device_peak": peaks["rollout"] + peaks["reference"]},
    ]
    (trainer,) = (each for each in found["memory"] if each["role"] == "trainer")
    held = sum(part["size"] for part in trainer["parts"] if part["name"] in ("weights", "masters", "optimizer"))
    assert [part["size"] for part in trainer["parts"] if part["phase"] == "away"] == [held]
    qwen = {**LLAMA3_70B, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    qwen |= {"num_attention_heads": 16, "tie_word_embeddings": True}
    one = {"gpus": 1}
    group = {"trainer": one, "rollout": one, "reference": one, "object_store_gib": 8}
    shared = cluster(tmp_path, colocation=[["trainer", "rollout", "reference"]], **group)
    for fraction, coef, fits in ((0.9, 0, True), (0.99, 0.1, False)):
        settings = [f"generation.gpu_memory_fraction={fraction}", f"algorithm.kl.coef={coef}", "learner.dtype=bfloat16"]
        arguments = [*settings, model(tmp_path / "m", qwen), "--cluster", shared, "--gpu", "a100-40"]
        code, printed, _ = plan(ROOT / "configs/rloo_tiny.yaml", *arguments)
        assert (code == 0) == fits, printed
        assert fits or "colocation: rollout and reference take" in printed


def test_a_cache_that_holds_no_sequence_is_said(tmp_path: Path, plan: Callable[..., Any]) -> None:
    """On a GPU whose share is filled by the weights, and on a CPU with next to no cache."""
    small = {**LLAMA3_70B, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    roles = cluster(tmp_path, address="auto", trainer={"gpus": 1}, rollout={"gpus": 1}, reference={"gpus": 1})
    settings = [model(tmp_path / "m", small), "learner.dtype=bfloat16", "generation.gpu_memory_fraction=0.2"]
    code, printed, _ = plan(ROOT / "configs/rloo_tiny.yaml", *settings, "--cluster", roles, "--gpu", "h100")
    assert code == 3 and "raise generation.gpu_memory_fraction" in printed
    code, printed, _ = plan(ROOT / "configs/rloo_tiny.yaml", "generation.cache_gib=0.00001")
    assert code == 3 and "raise generation.cache_gib" in printed
