"""Holds our schemas and files against the published ones, by hand, when a version changes; needs files from elsewhere.

    python -m clusters.schemas.compare kuberay ray.io_rayclusters.yaml ray.io_rayjobs.yaml
    python -m clusters.schemas.compare skypilot          # where SkyPilot is installed

KubeRay's are in its repository, ray-operator/config/crd/bases, at the tag of the version. What is printed are fields of
ours that they do not have, or have with another type or other values, and whatever they refuse in our files.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator, Draft202012Validator

FOLDER = Path(__file__).resolve().parent
CLUSTERS = FOLDER.parent


def differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], all_ours: Mapping[str, Any], at: str
) -> Iterator[str]:
    """Fields of ours that are not theirs, or are of another type or may have other values."""
    ours = _resolved(ours, all_ours)
    if "anyOf" in ours or theirs.get("x-kubernetes-int-or-string") or not theirs:
        return
    mine, published = ours.get("type"), theirs.get("type")
    if mine and published and mine != published:
        yield f"{at}: we say {mine}, they say {published}"
    if "enum" in ours and "enum" in theirs and not set(ours["enum"]) <= set(theirs["enum"]):
        yield f"{at}: we allow {ours['enum']}, they allow {theirs['enum']}"
    known = theirs.get("properties")
    for name, part in ours.get("properties", {}).items():
        if known is not None and name not in known:
            yield f"{at}.{name}: they have no such field"
        elif known is not None:
            yield from differences(part, known[name], all_ours, f"{at}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(ours.get(key), Mapping) and isinstance(theirs.get(key), Mapping):
            yield from differences(ours[key], theirs[key], all_ours, f"{at}[]")


def closed(schema: Any) -> Any:
    """A copy that refuses unknown fields, as a server with strict validation does, and takes numbers for quantities."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    copy = {name: closed(part) for name, part in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        copy.pop("type", None)
    if isinstance(schema.get("properties"), Mapping) and "additionalProperties" not in schema:
        copy["additionalProperties"] = False
    return copy


def kuberay(definitions: Sequence[Path]) -> Iterator[str]:
    own = yaml.safe_load((FOLDER / "kuberay.json").read_text())
    for path in definitions:
        found = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        kind = found["spec"]["names"]["kind"]
        [schema] = [v["schema"]["openAPIV3Schema"] for v in found["spec"]["versions"] if v["name"] == "v1"]
        spec = schema["properties"]["spec"]
        yield from differences(own["definitions"][kind]["properties"]["spec"], spec, own, f"{kind}.spec")
        for file in sorted((CLUSTERS / "kuberay").glob("*.yaml")):
            for document in yaml.safe_load_all(file.read_text()):
                if document["kind"] == kind:
                    for error in Draft7Validator(closed(spec)).iter_errors(document["spec"]):
                        yield f"{file.name}: spec.{'.'.join(map(str, error.path))}: {error.message}"


def skypilot() -> Iterator[str]:
    from sky.utils import schemas

    own = yaml.safe_load((FOLDER / "skypilot.json").read_text())
    task, resources, storage = schemas.get_task_schema(), schemas.get_resources_schema(), schemas.get_storage_schema()
    yield from differences(own, task, own, "task")
    yield from differences(own["properties"]["resources"], resources, own, "task.resources")
    mount = own["properties"]["file_mounts"]["additionalProperties"]
    yield from differences(mount, storage, own, "task.file_mounts[]")
    for file in sorted((CLUSTERS / "skypilot").glob("*.yaml")):
        found = yaml.safe_load(file.read_text())
        parts = [("", task, found), ("resources", resources, found["resources"])]
        parts += [(f"file_mounts.{place}", storage, one) for place, one in found.get("file_mounts", {}).items()]
        for at, schema, part in parts:
            for error in Draft202012Validator(schema).iter_errors(part):
                yield f"{file.name}: {at}: {'.'.join(map(str, error.path))}: {error.message}"


def _resolved(schema: Mapping[str, Any], whole: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = schema.get("$ref")
    return whole["definitions"][reference.rpartition("/")[2]] if reference else schema


if __name__ == "__main__":
    what, *paths = sys.argv[1:] or [""]
    if what not in ("kuberay", "skypilot"):
        sys.exit(__doc__)
    lines = list(kuberay([Path(path) for path in paths]) if what == "kuberay" else skypilot())
    print("\n".join([*lines, f"{len(lines)} differences"]))
    sys.exit(1 if lines else 0)
