"""Rules for KubeRay files, for what the resource definitions leave free; those of KubeRay's operator among them."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clusters.checks import lock
from clusters.checks.commands import cluster_file, run_command
from clusters.checks.documents import Fault, against, own_schema
from clusters.checks.places import Kind, missing_room
from rlhf.cluster import Cluster
from rlhf.errors import BadInput
from rlhf.yaml_reader import parse

GPU = "nvidia.com/gpu"
CAPACITY = "rlhf/capacity"  # the node label that says spot or on-demand
LONGEST_NAME = {"RayCluster": 53, "RayJob": 47}
LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
MEMORY = re.compile(r"[0-9]+(\.[0-9]+)?(Mi|Gi|Ti)")
CPU = re.compile(r"[0-9]+(\.[0-9]+)?|[0-9]+m")
# What the files must agree on with prerequisites.yaml.
Others = Mapping[str, set[str]]


def faults(found: Sequence[Any], others: Others) -> Iterator[Fault]:
    """others, the names of the objects of prerequisites.yaml by kind."""
    for index, one in enumerate(found):
        at = f"[{index}]" if len(found) > 1 else ""
        kind = one.get("kind") if isinstance(one, dict) else None
        definitions = own_schema("kuberay.json")["definitions"]
        if kind not in ("RayCluster", "RayJob", "PriorityClass", "PersistentVolumeClaim", "NetworkPolicy"):
            yield Fault(f"{at}.kind".lstrip("."), f"found {kind!r}; expected a RayCluster, a RayJob, or what they need")
            continue
        schema = {**definitions[kind], "definitions": definitions}
        broken = list(against(schema, one, at))
        yield from broken
        if not broken and kind in LONGEST_NAME:
            yield from _name(one["metadata"]["name"], kind)
            yield from (_job if kind == "RayJob" else _alone)(one, others)


def names_of(found: Sequence[Any]) -> dict[str, set[str]]:
    names: dict[str, set[str]] = {}
    for one in found:
        names.setdefault(one["kind"], set()).add(one["metadata"]["name"])
    return names


def _name(name: str, kind: str) -> Iterator[Fault]:
    if len(name) > LONGEST_NAME[kind] or not LABEL.fullmatch(name):
        yield Fault(
            "metadata.name",
            f"found {name!r}; expected at most {LONGEST_NAME[kind]} small letters, digits and dashes, a letter first",
        )


def _alone(one: Mapping[str, Any], others: Others) -> Iterator[Fault]:
    yield from _cluster(one["spec"], "spec", one["metadata"].get("annotations", {}), others)


def _job(one: Mapping[str, Any], others: Others) -> Iterator[Fault]:
    spec, notes = one["spec"], one["metadata"].get("annotations", {})
    yield from run_command("spec.entrypoint", spec["entrypoint"], {}, notes.get("rlhf/run-dir"))
    named = re.search(r"--cluster (\S+)", spec["entrypoint"])
    if named and not named[1].endswith(notes.get("rlhf/cluster-file", "")):
        yield Fault("spec.entrypoint", "--cluster names another file than the annotation rlhf/cluster-file")
    cluster, _ = cluster_file("", notes.get("rlhf/cluster-file"))
    if cluster is not None:
        yield from _beside_the_buffer(spec, cluster)
    yield from _runtime_env(spec)
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield Fault("spec.ttlSecondsAfterFinished", "needs shutdownAfterJobFinishes: true")
    if spec.get("backoffLimit") and spec.get("submissionMode") == "InteractiveMode":
        yield Fault("spec.backoffLimit", "cannot be more than 0 in InteractiveMode")
    yield from _cluster(spec["rayClusterSpec"], "spec.rayClusterSpec", notes, others)


def _beside_the_buffer(spec: Mapping[str, Any], cluster: Cluster) -> Iterator[Fault]:
    """Driver and buffer share a file that two nodes cannot share, so the driver asks for the buffer's resources."""
    field, expected = "spec.entrypointResources", dict(cluster.buffer.resources)
    try:
        found = json.loads(spec.get("entrypointResources", "{}"))
    except json.JSONDecodeError as error:
        yield Fault(field, f"is no JSON: {error}")
        return
    if found != expected:
        yield Fault(
            field, f"found {found}; expected {json.dumps(expected)}, the buffer's, which the driver must be beside"
        )


