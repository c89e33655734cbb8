"""Rules for SkyPilot tasks and managed jobs, for what the schema leaves free."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clusters.checks import lock
from clusters.checks.commands import cluster_file, run_command
from clusters.checks.documents import Fault, against, own_schema
from clusters.checks.places import Kind, missing_room
from clusters.checks.scripts import ray_nodes, syntax, whole

TOKEN = "RAY_AUTH_TOKEN"
# The exit codes of `rlhf run` that mean: the same again may go well. 2 is bad input, 4 a run that failed for good.
TRY_AGAIN, NEVER_AGAIN = {3, 130}, {2, 4}


def faults(found: Any) -> Iterator[Fault]:
    broken = list(against(own_schema("skypilot.json"), found, ""))
    yield from broken
    if broken:
        return
    envs: Mapping[str, str] = found.get("envs", {})
    yield from lock.image("resources.image_id", found["resources"]["image_id"])
    yield from _token(found, envs)
    yield from syntax("run", found["run"])
    yield from run_command("run", found["run"], envs, None)
    head, others, wrong = ray_nodes("run", found["run"])
    yield from wrong
    cluster, wrong = cluster_file("envs.CLUSTER", envs.get("CLUSTER"))
    yield from wrong
    if cluster is None:
        return
    machine = {
        "CPU": whole(found["resources"].get("cpus", 0)),
        "GPU": float(found["resources"]["accelerators"].partition(":")[2] or 1),
    }
    kinds = [Kind("node 0", {**machine, **head}, 1), Kind("others", {**machine, **others}, found["num_nodes"] - 1)]
    for fault in missing_room(cluster, kinds):
        yield Fault("num_nodes", f"{envs['CLUSTER']}: {fault.field}: {fault.text}")
    yield from _recovery(found, cluster.storage.address)


def _token(found: Mapping[str, Any], envs: Mapping[str, str]) -> Iterator[Fault]:
    if envs.get("RAY_AUTH_MODE") != "token":
        yield Fault("envs.RAY_AUTH_MODE", f"found {envs.get('RAY_AUTH_MODE')!r}; expected token")
    secrets = found.get("secrets", {})
    if TOKEN not in secrets:
        yield Fault(f"secrets.{TOKEN}", "is missing: nobody could join, or everybody")
    for name, value in secrets.items():
        if value is not None:
            yield Fault(f"secrets.{name}", "a secret in clear; expected null, and --secret when it is launched")


def _recovery(found: Mapping[str, Any], address: str | None) -> Iterator[Fault]:
    """Spot machines take all they hold with them: the state must be in a bucket, and only some exit codes try again."""
    recovery = found["resources"].get("job_recovery")
    if not found["resources"].get("use_spot"):
        return
    if recovery is None:
        yield Fault("resources.job_recovery", "is missing: a spot machine that is taken away would end the run")
        return
    codes = set(recovery.get("recover_on_exit_codes", []))
    if not codes >= TRY_AGAIN or codes & NEVER_AGAIN:
        expected = f"expected {sorted(TRY_AGAIN)} among them, and none of {sorted(NEVER_AGAIN)}"
        yield Fault("resources.job_recovery.recover_on_exit_codes", f"found {sorted(codes)}; {expected}")
    mounts = found.get("file_mounts", {})
    kept = [place for place, mount in mounts.items() if mount.get("mode", "MOUNT") != "COPY"]
    if address is None or not any(Path(address).is_relative_to(place) for place in kept):
        field = "file_mounts"
        yield Fault(
            field, f"the cluster file's storage.address, {address}, is below no mounted bucket: {kept or 'none'}"
        )
