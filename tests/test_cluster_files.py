"""Every file in clusters/ is good, and a copy that is broken in one way is refused with its file and its field.

Ray's own readers of such files, out of its wheel, are the independent reference. Not covered: that a cloud, Kubernetes,
SkyPilot or Slurm takes the files; docs/clusters.md says what was compared by hand.
"""

import importlib
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from rlhf.config_file import load_cluster

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "clusters"
FOLDERS = ("image", "kuberay", "ray_job", "ray_up", "skypilot", "slurm")


@pytest.fixture(scope="module")
def validate() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT))
    try:
        yield importlib.import_module("clusters.validate")
    finally:
        sys.path.remove(str(ROOT))


def in_words(validate: ModuleType, path: Path) -> list[str]:
    return [f"{fault.field}: {fault.text}" for fault in validate.faults(path)]


def test_every_file_is_good(validate: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """And every file is looked at: one of no known kind would be a fault."""
    assert validate.main([]) == 0, capsys.readouterr().out
    names = {path.relative_to(HERE).as_posix() for path in validate.files()}
    assert {"local.yaml", "two_node.yaml", "autoscaling.yaml", "ray_job/runtime_env.yaml"} <= names
    assert {name.partition("/")[0] for name in names if "/" in name} == set(FOLDERS)
    assert capsys.readouterr().out.count(": good") == len(names)


# File, what is replaced, by what, and what the message must hold: the field and what is wrong.
BROKEN = [
    # a misspelt key
    ("two_node.yaml", "  replicas: 6", "  replica: 6", "unknown key trainer.replica; did you mean trainer.replicas"),
    ("ray_up/aws.yaml", "idle_timeout_minutes", "idle_timeout_minute", "'idle_timeout_minute'; did you mean idle"),
    ("ray_up/aws.yaml", "    max_workers: 1\n", "    max_worker: 1\n", "available_node_types.trainer: unknown key"),
    ("ray_up/aws.yaml", "  region:", "  regions:", "provider.regions: unknown key"),
    ("ray_up/aws.yaml", "MarketType: spot", "MarketTyp: spot", "InstanceMarketOptions.MarketTyp: unknown key"),
    ("ray_up/gcp.yaml", "provisioningModel: SPOT", "provisionModel: SPOT", "scheduling.provisionModel: unknown key"),
    (
        "kuberay/raycluster.yaml",
        "minReplicas: 1",
        "minReplica: 1",
        "spec.workerGroupSpecs[0]: unknown key 'minReplica'",
    ),
    ("kuberay/prerequisites.yaml", "preemptionPolicy", "preemptPolicy", "[1]: unknown key 'preemptPolicy'"),
    ("skypilot/managed_job.yaml", "max_restarts_on_errors", "max_restart_on_errors", "resources.job_recovery: unknown"),
    ("slurm/ray_rlhf.sbatch", "--gpus-per-node=8", "--gpu-per-node=8", "#SBATCH --gpu-per-node: unknown option"),
    ("ray_job/runtime_env.yaml", "env_vars:", "env_var:", "unknown key 'env_var'; did you mean env_vars"),
    # a wrong unit
    (
        "kuberay/raycluster.yaml",
        "memory: 56Gi",
        "memory: 56Gib",
        "resources.requests.memory: found '56Gib'; expected a quantity",
    ),
    (
        "kuberay/raycluster.yaml",
        'limits: {cpu: "2", memory: 8Gi',
        'limits: {cpu: "2", memory: 8G',
        "headGroupSpec.template.spec.containers[0].resources.limits",
    ),
    ("kuberay/raycluster.yaml", "sizeLimit: 16Gi", "sizeLimit: 16GB", "emptyDir.sizeLimit: found '16GB'; expected"),
    ("kuberay/prerequisites.yaml", "storage: 500Gi", "storage: 500GiB", "[2].spec.resources.requests.storage: found"),
    ("skypilot/task.yaml", "memory: 256+", "memory: 256GB+", "resources.memory: found '256GB+'; expected a number"),
    ("slurm/ray_rlhf.sbatch", "--nodes=2", "--nodes=two", "#SBATCH --nodes: found 'two'; expected a whole number"),
    # a group of roles that take turns, and cannot
    (
        "eight_gpu_colocated.yaml",
        "[[trainer, critic, rollout, reference]]",
        "[[trainer, critic, rollout, refrence]]",
        "colocation.0.3: found 'refrence' (text); expected 'trainer', 'critic', 'rollout' or 'reference'",
    ),
    ("eight_gpu_colocated.yaml", "rollout, reference]]", "rollout, reward]]", "colocation.0.3: found 'reward'"),
    ("eight_gpu_colocated.yaml", "colocation:", "collocation:", "unknown key collocation; did you mean colocation"),
    (
        "eight_gpu_colocated.yaml",
        "[[trainer, critic, rollout, reference]]",
        "[[trainer, critic]]",
        "nobody to take turns",
    ),
    (
        "eight_gpu_colocated.yaml",
        "cpus: 1\n  gpus: 1",
        "cpus: 1\n  gpus: 0.5",
        "colocation: reference.gpus=0.5; expected 1",
    ),
    # the minimum above the maximum
    ("autoscaling.yaml", "min_replicas: 1", "min_replicas: 9", "rollout: min_replicas=9 is more than replicas=8"),
    (
        "ray_up/gcp.yaml",
        "    min_workers: 1",
        "    min_workers: 2",
        "trainer.min_workers: 2 is more than max_workers, 1",
    ),
    ("kuberay/rayjob.yaml", "minReplicas: 1", "minReplicas: 3", "workerGroupSpecs[0].minReplicas: 3 is more than"),
    # another version than the lock's
    ("ray_up/aws.yaml", "ray-rlhf:2.60.0-", "ray-rlhf:2.59.1-", "docker.image: the image registry"),
    (
        "kuberay/raycluster.yaml",
        "rayVersion: 2.60.0",
        "rayVersion: 2.59.0",
        "spec.rayVersion: found '2.59.0'; expected",
    ),
    ("kuberay/rayjob.yaml", "2.60.0-py311-gpu", "2.60.0-py312-gpu", "containers[0].image: the image"),
    ("skypilot/task.yaml", "2.60.0-py311-gpu", "latest", "resources.image_id: the image"),
    ("image/Dockerfile", "FROM rayproject/ray:2.60.0", "FROM rayproject/ray:2.58.0", "FROM: the image"),
    ("image/Dockerfile", "s3fs==2026.9.0", "s3fs==2026.8.0", "s3fs: found 2026.8.0; expected"),
    # a mode that does not exist
    ("kuberay/rayjob.yaml", "submissionMode: K8sJobMode", "submissionMode: Foo", "spec.submissionMode: found 'Foo'"),
    ("kuberay/raycluster.yaml", "mode: token", "mode: tokens", "spec.authOptions.mode: found 'tokens'"),
    ("kuberay/raycluster.yaml", "upscalingMode: Default", "upscalingMode: Fast", "upscalingMode: found 'Fast'"),
    ("ray_up/gcp.yaml", "provisioningModel: SPOT", "provisioningModel: CHEAP", "provisioningModel: found 'CHEAP'"),
    ("skypilot/managed_job.yaml", "mode: MOUNT", "mode: MOUNTED", "mode: found 'MOUNTED'; expected one of MOUNT"),
    # work on the head
    ("ray_up/aws.yaml", "{CPU: 0, GPU: 0}", "{CPU: 4, GPU: 0}", "available_node_types.head.resources.CPU: found 4"),
    ("ray_up/gcp.yaml", "--num-cpus=0", "--num-cpus=4", "head_start_ray_commands: --num-cpus=0 is missing"),
    ("kuberay/raycluster.yaml", 'num-cpus: "0"', 'num-cpus: "2"', "headGroupSpec.rayStartParams.num-cpus: found '2'"),
    ("kuberay/rayjob.yaml", 'num-cpus: "0"', 'log-style: "record"', "rayStartParams.num-cpus: found None"),
    # the autoscaler that the priorities need
    ("kuberay/raycluster.yaml", "version: v2", "version: v1", "spec.autoscalerOptions.version: found 'v1'"),
    ("kuberay/raycluster.yaml", "restartPolicy: Never", "restartPolicy: Always", "restartPolicy: found 'Always'"),
    ("kuberay/raycluster.yaml", "priority: 10", "priority: 0", "the spot group needs a higher priority"),
    ("ray_up/aws.yaml", "priority: 10", "priority: 0", "spot nodes need a higher priority"),
    # a secret in clear, and no token at all
    ("kuberay/raycluster.yaml", "- {name: VLLM_NO_USAGE_STATS, value", "- {name: RAY_AUTH_TOKEN, value", "in clear"),
    (
        "skypilot/task.yaml",
        "RAY_AUTH_TOKEN: null",
        "RAY_AUTH_TOKEN: hunter2",
        "secrets.RAY_AUTH_TOKEN: a secret in clear",
    ),
    ("ray_job/runtime_env.yaml", "DO_NOT_TRACK", "HF_TOKEN", "env_vars.HF_TOKEN: a secret in clear"),
    ("ray_up/gcp.yaml", "RAY_USAGE_STATS_ENABLED=0", f"X={'0f' * 32}", "docker.run_options[2]: a secret in clear"),
    ("ray_up/aws.yaml", "    - --env RAY_AUTH_MODE=token\n", "", "docker.run_options: tokens are off"),
    ("ray_up/aws.yaml", "/home/ray/.ray/auth_token:", "/home/ray/other:", "file_mounts: the token is missing"),
    ("kuberay/raycluster.yaml", "  secretName: ray-token", "  enableK8sTokenAuth: true", "authOptions.secretName: is"),
    ("skypilot/task.yaml", "RAY_AUTH_TOKEN: null", "OTHER: null", "secrets.RAY_AUTH_TOKEN: is missing"),
    ("slurm/ray_rlhf.sbatch", "umask 077", "umask 022", "(script): `umask 077` is missing"),
    # doors
    ("ray_up/aws.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "listens on every address"),
    ("slurm/ray_rlhf.sbatch", "--include-dashboard=false", "--dashboard-host=0.0.0.0", "listens on every address"),
    # resources that no node has, or too few
    ("ray_up/aws.yaml", "GPU: 4, trainer: 1", "GPU: 4, training: 1", "trainer.resources: asks for 'trainer', which no"),
    ("kuberay/rayjob.yaml", 'trainer: "1"', 'training: "1"', "trainer.resources: asks for 'trainer', which no node"),
    ("kuberay/raycluster.yaml", 'GPU: "4"', 'GPU: "2"', "workerGroupSpecs[0].resources.GPU: found '2', but"),
    ("ray_up/gcp.yaml", "CPU: 48, GPU: 4", "CPU: 48, GPU: 2", "trainer.replicas: 2 of 3 find a place"),
    ("skypilot/task.yaml", "H100:8", "H100:4", "num_nodes: clusters/two_node.yaml: trainer.replicas: 4 of 6"),
    (
        "slurm/ray_rlhf.sbatch",
        "--cpus-per-task=64",
        "--cpus-per-task=16",
        "#SBATCH --nodes: clusters/two_node.yaml: tr",
    ),
    # commands, files and places that do not exist
    ("kuberay/rayjob.yaml", "rlhf run /opt", "rlhf run --frsh /opt", "spec.entrypoint: `rlhf run --frsh"),
    ("kuberay/rayjob.yaml", "configs/rloo_smollm2.yaml", "configs/no.yaml", "spec.entrypoint: run file: "),
    ("kuberay/rayjob.yaml", "--run-dir /mnt/runs/", "--run-dir /tmp/", "expected a folder below /mnt/runs"),
    ("kuberay/rayjob.yaml", '{"trainer": 0.01}', '{"rollout": 0.01}', "spec.entrypointResources: found"),
    ("kuberay/rayjob.yaml", "mountPath: /mnt/runs", "mountPath: /mnt/run", "is not on a volume that outlives the pod"),
    ("kuberay/rayjob.yaml", "claimName: rlhf-runs", "claimName: runs", "the claim 'runs' is not in prerequisites"),
    (
        "ray_up/aws.yaml",
        "/opt/rlhf/runs:/mnt/runs",
        "/opt/rlhf/runs:/runs",
        "metadata.run_dir, /mnt/runs, is not mounted",
    ),
    ("ray_up/aws.yaml", "file: clusters/autoscaling", "file: clusters/other", "metadata.cluster_file: "),
    (
        "skypilot/managed_job.yaml",
        "/mnt/rlhf-storage:",
        "/mnt/other:",
        "storage.address, /mnt/rlhf-storage/run, is below",
    ),
    ("skypilot/managed_job.yaml", "[3, 130]", "[2, 3, 130]", "recover_on_exit_codes: found [2, 3, 130]; expected"),
    ("skypilot/task.yaml", "  fi\n", "", "run: bash cannot read it"),
    ("slurm/ray_rlhf.sbatch", "#SBATCH --requeue\n", "", "#SBATCH --requeue: is missing"),
]


@pytest.mark.parametrize(("name", "good", "bad", "said"), BROKEN, ids=lambda value: str(value)[:40].strip())
def test_a_broken_copy_is_refused(
    validate: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    good: str,
    bad: str,
    said: str,
) -> None:
    """One thing is changed, once; the message names the file and the field."""
    copy = tmp_path / name
    copy.parent.mkdir(exist_ok=True)
    if name.startswith("kuberay/"):
        shutil.copytree(HERE / "kuberay", copy.parent, dirs_exist_ok=True)
    text = (HERE / name).read_text()
    assert good in text, "the file has changed: choose another place to break"
    head, _, tail = text.rpartition(good) if good.startswith("priority") else text.partition(good)
    copy.write_text(head + bad + tail)
    assert validate.main([str(copy)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if said in line]
    assert lines and all(line.startswith(f"{copy}: ") for line in lines), in_words(validate, copy)


def test_a_file_of_no_known_kind_is_a_fault(validate: ModuleType, tmp_path: Path) -> None:
    """Nothing in clusters/ may go unchecked."""
    (tmp_path / "helm.toml").write_text("a = 1\n")
    assert in_words(validate, tmp_path / "helm.toml") == [
        "(file): is of no kind that is known here, so that nothing checks it"
    ]


def test_a_key_that_stands_twice_is_a_fault(validate: ModuleType, tmp_path: Path) -> None:
    """YAML would silently take the second."""
    (tmp_path / "twice.yaml").write_text("address: auto\naddress: local\n")
    [line] = in_words(validate, tmp_path / "twice.yaml")
    assert "key 'address' stands twice" in line and "twice.yaml" in line


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_rays_own_checks_take_the_ray_up_files(cloud: str) -> None:
    """The launcher's reader fills in defaults and validates; nothing of a cloud is asked. Its head runs no work."""
    prepared = prepare_config(yaml.safe_load((HERE / "ray_up" / f"{cloud}.yaml").read_text()))
    validate_config(prepared)
    nodes = prepared["available_node_types"]
    assert nodes["head"]["resources"] == {"CPU": 0, "GPU": 0} and nodes["head"]["max_workers"] == 0
    assert sum(node["max_workers"] for node in nodes.values()) == prepared["max_workers"]


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_rays_autoscaler_reads_the_groups_of_the_kuberay_files_as_we_do(name: str) -> None:
    """What Ray's autoscaler derives from the manifest: node types, their resources, numbers and priorities."""
    found = yaml.safe_load((HERE / "kuberay" / name).read_text())
    spec = found["spec"].get("rayClusterSpec", found["spec"])
    derived = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"namespace": "x", **found["metadata"]}, "spec": spec}
    )
    nodes = {
        kind: (node["resources"]["CPU"], node["resources"]["GPU"], node["min_workers"], node["max_workers"])
        for kind, node in derived["available_node_types"].items()
    }
    assert nodes == {
        "headgroup": (0, 0, 0, 0),
        "trainer": (32, 4, 1, 1),
        "rollout-spot": (8, 1, 0, 9),
        "rollout-on-demand": (8, 1, 0, 9),
    }
    kinds = derived["available_node_types"]
    assert kinds["rollout-spot"]["priority"] > kinds["rollout-on-demand"]["priority"]
    assert kinds["trainer"]["resources"]["trainer"] == kinds["rollout-spot"]["resources"]["rollout"] == 1


