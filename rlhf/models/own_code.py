"""Code that comes with a model (`auto_map` in its files): not run unless the run file asks for it.

transformers refuses it too; this says which key asks for it, and finds it before anything heavy starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from rlhf.errors import BadInput
from rlhf.models.resolve import BUILT, code_parts, resolve

FILES = ("config.json", "tokenizer_config.json")


def check_own_code(name: str, key: str, *, trust_remote_code: bool) -> None:
    """Raises BadInput, with the key of the model, when its config or tokenizer needs code that it brings along.

    With trust_remote_code that code runs here. Loads no weights."""
    folder = resolve(name)
    if trust_remote_code or not _named_code(folder):
        return
    with own_code_refused(folder, key):
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def check_readable(name: str, key: str, *, trust_remote_code: bool) -> None:
    """Raises BadInput, with the key of the model, unless transformers makes a config of its files, and a tokenizer
    with an EOS token. Loads no weights."""
    if name in BUILT:
        return
    folder = resolve(name)
    with _unreadable_refused(folder, key, "config.json"):
        AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with _unreadable_refused(folder, key, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise BadInput(f"{key}: the tokenizer of {name} has no EOS token, so no completion could ever end")


@contextmanager
def _unreadable_refused(folder: Path, key: str, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers has no error of its own for this: any of a dozen types rises
        lines = str(error).strip().splitlines() or [""]
        raise BadInput(
            f"{key}: transformers cannot read {what} of {folder}: {type(error).__name__}: {' '.join(lines[:2])}"
        ) from error


@contextmanager
def own_code_refused(folder: Path, key: str) -> Iterator[None]:
    """Says in our words what transformers says of code that it does not run."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise BadInput(
            f"{key}: {folder} brings code of its own ({', '.join(_named_code(folder))}), which is not run unless "
            "model.trust_remote_code=true. Next: read that code, then set the key; or choose a model that transformers "
            "knows"
        ) from error


def _named_code(folder: Path) -> list[str]:
    """`file: code` of each auto_map in the model's files."""
    found = []
    for name in FILES:
        if (folder / name).is_file():
            found += [f"{name}: {part}" for part in code_parts(folder / name)]
    return found
