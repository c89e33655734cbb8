"""From a model's name to a folder that transformers loads: `tiny`, `tiny-untied`, `tiny_t5`, `smollm2`, a folder, a
hub name.

`check_model` answers within seconds, loads no weights and imports torch for weights in torch's own format (.bin) only,
so that bad input is found before anything heavy starts. What is built here is built beside its place in the cache and
renamed, so two processes may build at once.
"""

import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.errors import BadInput
from rlhf.places import expanded

TINY = {"tiny": True, "tiny-untied": False}  # name -> tied embeddings
TINY_T5 = "tiny_t5"
SMOLLM2 = "smollm2"
BUILT = (*TINY, TINY_T5, SMOLLM2)
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


def cache_root() -> Path:
    """Where built and converted models are kept: $RLHF_CACHE, else ~/.cache/ray-rlhf."""
    configured = os.environ.get("RLHF_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "ray-rlhf"


def resolve(name: str) -> Path:
    """The local folder of a model, built, converted or downloaded when it is not there yet.

    Raises BadInput when the name is neither a built-in model, nor a model folder, nor a hub name that can be reached.
    """
    if name in TINY:
        from rlhf.models.tiny import RECIPE, build_tiny

        return _cached(f"{name}-{RECIPE}", lambda folder: build_tiny(folder, tied=TINY[name]))
    if name == TINY_T5:
        from rlhf.models.tiny_t5 import RECIPE, build_tiny_t5

        return _cached(f"{TINY_T5}-{RECIPE}", build_tiny_t5)
    if name == SMOLLM2:
        from rlhf.models.smollm2 import RECIPE, build_smollm2

        return _cached(f"{SMOLLM2}-{RECIPE}", build_smollm2)
    folder = expanded(name)
    if not folder.is_dir():
        folder = _from_hub(name, _HUB_FILES)
    check_folder(folder)
    return folder


def check_model(name: str) -> None:
    """Raises BadInput when the model cannot be loaded, naming the file; loads no weights."""
    if name in BUILT:
        return
    folder = expanded(name)
    if folder.is_dir():
        check_folder(folder)
    else:
        _from_hub(name, ["config.json"])


def is_encoder_decoder(name: str) -> bool:
    """Whether an encoder reads the prompt (T5), told from the model's config; loads no weights, imports no torch.

    Raises BadInput as `check_model`, which comes first.
    """
    if name in BUILT:
        return name == TINY_T5
    return bool(read_config(name).get("is_encoder_decoder", False))


def read_config(name: str) -> dict[str, Any]:
    """config.json of a model folder or hub name; of the hub nothing else is fetched. Raises BadInput without one."""
    folder = expanded(name)
    if not folder.is_dir():
        folder = _from_hub(name, ["config.json"])
    if not (folder / "config.json").is_file():
        raise BadInput(
            f"model.name: {folder} has no config.json, so it is not a model folder; it holds {_listing(folder)}"
        )
    return _read_json(folder / "config.json")


def check_folder(folder: Path) -> None:
    """Raises BadInput unless the folder holds a configuration, a tokenizer and every shard of the weights, whole."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise BadInput(f"model.name: {folder} is a LoRA adapter (adapter_config.json), not a model. Merge it first")
        raise BadInput(
            f"model.name: {folder} has no config.json, so it is not a model folder; it holds {_listing(folder)}"
        )
    for name, check in _CHECKS:
        if (folder / name).is_file():
            check(folder / name)
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise BadInput(f"model.name: {folder} has no tokenizer: expected one of {', '.join(_TOKENIZER_FILES)}")
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.is_file():
            return check_weights(single)
        if index.is_file():
            return _check_shards(folder, index)
    raise BadInput(
        f"model.name: {folder} has no weights: expected model.safetensors, or model.safetensors.index.json with its "
        f"shards, found {_listing(folder)}"
    )


def _check_eos(file: Path) -> None:
    """Raises BadInput unless the file is JSON and the tokens in it that end a completion, if any, are numbers."""
    eos = _read_json(file).get("eos_token_id")
    found = eos if isinstance(eos, list) else [eos]
    if eos is not None and not all(type(token) is int for token in found):
        raise BadInput(f"model.name: {file}: eos_token_id is {eos!r}; expected a whole number, or a list of them")


def code_parts(file: Path) -> list[str]:
    """The code of its own (`auto_map`) that a file of a model names. Raises BadInput for a file that is no JSON object,
    or an auto_map of another form than transformers reads."""
    named = _read_json(file).get("auto_map") or {}
    if isinstance(named, list) and file.name == "tokenizer_config.json":  # the older form, without the class's name
        named = {"AutoTokenizer": named}
    values: list[Any] = list(named.values()) if isinstance(named, dict) else [0]
    parts: list[Any] = [part for value in values for part in (value if isinstance(value, list) else [value])]
    if not all(part is None or isinstance(part, str) for part in parts):
        raise BadInput(
            f"model.name: {file}: auto_map is {str(named)[:80]!r}; expected an object of a class and its code each"
        )
    return [part for part in dict.fromkeys(parts) if part]


# What the small files of a folder are checked for.
_CHECKS: tuple[tuple[str, Callable[[Path], object]], ...] = (
    ("config.json", _check_eos),
    ("generation_config.json", _check_eos),
    ("config.json", code_parts),
    ("tokenizer_config.json", code_parts),
)


def _check_shards(folder: Path, index: Path) -> None:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"model.name: {index} has no weight_map, which says which shard holds which tensor")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise BadInput(f"model.name: {index} names the shard {shard!r}; expected a file beside it")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        tensors = sum(shard in missing for shard in weight_map.values())
        raise BadInput(
            f"model.name: {folder} misses {len(missing)} of {len(shards)} shards: {', '.join(missing[:5])}, which "
            f"hold {tensors} of {len(weight_map)} tensors. Copy the missing files beside {index.name}"
        )
    for shard in shards:
        check_weights(folder / shard)


def check_weights(file: Path) -> None:
    """Raises BadInput for a weight file that was cut short: a safetensors file says in its header how long it is."""
    size = file.stat().st_size
    if file.suffix != ".safetensors":
        if size == 0:
            raise BadInput(f"model.name: {file} is empty")
        return _check_pickle(file)
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_size > size - 8:
            raise BadInput(f"model.name: {file} is not a whole safetensors file: {size} bytes. Download it again")
        text = stream.read(header_size)
    try:
        header = json.loads(text)
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise BadInput(
            f"model.name: {file} has no readable header of safetensors ({error!r}). Download it again"
        ) from error
    expected = 8 + header_size + max(ends, default=0)
    if size != expected:
        raise BadInput(f"model.name: {file} has {size} bytes, its header says {expected}. Download it again")


def _check_pickle(file: Path) -> None:
    """A weight file of torch is a pickle, which can hold any code; only one that holds tensors is read, here and by
    whoever loads it. Reads no tensor's values."""
    import torch

    try:
        torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(
            f"model.name: {file} does not hold tensors alone, or is not whole, and is not read: {reason} Next: get the "
            "model as safetensors"
        ) from error


def _from_hub(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    known = f"`{'`, `'.join(BUILT)}`, a model folder, or a hub name"
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=4))
    except HFValidationError:
        raise BadInput(f"model.name: {name} is no folder on this machine and no hub name. Expected {known}") from None
    except RepositoryNotFoundError:
        raise BadInput(f"model.name: the hub has no model {name}, or it needs a token. Expected {known}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        reason = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else f"the hub cannot be reached ({error})"
        raise BadInput(
            f"model.name: {name} is no folder on this machine, not in the hub's local cache, and {reason}. "
            f"Expected {known}"
        ) from error


def _cached(entry: str, build: Callable[[Path], None]) -> Path:
    """The cache's entry, built beside its place and renamed: whoever renames first wins, the other copy goes."""
    final = cache_root() / entry
    if final.is_dir():
        _check_built(final)
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{entry}-", dir=final.parent))
    except OSError as error:
        raise BadInput(
            f"{final.parent}: built models are kept there, and it cannot be written: {error.strerror}. Next: set "
            "RLHF_CACHE to a folder of yours"
        ) from error
    try:
        build(beside)
        beside.chmod(0o755)
        try:
            beside.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return final


def _check_built(folder: Path) -> None:
    """Raises BadInput for an entry of the cache that has lost files since it was built, all of it in one rename."""
    try:
        check_folder(folder)
        _read_json(folder / "tokenizer.json")
    except (BadInput, FileNotFoundError) as error:
        raise BadInput(
            f"{str(error).removeprefix('model.name: ')}. {folder} was built here and is not whole any more. Next: "
            "remove that folder; it is then built again"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise BadInput(f"model.name: {file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f"model.name: {file} must hold a JSON object, not a {type(content).__name__}")
    return content


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