def node_types(name: str) -> dict[str, Any]:
    """What Ray's autoscaler is given for a file: by its launcher, or by KubeRay."""
    found = yaml.safe_load((HERE / name).read_text())
    if name.startswith("ray_up/"):
        return dict(prepare_config(found))
    return dict(_derive_autoscaling_config_from_ray_cr({**found, "metadata": {"namespace": "x", **found["metadata"]}}))


@pytest.mark.parametrize("name", ["ray_up/aws.yaml", "ray_up/gcp.yaml", "kuberay/raycluster.yaml"])
def test_rays_autoscaler_takes_spot_nodes_first_and_others_where_there_are_none(name: str) -> None:
    """Ray's scheduler (v2), asked for all roles of autoscaling.yaml at once: one engine or reference model a node.

    A node type that could not be had recently has a low score, and the on-demand nodes take its place. Not covered:
    what a cloud answers, and that Ray notices.
    """
    cluster = load_cluster(HERE / "autoscaling.yaml", [])
    roles = (cluster.trainer, cluster.critic, cluster.rollout, cluster.reference, cluster.reward, cluster.buffer)
    asked = [
        ResourceRequestUtil.make({"CPU": role.cpus, **({"GPU": role.gpus} if role.gpus else {}), **role.resources})
        for role in roles
        for _ in range(role.replicas)
    ]
    config = AutoscalingConfig(node_types(name), skip_content_hash=True)
    spot, on_demand = [kind for kind in config.get_node_type_configs() if kind.startswith("rollout")]
    for scores, taken in (({}, spot), ({spot: 0.0}, on_demand)):
        request = SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(asked),
            recoverable_resource_availabilities=scores,
        )
        reply = ResourceDemandScheduler().schedule(request)
        assert {launch.instance_type: launch.count for launch in reply.to_launch} == {"trainer": 1, taken: 9}
        assert not reply.infeasible_resource_requests


