"""YAML as people expect it: 1e-6 is a number, a key stands once, a fault names file and line."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from rlhf.errors import BadInput

MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads 1e-6 (YAML 1.1 wants 1.0e-6) as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            if key_node.tag not in ("tag:yaml.org,2002:str", MERGE):
                problem = f"a key must be text, found {key}; one that is meant so is put in quotes"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key_node.tag == MERGE:
                continue
            if key in seen:
                problem = f"key '{key}' stands twice, first in line {seen[key]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen[key] = line
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


# A few lines of aliases to aliases stand for more values than any memory holds; no file of ours comes near this.
MOST_VALUES = 100_000


def parse(text: str, place: str) -> Any:
    """The value that a YAML text holds. Raises BadInput naming place, line and column."""
    try:
        value = yaml.load(text, _Loader)  # a SafeLoader: builds plain data only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise BadInput(f"{place}{where}: not valid YAML: {error.problem or error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise BadInput(f"{place}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise BadInput(f"{place}: nested too deeply; expected keys with values, a few levels deep") from error
    _refuse_endless(value, place)
    return value


def _refuse_half_characters(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{place}: {text[:40]!r} has half a character (a surrogate without its pair)") from error


def _refuse_endless(value: Any, place: str) -> None:
    """Raises BadInput for aliases that contain themselves, or that repeat each other beyond all bounds."""
    left, seen = [value], 0
    while left:
        inside = left.pop()
        seen += 1
        if seen > MOST_VALUES:
            raise BadInput(
                f"{place}: holds more than {MOST_VALUES:,} values; expected fewer, and no alias (*name) that contains "
                "itself or repeats others again and again"
            )
        if isinstance(inside, str):
            _refuse_half_characters(inside, place)
        elif isinstance(inside, dict):
            left += inside.values()
        elif isinstance(inside, list):
            left += inside
