"""YAML as people expect it: numbers as in YAML 1.2, a key stands once, a fault names file and line; and its writer."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from rlhf.errors import BadInput

MERGE = "tag:yaml.org,2002:merge"
INT, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
# What YAML 1.1 reads otherwise: 1e-6 as text, 010 as 8 and 1:30 as 90.
WHOLE_NUMBER = re.compile(r"[-+]?(0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)\Z")
NUMBER = re.compile(
    r"[-+]?(([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(inf|Inf|INF))\Z"
    r"|\.(nan|NaN|NAN)\Z"
)
LARGEST = (1 << 63) - 1  # of what SQLite and torch hold
LONGEST = 70  # of such a number, in base 2
FIRST_OF_NUMBERS = list("-+.0123456789")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads numbers as YAML 1.2 does."""

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        digits = str(self.construct_scalar(node)).replace("_", "").lower()
        base = 0 if digits.lstrip("-+")[:2] in ("0b", "0o", "0x") else 10
        if len(digits) > LONGEST or abs(int(digits, base)) > LARGEST:
            problem = f"a whole number of {len(digits)} digits is too large; expected at most {LARGEST}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return int(digits, base)

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


# PyYAML's forms of numbers go, those above come; SafeLoader itself keeps its own.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag not in (INT, FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(INT, WHOLE_NUMBER, FIRST_OF_NUMBERS)
_Loader.add_implicit_resolver(FLOAT, NUMBER, FIRST_OF_NUMBERS)
_Loader.add_constructor(INT, _Loader.construct_whole_number)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts into quotes what the loader above, or any other, would take for a number."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Line breaks to YAML, which outside of double quotes are read back as \n.
        style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_implicit_resolver(INT, WHOLE_NUMBER, FIRST_OF_NUMBERS)
_Dumper.add_implicit_resolver(FLOAT, NUMBER, FIRST_OF_NUMBERS)
_Dumper.add_representer(str, _Dumper.represent_text)


# A few lines of aliases to aliases stand for more values than any memory holds; no file of ours comes near this.
MOST_VALUES = 100_000
MOST_LEVELS = 50
TOO_DEEP = f"nested too deeply; expected keys with values, at most {MOST_LEVELS} levels deep"


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
        raise BadInput(f"{place}: {TOO_DEEP}") from error
    _refuse_endless(value, place)
    return _own(value, place, 0)


def write(value: Any) -> str:
    """YAML that `parse` reads back as the same value, in the order of its keys."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _own(value: Any, place: str, level: int) -> Any:
    """The value with nothing shared: what changes below one alias must not change below another."""
    if level > MOST_LEVELS:
        raise BadInput(f"{place}: {TOO_DEEP}")
    if isinstance(value, dict):
        return {whole(key, place): _own(inside, place, level + 1) for key, inside in value.items()}
    if isinstance(value, list):
        return [_own(inside, place, level + 1) for inside in value]
    return whole(value, place) if isinstance(value, str) else value


def whole(text: str, place: str) -> str:
    """The text with both halves of a surrogate pair as one character, as json.dumps writes one."""
    try:
        joined = text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise BadInput(f"{place}: {text[:40]!r} has half a character (a surrogate without its pair)") from error
    return joined


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
        if isinstance(inside, dict):
            left += inside.values()
        elif isinstance(inside, list):
            left += inside
