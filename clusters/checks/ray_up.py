"""Rules for `ray up` files, for what Ray's schema leaves free."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from clusters.checks import lock
from clusters.checks.commands import cluster_file
from clusters.checks.documents import Fault, against, ray_schema
from clusters.checks.places import Kind, missing_room

# The keys of a provider that we use; Ray's schema takes any, so that a misspelt one would change nothing.
PROVIDER_KEYS = {
    "aws": {"type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "security_group"},
    "gcp": {"type", "region", "availability_zone", "project_id", "use_internal_ips"},
}
# The same of the fields that make a machine a spot machine.
AWS_MARKET = {"MarketType", "SpotOptions"}
GCP_SCHEDULING = {"provisioningModel", "instanceTerminationAction", "onHostMaintenance", "automaticRestart"}


def faults(found: Any) -> Iterator[Fault]:
    broken = list(against(ray_schema(), found, ""))
    yield from broken
    if broken or "available_node_types" not in found:
        return
    types: Mapping[str, Mapping[str, Any]] = found["available_node_types"]
    head = found.get("head_node_type")
    if head not in types:
        yield Fault("head_node_type", f"found {head!r}; expected one of {', '.join(types)}")
        return
    workers = {name: kind for name, kind in types.items() if name != head}
    yield from _provider(found["provider"])
    yield from _head(found, types[head], f"available_node_types.{head}")
    yield from _numbers(found, workers)
    yield from _spot(found["provider"]["type"], types, head)
    yield from _containers(found)
    cluster, wrong = cluster_file("metadata.cluster_file", found.get("metadata", {}).get("cluster_file"))
    yield from wrong
    if cluster is not None:
        kinds = [Kind(name, kind["resources"], kind.get("max_workers", 0)) for name, kind in workers.items()]
        for fault in missing_room(cluster, kinds):
            yield Fault("available_node_types", f"{found['metadata']['cluster_file']}: {fault.field}: {fault.text}")


def _provider(provider: Mapping[str, Any]) -> Iterator[Fault]:
    known = PROVIDER_KEYS.get(provider["type"])
    if known is None:
        yield Fault("provider.type", f"found {provider['type']!r}; expected one of {', '.join(PROVIDER_KEYS)}")
        return
    for key in provider.keys() - known:
        yield Fault(f"provider.{key}", f"unknown key; expected one of {', '.join(sorted(known))}")


def _head(found: Mapping[str, Any], kind: Mapping[str, Any], field: str) -> Iterator[Fault]:
    """The head schedules nothing, starts the autoscaler, and tells it to no one outside."""
    for name in ("CPU", "GPU"):
        if kind["resources"].get(name) != 0:
            yield Fault(
                f"{field}.resources.{name}", f"found {kind['resources'].get(name)}; expected 0: the head runs no work"
            )
    start = " ".join(found.get("head_start_ray_commands", []))
    for option in ("--head", "--num-cpus=0", "--num-gpus=0", "--autoscaling-config="):
        if option not in start:
            yield Fault("head_start_ray_commands", f"{option} is missing from `ray start`")
    if "--address=$RAY_HEAD_IP:" not in " ".join(found.get("worker_start_ray_commands", [])):
        yield Fault("worker_start_ray_commands", "--address=$RAY_HEAD_IP:PORT is missing from `ray start`")


def _numbers(found: Mapping[str, Any], workers: Mapping[str, Mapping[str, Any]]) -> Iterator[Fault]:
    for name, kind in workers.items():
        least, most = kind.get("min_workers", 0), kind.get("max_workers")
        if most is None:
            yield Fault(f"available_node_types.{name}.max_workers", "is missing")
        elif least > most:
            yield Fault(f"available_node_types.{name}.min_workers", f"{least} is more than max_workers, {most}")
        if not kind["resources"].keys() - {"CPU", "GPU"}:
            yield Fault(f"available_node_types.{name}.resources", "no custom resource says what the node is for")
    most = sum(kind.get("max_workers", 0) for kind in workers.values())
    if found.get("max_workers", 0) != most:
        yield Fault("max_workers", f"found {found.get('max_workers')}; expected {most}, the sum over the node types")


def _spot(provider: str, types: Mapping[str, Mapping[str, Any]], head: str) -> Iterator[Fault]:
    """Engines on spot nodes first, on demand as the fallback; head and trainer never on spot."""
    market = {"aws": _aws_spot, "gcp": _gcp_spot}.get(provider)
    if market is None:
        return
    spot = set()
    for name, kind in types.items():
        is_spot, wrong = market(kind["node_config"], f"available_node_types.{name}.node_config")
        yield from wrong
        spot |= {name} if is_spot else set()
    for name in types:
        tags = types[name]["resources"].keys() - {"CPU", "GPU"}
        if name in spot and (name == head or "trainer" in tags):
            yield Fault(f"available_node_types.{name}.node_config", "is spot; a run cannot do without this node")
    engines = [name for name in types if "rollout" in types[name]["resources"]]
    first = [types[name].get("priority", 0) for name in engines if name in spot]
    fallback = [types[name].get("priority", 0) for name in engines if name not in spot]
    if not first:
        yield Fault("available_node_types", "no node type with the resource `rollout` is spot")
    if not fallback:
        yield Fault("available_node_types", "no node type with the resource `rollout` is on demand, as the fallback")
    if first and fallback and min(first) <= max(fallback):
        yield Fault("available_node_types", "spot nodes need a higher priority than the nodes on demand")


def _aws_spot(config: Mapping[str, Any], field: str) -> tuple[bool, list[Fault]]:
    options = config.get("InstanceMarketOptions", {})
    wrong = [Fault(f"{field}.InstanceMarketOptions.{key}", "unknown key") for key in options.keys() - AWS_MARKET]
    if options and options.get("MarketType") != "spot":
        found = options.get("MarketType")
        wrong.append(Fault(f"{field}.InstanceMarketOptions.MarketType", f"found {found!r}; expected 'spot'"))
    return bool(options), wrong


def _gcp_spot(config: Mapping[str, Any], field: str) -> tuple[bool, list[Fault]]:
    scheduling = config.get("scheduling", {})
    if not isinstance(scheduling, Mapping):
        return False, [Fault(f"{field}.scheduling", "is a list; Compute Engine expects keys with values")]
    wrong = [Fault(f"{field}.scheduling.{key}", "unknown key") for key in scheduling.keys() - GCP_SCHEDULING]
    model = scheduling.get("provisioningModel", "STANDARD")
    if model not in ("SPOT", "STANDARD"):
        wrong.append(Fault(f"{field}.scheduling.provisioningModel", f"found {model!r}; expected SPOT or STANDARD"))
    return model == "SPOT", wrong


def _containers(found: Mapping[str, Any]) -> Iterator[Fault]:
    """The image, the token of every node, and a run directory that outlives its container."""
    docker = found.get("docker", {})
    yield from lock.image("docker.image", docker.get("image", ""))
    options = [" ".join(str(option).split()) for option in docker.get("run_options", [])]
    if "--env RAY_AUTH_MODE=token" not in options:
        yield Fault("docker.run_options", "tokens are off; expected --env RAY_AUTH_MODE=token")
    mounts = found.get("file_mounts", {})
    if not any(str(there).endswith("/.ray/auth_token") for there in mounts):
        yield Fault("file_mounts", "the token is missing; expected /home/ray/.ray/auth_token: ~/.ray/auth_token")
    if not re.search(r"chmod 600 \S*auth_token", " ".join(found.get("setup_commands", []))):
        yield Fault("setup_commands", "the token can be read by others; expected chmod 600 ~/.ray/auth_token")
    run_dir = found.get("metadata", {}).get("run_dir")
    if not any(option.startswith("--volume ") and option.endswith(f":{run_dir}") for option in options):
        yield Fault(
            "docker.run_options", f"metadata.run_dir, {run_dir}, is not mounted; expected --volume HOST:{run_dir}"
        )
