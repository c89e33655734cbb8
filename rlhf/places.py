"""Paths as people write them."""

from pathlib import Path

from rlhf.errors import BadInput


def expanded(name: str) -> Path:
    """The path with `~` or `~user` in front replaced by that home. Raises BadInput where there is none."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise BadInput(f"{name[:60]!r}: there is no such home folder; expected one of this machine") from error
