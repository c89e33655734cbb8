"""Is the package `actors` ours? Looked up before the first import of it, without importing it.

`actors` is a common name: a folder or a distribution of that name that comes first on the path would win without a
word.
"""

import importlib.util
from pathlib import Path

import rlhf
from rlhf.errors import BadInput


def check_actors_is_ours() -> None:
    """Raises BadInput, with both paths, when `import actors` would find another package than the one beside `rlhf`.

    Imports nothing and runs none of the found package's code. Does not look inside the package.
    """
    ours = Path(str(rlhf.__file__)).resolve().parent.parent / "actors" / "__init__.py"
    spec = importlib.util.find_spec("actors")
    if spec is None:
        raise BadInput(f"package `actors` was not found; expected {ours}. Next: install ray-rlhf again (make install)")
    if spec.origin is None:  # a folder without __init__.py
        found = next(Path(location).resolve() for location in spec.submodule_search_locations or ())
    else:
        found = Path(spec.origin).resolve()
    if found != ours:
        raise BadInput(
            f"`import actors` finds {found}, which is not part of ray-rlhf; expected {ours}. "
            "Next: start from another folder, take the first one off PYTHONPATH, or uninstall its distribution"
        )
