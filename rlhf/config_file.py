"""Reads run files and cluster files: YAML plus `key=value` overrides in, checked settings out.

Every fault is a BadInput that names the file (or the override), the whole key, what was found and what is expected, one
line a fault. Imports neither torch nor ray nor transformers.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rlhf.chaos.plan import ChaosPlan
from rlhf.cluster import Cluster
from rlhf.config import PpoConfig, RewardConfig, RewardSource, RunConfig
from rlhf.config_keys import explain
from rlhf.credentials import refuse_credentials
from rlhf.errors import BadInput
from rlhf.places import expanded
from rlhf.yaml_reader import MOST_LEVELS, TOO_DEEP, parse, whole, write

Model = TypeVar("Model", bound=BaseModel)
Source = TypeVar("Source", bound=RewardSource)


def load_run(path: Path, overrides: Sequence[str]) -> RunConfig:
    """The run file with the overrides applied, checked, its relative paths made absolute.

    A relative `data.path`, `mix.data.path`, `model.name`, `algorithm.critic.init`, or file or folder of the reward is
    looked for below the current directory, then below the run file's folder; what is in neither stays as it is (a hub
    name, an import path, or its reader's error).
    """
    config = _load(path, overrides, RunConfig)
    folders = (Path.cwd(), path.resolve().parent)
    model, data, reward = config.model, config.data, config.reward
    if reward is not None:
        reward = _absolute_reward(reward, folders)
    if _is_path(model.name):
        model = model.model_copy(update={"name": _absolute(model.name, folders)})
    data = data.model_copy(update={"path": _absolute(data.path, folders)})
    algorithm = config.algorithm
    if isinstance(algorithm, PpoConfig) and _is_path(algorithm.critic.init):
        critic = algorithm.critic.model_copy(update={"init": _absolute(algorithm.critic.init, folders)})
        algorithm = algorithm.model_copy(update={"critic": critic})
    mix = config.mix
    if mix is not None:
        rows = mix.data.model_copy(update={"path": _absolute(mix.data.path, folders)})
        mix = mix.model_copy(update={"data": rows})
    return config.model_copy(
        update={"model": model, "algorithm": algorithm, "data": data, "mix": mix, "reward": reward}
    )


def _absolute_reward(reward: RewardConfig, folders: Sequence[Path]) -> RewardConfig:
    found = _absolute_source(reward, folders)
    if found.parts is not None:
        parts = {name: _absolute_source(part, folders) for name, part in found.parts.items()}
        found = found.model_copy(update={"parts": parts})
    if found.reference is not None:
        path = _absolute(found.reference.path, folders)
        found = found.model_copy(update={"reference": found.reference.model_copy(update={"path": path})})
    return found


def _absolute_source(source: Source, folders: Sequence[Path]) -> Source:
    update: dict[str, object] = {}
    file, colon, name = (source.function or "").rpartition(":")
    if file.endswith(".py"):
        update["function"] = _absolute(file, folders) + colon + name
    if source.model is not None and _is_path(source.model):
        update["model"] = _absolute(source.model, folders)
    if source.ranker is not None and _is_path(source.ranker.model):
        model = _absolute(source.ranker.model, folders)
        update["ranker"] = source.ranker.model_copy(update={"model": model})
    return source.model_copy(update=update)


def load_cluster(path: Path, overrides: Sequence[str]) -> Cluster:
    """The cluster file with the overrides applied, checked."""
    return _load(path, overrides, Cluster)


def load_chaos(path: Path) -> ChaosPlan:
    """The chaos file, checked."""
    return _load(path, [], ChaosPlan)


def dump(config: BaseModel) -> str:
    """All keys as YAML, defaults included; secrets (pydantic's SecretStr) are written as asterisks."""
    return write(config.model_dump(mode="json"))


def differing_keys(old: BaseModel, new: BaseModel) -> list[str]:
    """The full keys, sorted, whose values differ between two files of one kind."""
    left, right = _flat(old.model_dump(mode="json"), ""), _flat(new.model_dump(mode="json"), "")
    missing = object()
    return sorted(key for key in left.keys() | right.keys() if left.get(key, missing) != right.get(key, missing))


def _load(path: Path, overrides: Sequence[str], kind: type[Model]) -> Model:
    data = _read(path)
    _refuse_secrets(data, "", str(path))
    sources: dict[str, str] = {}
    for override in overrides:
        refuse_credentials(override.partition("=")[2], f"override of {override.partition('=')[0]}")
        key, value = _split(override)
        _put(data, key, value, override)
        sources[key] = override
    _refuse_secrets(data, "", str(path))
    try:
        # JSON's strict mode refuses to guess ("5" is no number, true no 1) but takes 1 for 1.0 and a list for a tuple.
        return kind.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise BadInput("\n".join(explain(error, data, kind, str(path), sources))) from error


def _refuse_secrets(value: Any, key: str, file: str) -> None:
    """Before anything is said of a value: the messages of other faults show what was found."""
    if isinstance(value, dict):
        for name, part in value.items():
            _refuse_secrets(part, f"{key}.{name}" if key else str(name), file)
    elif isinstance(value, list):
        for part in value:
            _refuse_secrets(part, key, file)
    elif isinstance(value, str):
        refuse_credentials(value, f"{file}: {key}")


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file (looked in {Path.cwd()})") from error
    except IsADirectoryError as error:
        raise BadInput(f"{path}: is a folder; expected a YAML file") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: cannot be read as UTF-8 text: {error}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"{str(path)[:200]!r}: cannot be read: {reason}; expected a YAML file") from error
    data = parse(text, str(path))
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise BadInput(f"{path}: found {found} at the top; expected keys with values, such as `seed: 0`")
    return data


def _split(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise BadInput(f"override '{override}': expected key.sub=value, such as learner.lr=1e-5")
    if key.count(".") >= MOST_LEVELS:
        raise BadInput(f"override '{override[:60]}…': {TOO_DEEP}")
    return whole(key, f"override {override[:60]!a}"), parse(text, f"override '{override}'")


def _put(data: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, last = key.split(".")
    place = data
    for depth, name in enumerate(parents, start=1):
        if place.get(name) is None:
            place[name] = {}
        place = place[name]
        if not isinstance(place, dict):
            above = ".".join(parents[:depth])
            raise BadInput(f"override '{override}': {above} is {place!r}, which has no keys below it")
    place[last] = value


def _is_path(name: str) -> bool:
    """Whether a model's name may be a folder; a hub name may look like one."""
    return "/" in name or name.startswith((".", "~"))


def _absolute(name: str, folders: Sequence[Path]) -> str:
    path = expanded(name)
    if "\0" in name:
        raise BadInput(f"{name[:60]!r}: holds a NUL character, which no path has")
    for candidate in [folder / path for folder in folders]:
        try:
            there = candidate.exists()
        except OSError as error:  # too long to be a path
            raise BadInput(f"{name[:60]!r}…: cannot be looked for: {error.strerror}") from error
        if there:
            return str(candidate.resolve())
    return str(path) if name.startswith("~") else name


def _flat(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {key: value}
    flat: dict[str, Any] = {}
    for name, part in value.items():
        flat.update(_flat(part, f"{key}.{name}" if key else name))
    return flat