def _runtime_env(spec: Mapping[str, Any]) -> Iterator[Fault]:
    if "runtimeEnvYAML" in spec:
        try:
            environment = parse(spec["runtimeEnvYAML"], "spec.runtimeEnvYAML")
        except BadInput as error:
            yield Fault("spec.runtimeEnvYAML", str(error))
            return
        yield from against(own_schema("runtime_env.json"), environment, "spec.runtimeEnvYAML")


def _cluster(spec: Mapping[str, Any], at: str, notes: Mapping[str, str], others: Others) -> Iterator[Fault]:
    yield from lock.ray_version(f"{at}.rayVersion", spec.get("rayVersion"))
    autoscaler, authentication = spec.get("autoscalerOptions", {}), spec.get("authOptions", {})
    if spec.get("enableInTreeAutoscaling") is not True:
        yield Fault(f"{at}.enableInTreeAutoscaling", "is off, so that nothing grows; expected true")
    if autoscaler.get("version") != "v2":
        yield Fault(f"{at}.autoscalerOptions.version", f"found {autoscaler.get('version')!r}; expected v2")
    yield from _quantities(autoscaler.get("resources", {}), f"{at}.autoscalerOptions.resources")
    if authentication.get("mode") != "token":
        yield Fault(f"{at}.authOptions.mode", f"found {authentication.get('mode')!r}; expected token")
    if not authentication.get("secretName"):
        yield Fault(f"{at}.authOptions.secretName", "is missing: the token of the cluster is in a Secret that you make")
    yield from _head(spec["headGroupSpec"], f"{at}.headGroupSpec", others)
    groups = spec.get("workerGroupSpecs", [])
    yield from _groups(groups, f"{at}.workerGroupSpecs", others)
    cluster, wrong = cluster_file("metadata.annotations.rlhf/cluster-file", notes.get("rlhf/cluster-file"))
    yield from wrong
    if cluster is None:
        return
    kinds = [Kind(group["groupName"], _offers(group), group["maxReplicas"]) for group in groups]
    for fault in missing_room(cluster, kinds):
        yield Fault(f"{at}.workerGroupSpecs", f"{notes['rlhf/cluster-file']}: {fault.field}: {fault.text}")
    yield from _run_directory(cluster, groups, f"{at}.workerGroupSpecs", notes.get("rlhf/run-dir"))


def _head(head: Mapping[str, Any], at: str, others: Others) -> Iterator[Fault]:
    for option in ("num-cpus", "num-gpus"):
        found = head.get("rayStartParams", {}).get(option)
        if found != "0":
            yield Fault(f"{at}.rayStartParams.{option}", f'found {found!r}; expected "0": the head runs no work')
    if head.get("resources"):
        yield Fault(f"{at}.resources", "the head runs no work: leave it out")
    yield from _pod(head["template"], f"{at}.template", others)


def _groups(groups: Sequence[Mapping[str, Any]], at: str, others: Others) -> Iterator[Fault]:
    for index, group in enumerate(groups):
        here, least, most = f"{at}[{index}]", group["minReplicas"], group["maxReplicas"]
        if least > most:
            yield Fault(f"{here}.minReplicas", f"{least} is more than maxReplicas, {most}")
        elif not least <= group.get("replicas", least) <= most:
            yield Fault(f"{here}.replicas", f"found {group['replicas']}; expected between {least} and {most}")
        start = group.get("rayStartParams", {})
        for option in {"num-cpus", "num-gpus", "memory", "resources", "labels"} & start.keys():
            yield Fault(f"{here}.rayStartParams.{option}", "stands in the group's own `resources` or `labels` instead")
        asked = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
        for name, k8s in (("CPU", "cpu"), ("GPU", GPU)):
            offered, limit = group.get("resources", {}).get(name), asked.get(k8s)
            if str(offered) != str(limit):
                yield Fault(f"{here}.resources.{name}", f"found {offered!r}, but the container's limit is {limit!r}")
        yield from _pod(group["template"], f"{here}.template", others)
    names = [group["groupName"] for group in groups]
    if len(set(names)) != len(names):
        yield Fault(at, f"two groups have one name: {', '.join(names)}")
    yield from _spot_first(groups, at)


