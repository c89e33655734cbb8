"""Reading files and holding them against a schema: every fault with its field, what was found and what is expected."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError

from rlhf.errors import BadInput
from rlhf.yaml_reader import parse

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = ROOT / "clusters" / "schemas"
UNKNOWN_KEY = re.compile(r"'([^']*)'(?:, '[^']*')* (?:was|were) unexpected|'([^']*)' does not match any of the regexes")


class Fault(NamedTuple):
    """Something that is wrong with a file: the field, from the top with dots, and a sentence."""

    field: str
    text: str


def documents(path: Path) -> list[Any]:
    """The documents of a YAML file. Raises BadInput with the file for what is no YAML, or has a key twice."""
    parts = re.split(r"^---[ \t]*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [document for part in parts if (document := parse(part, str(path))) is not None]


def document(path: Path) -> dict[str, Any]:
    found = documents(path)
    if len(found) != 1 or not isinstance(found[0], dict):
        raise BadInput(f"{path}: expected one YAML document with keys, found {len(found)} documents")
    return found[0]


def ray_schema() -> dict[str, Any]:
    """The schema of `ray up` files, out of the installed wheel."""
    spec = find_spec("ray")
    if spec is None or spec.origin is None:
        raise BadInput("ray is not installed. Next: make install")
    return json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())


@cache
def own_schema(name: str) -> dict[str, Any]:
    return json.loads((SCHEMAS / name).read_text())


def against(schema: Mapping[str, Any], found: Any, at: str) -> Iterator[Fault]:
    """Where a document departs from a schema. at, the document's own place in the file, or nothing."""
    for error in sorted(Draft7Validator(schema).iter_errors(found), key=lambda error: list(map(str, error.path))):
        place = dotted([at] if at else [], *error.path)
        yield Fault(place, _in_words(error))


def dotted(start: Sequence[str], *parts: str | int) -> str:
    text = ".".join(start)
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "(top)"


def strings(value: Any, at: str) -> Iterator[tuple[str, str]]:
    """Every text in a document with its field."""
    if isinstance(value, str):
        yield at, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from strings(part, dotted([at] if at else [], str(name)))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from strings(part, f"{at}[{index}]")


def _in_words(error: ValidationError) -> str:
    if error.validator == "additionalProperties" and isinstance(error.schema, Mapping):
        match = UNKNOWN_KEY.search(error.message)
        key = next((group for group in match.groups() if group), "?") if match else "?"
        known = list(error.schema.get("properties", {}))
        near = difflib.get_close_matches(key, known, 1)
        return f"unknown key '{key}'; " + (f"did you mean {near[0]}?" if near else f"keys there: {', '.join(known)}")
    if error.validator == "required":
        return error.message.replace(" is a required property", " is missing")
    if error.validator in ("enum", "const"):
        expected = error.validator_value if error.validator == "enum" else [error.validator_value]
        near = difflib.get_close_matches(str(error.instance), [str(value) for value in expected], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"found {error.instance!r}; expected one of {', '.join(map(str, expected))}{hint}"
    if isinstance(error.schema, Mapping) and "description" in error.schema and error.validator == "anyOf":
        return f"found {error.instance!r}; expected {error.schema['description']}"
    return error.message
