"""Groups and columns as bytes and back: arrays in safetensors, the rest in JSON. No pickle: reading never runs code.

    payload = "RLX1" | length of the JSON, 4 bytes little-endian | JSON, UTF-8 | safetensors

What comes back equals what went in: dtypes, shapes and floats bit for bit, None as None, the order of columns. A
value that JSON would change (a tuple, a date, a key that is not a string) is refused by name instead of being
altered. Knows no SQL.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from rlhf.errors import BadInput
from rlhf.experience import Columns, Group, Prompt, Sample, Sampling

MAGIC = b"RLX1"
HEADER = struct.Struct("<4sI")

Arrays = dict[str, NDArray[Any]]
Json = dict[str, Any]


class UnreadablePayload(ValueError):
    """The bytes are not a payload of this codec."""


def checksum(address: str, payload: bytes) -> bytes:
    """16 bytes over where a payload belongs and what it holds, so that a payload in another's place is found too."""
    return hashlib.blake2b(address.encode() + b"\0" + payload, digest_size=16).digest()


def encode_group(group: Group) -> bytes:
    """Raises BadInput when the prompt's content or a column of its row holds what JSON cannot give back unchanged."""
    prompt = group.prompt
    where = f"row {prompt.row} (prompt {prompt.id})"
    check_json(prompt.content, f"{where}, prompt")
    for name, value in prompt.columns.items():
        check_json(name, f"{where}, name of a column")
        check_json(value, f"{where}, column '{name}'")
    arrays: Arrays = {"prompt": prompt.token_ids}
    header: Json = {
        "kind": "group",
        "origin": group.origin,
        "prompt": {
            "id": int(prompt.id),
            "row": int(prompt.row),
            "epoch": int(prompt.epoch),
            "content": prompt.content,
            "text": prompt.text,
            "columns": dict(prompt.columns),
        },
        "samples": [_encode_sample(sample, arrays) for sample in group.samples],
    }
    return _join(header, arrays)


def decode_group(payload: bytes) -> Group:
    """Raises UnreadablePayload when the bytes are not a group."""
    header, arrays = _split(payload, "group")
    try:
        prompt = Prompt(token_ids=arrays["prompt"], **header["prompt"])
        samples = tuple(_decode_sample(index, entry, arrays) for index, entry in enumerate(header["samples"]))
        return Group(prompt, samples, header["origin"])
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadablePayload(f"the payload does not hold a well-formed group: {error!r}") from error


def encode_column(columns: Columns, name: str) -> bytes:
    """One column of a judge's answer, by its name."""
    if name in columns.scores:
        return _join({"kind": "scores", "values": [_number(score) for score in columns.scores[name]]}, {})
    arrays: Arrays = {str(index): array for index, array in enumerate(columns.tokens[name])}
    return _join({"kind": "tokens", "count": len(arrays)}, arrays)


def decode_column(prompt_id: int, name: str, payload: bytes) -> Columns:
    """Raises UnreadablePayload when the bytes are not a column."""
    header, arrays = _split(payload, "scores", "tokens")
    try:
        if header["kind"] == "scores":
            return Columns(prompt_id, {name: header["values"]}, {})
        return Columns(prompt_id, {}, {name: [arrays[str(index)] for index in range(header["count"])]})
    except (KeyError, TypeError) as error:
        raise UnreadablePayload(f"the payload does not hold a column: {error!r}") from error


def check_json(value: object, where: str) -> None:
    """Raises BadInput unless JSON gives back the same value of the same types; `where` names it in the message."""
    if value is None or type(value) in (bool, int, float, str):
        return
    if isinstance(value, list):
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                _refuse(where, f"the key {key!r} ({type(key).__name__})")
            check_json(item, f"{where}[{key!r}]")
    else:
        _refuse(where, f"{value!r:.80} ({type(value).__module__}.{type(value).__qualname__})")


def _refuse(where: str, found: str) -> NoReturn:
    raise BadInput(
        f"{where}: cannot be kept in the experience buffer: found {found}, expected null, booleans, numbers, strings, "
        f"and lists or string-keyed objects of them. Convert the column in the data (a date to its ISO string, for "
        f"example) or leave it out"
    )


def _encode_sample(sample: Sample, arrays: Arrays) -> Json:
    at = f"{sample.index}/"
    arrays[at + "ids"] = sample.token_ids
    arrays[at + "mask"] = sample.loss_mask
    if sample.behavior_logprobs is not None and sample.versions is not None:
        arrays[at + "logprobs"] = sample.behavior_logprobs
        arrays[at + "versions"] = sample.versions
    for name, column in sample.tokens.items():
        arrays[at + "tokens/" + name] = column
    return {
        "text": sample.text,
        "finish_reason": sample.finish_reason,
        "sampled": sample.versions is not None,
        "sampling": None if sample.sampling is None else _encode_sampling(sample.sampling),
        "seed": None if sample.seed is None else int(sample.seed),
        "scores": {name: _number(score) for name, score in sample.scores.items()},
        "tokens": list(sample.tokens),
    }


def _decode_sample(index: int, entry: Json, arrays: Mapping[str, NDArray[Any]]) -> Sample:
    at = f"{index}/"
    return Sample(
        index=index,
        token_ids=arrays[at + "ids"],
        loss_mask=arrays[at + "mask"],
        text=entry["text"],
        finish_reason=entry["finish_reason"],
        behavior_logprobs=arrays[at + "logprobs"] if entry["sampled"] else None,
        versions=arrays[at + "versions"] if entry["sampled"] else None,
        sampling=None if entry["sampling"] is None else Sampling(**entry["sampling"]),
        seed=entry["seed"],
        scores=entry["scores"],
        tokens={name: arrays[at + "tokens/" + name] for name in entry["tokens"]},
    )


def _encode_sampling(sampling: Sampling) -> Json:
    return {
        "temperature": float(sampling.temperature),
        "top_p": float(sampling.top_p),
        "top_k": int(sampling.top_k),
        "max_new_tokens": int(sampling.max_new_tokens),
    }


def _number(score: float | None) -> float | None:
    """A plain float: judges answer in numpy's floats too, which widen to Python's without a change of value."""
    return None if score is None else float(score)


def _join(header: Json, arrays: Arrays) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    body = save_arrays({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return HEADER.pack(MAGIC, len(text)) + text + body


def _split(payload: bytes, *kinds: str) -> tuple[Json, Arrays]:
    if len(payload) < HEADER.size:
        raise UnreadablePayload(f"the payload is {len(payload)} bytes long, too short to be one")
    magic, length = HEADER.unpack_from(payload)
    if magic != MAGIC:
        raise UnreadablePayload(f"the payload starts with {magic!r}, expected {MAGIC!r}")
    try:
        header: Json = json.loads(payload[HEADER.size : HEADER.size + length])
        arrays = load_arrays(payload[HEADER.size + length :])
    except (ValueError, KeyError, SafetensorError) as error:
        raise UnreadablePayload(f"the payload cannot be parsed: {error!r}") from error
    if header.get("kind") not in kinds:
        raise UnreadablePayload(f"the payload holds {header.get('kind')!r}, expected one of {kinds}")
    return header, arrays