def _spot_first(groups: Sequence[Mapping[str, Any]], at: str) -> Iterator[Fault]:
    """Engines go to spot nodes first, by priority, and nothing else does."""
    where = [group["template"]["spec"].get("nodeSelector", {}).get(CAPACITY) for group in groups]
    first: list[int] = []
    fallback: list[int] = []
    for index, (group, capacity) in enumerate(zip(groups, where, strict=True)):
        if capacity not in ("spot", "on-demand"):
            field = f"{at}[{index}].template.spec.nodeSelector.{CAPACITY}"
            yield Fault(field, f"found {capacity!r}; expected spot or on-demand")
        elif "rollout" in group.get("resources", {}):
            (first if capacity == "spot" else fallback).append(group.get("priority", 0))
        elif capacity == "spot":
            yield Fault(f"{at}[{index}]", "is spot; a run cannot do without the node that trains")
    if not first or not fallback:
        yield Fault(at, "engines need a spot group and a group on demand, as the fallback")
    elif min(first) <= max(fallback):
        yield Fault(at, "the spot group needs a higher priority than the fallback")


def _pod(template: Mapping[str, Any], at: str, others: Others) -> Iterator[Fault]:
    pod = template["spec"]
    if pod.get("restartPolicy") != "Never":
        found = pod.get("restartPolicy")
        yield Fault(f"{at}.spec.restartPolicy", f"found {found!r}; expected Never, which autoscaler v2 needs")
    if (name := pod.get("priorityClassName")) not in others.get("PriorityClass", set()):
        yield Fault(f"{at}.spec.priorityClassName", f"found {name!r}, which is not in prerequisites.yaml")
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for name, volume in volumes.items():
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim is not None and claim not in others.get("PersistentVolumeClaim", set()):
            yield Fault(f"{at}.spec.volumes.{name}", f"the claim {claim!r} is not in prerequisites.yaml")
    for index, container in enumerate(pod["containers"]):
        here = f"{at}.spec.containers[{index}]"
        yield from lock.image(f"{here}.image", container.get("image", ""))
        yield from _quantities(container.get("resources", {}), f"{here}.resources")
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield Fault(f"{here}.volumeMounts", f"{mount['name']!r} is no volume of the pod")


def _quantities(resources: Mapping[str, Mapping[str, Any]], at: str) -> Iterator[Fault]:
    """CPUs, memory with a binary unit, whole GPUs; requests equal to limits, so that no pod is evicted for its size."""
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    if not limits or {"cpu", "memory"} - limits.keys():
        yield Fault(f"{at}.limits", "cpu and memory are needed")
    if requests != limits:
        yield Fault(at, f"requests {dict(requests)} differ from limits {dict(limits)}")
    patterns = {"cpu": (CPU, "4 or 500m"), "memory": (MEMORY, "64Gi"), GPU: (re.compile("[0-9]+"), "a whole number")}
    for name, quantity in limits.items():
        pattern, example = patterns.get(name, (re.compile(""), ", ".join(patterns)))
        if not pattern.fullmatch(str(quantity)):
            yield Fault(f"{at}.limits.{name}", f"found {quantity!r}; expected such as {example}")


def _run_directory(
    cluster: Cluster, groups: Sequence[Mapping[str, Any]], at: str, run_dir: str | None
) -> Iterator[Fault]:
    """The nodes that may have driver, buffer, trainer and critic mount the run directory from a volume that stays."""
    tags = {tag for role in (cluster.buffer, cluster.trainer, cluster.critic) for tag in role.resources}
    for index, group in enumerate(groups):
        if not tags & group.get("resources", {}).keys():
            continue
        pod = group["template"]["spec"]
        claims = {volume["name"] for volume in pod.get("volumes", []) if "persistentVolumeClaim" in volume}
        mounts = pod["containers"][0].get("volumeMounts", [])
        if not any(mount["mountPath"] == run_dir and mount["name"] in claims for mount in mounts):
            field = f"{at}[{index}].template.spec.containers[0].volumeMounts"
            yield Fault(field, f"the run directory, {run_dir}, is not on a volume that outlives the pod")


def _offers(group: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(amount) for name, amount in group.get("resources", {}).items()}
