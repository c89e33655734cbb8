"""YAML as people expect it: 1e-6 is a number, a key stands once, a fault names file and line."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from rlhf.errors import BadInput


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads 1e-6 (YAML 1.1 wants 1.0e-6) as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            if key_node.tag == "tag:yaml.org,2002:merge":
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


def parse(text: str, place: str) -> Any:
    """The value that a YAML text holds. Raises BadInput naming place, line and column."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: builds plain data only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise BadInput(f"{place}{where}: not valid YAML: {error.problem or error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise BadInput(f"{place}: not valid YAML: {error}") from error
