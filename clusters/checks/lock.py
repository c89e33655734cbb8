"""What the lock pins, and where the files for machines repeat it."""

import re
from collections.abc import Iterator

from clusters.checks.documents import ROOT, Fault

PYTHON = "py311"


def pinned(package: str) -> str:
    """The version that both locks have. Raises ValueError where they differ."""
    versions = set()
    for name in ("cpu", "gpu"):
        text = (ROOT / "requirements" / f"{name}.txt").read_text()
        versions |= set(re.findall(rf"^{re.escape(package)}==(\S+)$", text, re.MULTILINE))
    if len(versions) != 1:
        raise ValueError(f"the locks have {sorted(versions) or 'no version'} of {package}; expected one")
    return versions.pop()


def image(field: str, name: str) -> Iterator[Fault]:
    """An image's tag must say the lock's Ray and Python: a node of another version cannot join."""
    tag, expected = name.rpartition(":")[2], f"{pinned('ray')}-{PYTHON}-gpu"
    if tag != expected:
        yield Fault(field, f"the image {name} has the tag '{tag}'; expected '{expected}', the lock's Ray and Python")


def ray_version(field: str, found: object) -> Iterator[Fault]:
    if found != pinned("ray"):
        yield Fault(field, f"found {found!r}; expected '{pinned('ray')}', the lock's version of Ray")


def dockerfile(text: str) -> Iterator[Fault]:
    base = re.search(r"^FROM (\S+)$", text, re.MULTILINE)
    yield from image("FROM", base[1] if base else "")
    for package, version in re.findall(r"\b(s3fs|gcsfs)==([^\s]+)", text):
        if version != pinned("fsspec"):
            yield Fault(package, f"found {version}; expected {pinned('fsspec')}, the lock's version of fsspec")
    for name in re.findall(r"requirements/\S+\.txt", text):
        if not (ROOT / name).is_file():
            yield Fault("RUN", f"{name} does not exist")
