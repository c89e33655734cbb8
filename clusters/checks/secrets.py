"""Rules for every file: no secret in clear, nothing that listens on all addresses."""

import re
from collections.abc import Iterator
from typing import Any

from clusters.checks.documents import Fault, strings

SECRET_NAME = re.compile(r"token(?!iz)|secret|password|passwd|credential|api_?key", re.IGNORECASE)
# What has a secret's name and holds none: names of Kubernetes objects, files.
REFERENCES = re.compile(r"(secretName|secretKeyRef\.\w+|claimName|tokens?_?path)$", re.IGNORECASE)
# AWS, Hugging Face, GitHub and OpenAI keys, private keys, and what looks like a generated token.
SECRET_VALUE = re.compile(
    r"\b(AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20,}|gh[pous]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|[0-9a-f]{32,})\b"
    r"|BEGIN [A-Z ]*PRIVATE KEY"
)


def in_clear(found: Any) -> Iterator[Fault]:
    """Texts of a document that are secrets by their name or by their look."""
    named = dict(_environment(found, ""))
    for field, text in [*strings(found, ""), *named.items()]:
        last = field.rpartition(".")[2]
        is_path = "/" in text or "\n" in text
        by_name = SECRET_NAME.search(last) and not REFERENCES.search(field) and text and not is_path
        if by_name or SECRET_VALUE.search(text):
            yield Fault(
                field, "a secret in clear; expected a reference to one: a Secret, a file, a variable of the caller"
            )


def open_doors(found: Any) -> Iterator[Fault]:
    for field, text in strings(found, ""):
        if "0.0.0.0" in text or re.search(r"host[= ]'?::(?![0-9a-f])", text):
            yield Fault(field, "listens on every address (0.0.0.0); expected 127.0.0.1, or nothing, and a tunnel")


def _environment(found: Any, at: str) -> Iterator[tuple[str, str]]:
    """Kubernetes writes an environment as a list of names and values."""
    if isinstance(found, dict):
        if isinstance(found.get("name"), str) and isinstance(found.get("value"), str):
            yield f"{at}.{found['name']}", found["value"]
        for name, part in found.items():
            yield from _environment(part, f"{at}.{name}" if at else str(name))
    elif isinstance(found, list):
        for index, part in enumerate(found):
            yield from _environment(part, f"{at}[{index}]")
