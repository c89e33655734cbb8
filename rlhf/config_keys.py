"""The keys of a run or cluster file: all of them in order, the one nearest to a misspelt one, and faults in words."""

import difflib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel, StringConstraints, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

NEAREST = 0.6  # difflib's own cutoff for close matches

# What other systems call our keys.
ELSEWHERE = {
    "learner.learning_rate": "learner.lr",
    "algorithm.beta": "algorithm.kl.coef",
    "algorithm.ratio_cap": "algorithm.off_policy.cap",
    "algorithm.num_generations": "algorithm.samples_per_prompt",
    "generation.max_tokens": "generation.max_new_tokens",
    "loop.batch_size": "loop.groups_per_step",
    "loop.max_steps": "loop.num_steps",
    "loop.save_steps": "loop.checkpoint_every",
    "model.model_name_or_path": "model.name",
}


@dataclass(frozen=True, slots=True)
class Key:
    """One key: its full name, its type and default in words, and what it means."""

    name: str
    type: str
    default: str
    meaning: str
    is_section: bool


def all_keys(kind: type[BaseModel]) -> list[Key]:
    """Every key of a file in the order of the code; what several algorithms share stands there once."""
    found: dict[str, Key] = {}
    for key in _walk(kind, ""):
        known = found.get(key.name)
        if known is None:
            found[key.name] = key
        elif key.default not in known.default.split(" / "):
            found[key.name] = Key(
                key.name, known.type, f"{known.default} / {key.default}", known.meaning, known.is_section
            )
        if known is not None and key.type not in known.type:
            merged = found[key.name]
            found[key.name] = Key(
                key.name, f"{known.type}, {key.type}", merged.default, merged.meaning, merged.is_section
            )
    return list(found.values())


def nearest(name: str, kind: type[BaseModel]) -> str | None:
    """The key most like a misspelt one: by its whole name, or by its last part when the section is wrong."""
    section, _, last = name.rpartition(".")
    ours = {key.name: key.name for key in all_keys(kind) if key.name != section}
    theirs = {key: known for key, known in ELSEWHERE.items() if known in ours}
    best, best_score = None, NEAREST
    for key, known in {**ours, **theirs}.items():
        whole = difflib.SequenceMatcher(None, name, _named_as(key, name)).ratio()
        part = difflib.SequenceMatcher(None, last, key.rpartition(".")[2]).ratio()
        score = max(whole, 0.95 * part)  # on a tie the key of the same section wins
        if score > best_score:
            best, best_score = known, score
    return best


def _named_as(key: str, name: str) -> str:
    """The key with the name that a person chose where the table says NAME."""
    parts, chosen = key.split("."), name.split(".")
    at = parts.index("NAME") if "NAME" in parts else len(chosen)
    return key if at >= len(chosen) else ".".join([*parts[:at], chosen[at], *parts[at + 1 :]])


def explain(
    error: ValidationError, data: Mapping[str, Any], kind: type[BaseModel], file: str, overrides: Mapping[str, str]
) -> list[str]:
    """One line a fault: where it was written, the key, what was found, what is expected."""
    lines: list[str] = []
    for fault in error.errors(include_url=False):
        key = _key_of(fault, data)
        if fault["type"].startswith("union_tag"):
            key += "." + fault["ctx"]["discriminator"].strip("'")
        cause = next((text for name, text in overrides.items() if f"{key}.".startswith(f"{name}.")), None)
        place = f"override '{cause}'" if cause else file
        line = f"{place}: {_in_words(fault, key, kind)}"
        found, expected, alternative = line.rpartition("; expected ")
        if expected and lines and lines[-1].startswith(found + expected):
            lines[-1] += f" or {alternative}"  # the value may have one of several types, and has none of them
        else:
            lines.append(line)
    return lines