def test_the_two_manifests_have_the_same_cluster() -> None:
    """A RayJob brings the cluster of raycluster.yaml with it."""
    alone = yaml.safe_load((HERE / "kuberay" / "raycluster.yaml").read_text())
    job = yaml.safe_load((HERE / "kuberay" / "rayjob.yaml").read_text())
    assert job["spec"]["rayClusterSpec"] == alone["spec"]


def test_the_stored_cluster_file_differs_in_its_storage_alone() -> None:
    """two_node_stored.yaml is two_node.yaml with an address."""
    plain, stored = (load_cluster(HERE / f"{name}.yaml", []) for name in ("two_node", "two_node_stored"))
    assert stored.storage.address is not None and plain.storage.address is None
    assert stored.model_copy(update={"storage": plain.storage}) == plain


def test_our_schema_is_compared_field_by_field() -> None:
    """The comparison with published schemas, on a small one: another type, other values, a field that they lack."""
    sys.path.insert(0, str(ROOT))
    try:
        compare = importlib.import_module("clusters.schemas.compare")
    finally:
        sys.path.remove(str(ROOT))
    whole = {"definitions": {"mode": {"type": "string", "enum": ["a", "c"]}}}
    ours = {"properties": {"size": {"type": "string"}, "mode": {"$ref": "#/definitions/mode"}, "extra": {}}}
    theirs = {"properties": {"size": {"type": "integer"}, "mode": {"type": "string", "enum": ["a", "b"]}}}
    assert list(compare.differences(ours, theirs, whole, "spec")) == [
        "spec.size: we say string, they say integer",
        "spec.mode: we allow ['a', 'c'], they allow ['a', 'b']",
        "spec.extra: they have no such field",
    ]
    assert list(compare.differences(ours["properties"]["mode"], {"type": "string"}, whole, "spec")) == []


def test_scripts_may_be_started(validate: ModuleType) -> None:
    """sbatch does not need it, people who try a script do."""
    for path in validate.files():
        assert bool(path.stat().st_mode & stat.S_IXUSR) == (path.suffix == ".sbatch"), path