def _in_words(fault: ErrorDetails, key: str, kind: type[BaseModel]) -> str:
    found, what = fault["input"], fault["type"]
    if what == "extra_forbidden":
        near = nearest(key, kind)
        if near == key:
            return f"{key} is a key of other kinds of {key.rpartition('.')[0]} only; leave it out here"
        return f"unknown key {key}" + (f"; did you mean {near}?" if near else f"; keys there: {_siblings(key, kind)}")
    if what == "missing" and isinstance(fault["loc"][-1], int):
        return f"{key}: found {_shown(found)} (list); expected a value at place {fault['loc'][-1] + 1}, too"
    if what == "missing":
        meaning = next((k.meaning for k in all_keys(kind) if k.name == key), "")
        return f"missing required key {key}" + (f" ({meaning})" if meaning else "")
    if what == "union_tag_not_found":
        return f"missing required key {key}"
    if what == "union_tag_invalid":
        return f"{key}: found {_shown(fault['ctx']['tag'])}; expected one of {fault['ctx']['expected_tags']}"
    if what == "value_error":
        message = fault["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    expected = fault["msg"].removeprefix("Input should be ").removeprefix("a valid ").removeprefix("an ")
    expected = {"array": "list", "object": "keys with values"}.get(expected, expected)
    return f"{key}: found {_shown(found)} ({_type_name(found)}); expected {expected}"


def _key_of(fault: ErrorDetails, data: Any) -> str:
    """The key as a person wrote it: pydantic's location without the labels of unions."""
    parts: list[str] = []
    place = data
    location = fault["loc"]
    for depth, part in enumerate(location):
        inside = (isinstance(place, Mapping) and part in place) or (
            isinstance(place, list) and isinstance(part, int) and part < len(place)
        )
        if inside:
            place = place[part]
            parts.append(str(part))
        elif fault["type"] == "missing" and isinstance(part, str) and depth == len(location) - 1:
            parts.append(str(part))
    return ".".join(parts)


def _siblings(key: str, kind: type[BaseModel]) -> str:
    section = key.rpartition(".")[0]
    names = [k.name for k in all_keys(kind) if k.name.rpartition(".")[0] == section]
    return ", ".join(names) or ", ".join(k.name for k in all_keys(kind) if "." not in k.name)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _type_name(value: Any) -> str:
    names = {str: "text", bool: "true/false", int: "whole number", float: "number", dict: "keys with values"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _walk(kind: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, field in kind.model_fields.items():
        key = f"{prefix}{name}"
        sections = _sections(field.annotation)
        yield Key(key, _type_in_words(field), _default(field), field.description or "", bool(sections))
        below = f"{key}.NAME." if _names_sections(field.annotation) else f"{key}."
        for section in sections:
            yield from _walk(section, below)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated, dict):
        return [section for part in get_args(annotation) for section in _sections(part)]
    return []


def _names_sections(annotation: Any) -> bool:
    """Whether the sections of a field have names that people choose."""
    if get_origin(annotation) in (Union, types.UnionType):
        return any(_names_sections(part) for part in get_args(annotation))
    return get_origin(annotation) is dict and bool(_sections(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is PydanticUndefined:
        return (
            "its own keys' defaults"
            if _sections(field.annotation)
            else str(field.get_default(call_default_factory=True))
        )
    if field.default is None:
        return "null"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return str(list(field.default)) if isinstance(field.default, tuple) else str(field.default)


def _type_in_words(field: FieldInfo) -> str:
    return _words(field.annotation, field.metadata)


def _words(annotation: Any, metadata: list[Any]) -> str:
    if _sections(annotation):
        section = "sections by name" if _names_sections(annotation) else "section"
        return f"{section} or null" if type(None) in get_args(annotation) else section
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        flat = [m for item in more for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return _words(inner, [*flat, *metadata])
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _words(part, []) for part in get_args(annotation))
    if get_origin(annotation) in (list, tuple):
        return "list of " + ", ".join(_words(part, []) for part in get_args(annotation))
    if get_origin(annotation) is dict:
        return "names with numbers"
    name = {str: "text", bool: "true or false", int: "whole number", float: "number"}[annotation]
    bounds = [_bound(bound) for bound in metadata if not isinstance(bound, AfterValidator | StringConstraints)]
    return f"{name} {', '.join(bounds)}".strip()


def _bound(bound: Any) -> str:
    if isinstance(bound, Ge):
        return f"≥ {bound.ge}"
    if isinstance(bound, Gt):
        return f"> {bound.gt}"
    if isinstance(bound, Le):
        return f"≤ {bound.le}"
    if isinstance(bound, Lt):
        return f"< {bound.lt}"
    raise TypeError(f"no words for the bound {bound!r}: add them here")
