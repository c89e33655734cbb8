"""Not a test: the process behind the fixture `forked`. Has torch loaded, and forks a child for each run.

A request is a line of JSON on standard input, the answer one on standard output. Before a fork the model is loaded
once, which fills what libraries remember, but nothing is computed: no child inherits a pool whose threads do not live
in it."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.utils.tensorboard  # noqa: F401  what a run imports on its way, loaded once

import rlhf.local  # noqa: F401
from rlhf.cli import launch, run  # noqa: F401
from rlhf.cli.main import main
from rlhf.config import ModelConfig
from rlhf.models.load import load_model

TEN_HOURS_S = 36000.0


def jumping(clock: Callable[[], float]) -> Callable[[], float]:
    """A wall clock that is set ten hours forth and back between any two looks at it."""
    looks = iter(range(sys.maxsize))
    return lambda: clock() + (TEN_HOURS_S if next(looks) % 2 else -TEN_HOURS_S)


def serve(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as printed:
        child = os.fork()
        if child == 0:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            os.chdir(request["folder"])
            if request["clock_jumps"]:
                time.time = jumping(time.time)
            code = main(request["arguments"])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        printed.seek(0)
        code, text = os.waitstatus_to_exitcode(status), printed.read().decode(errors="replace")
        return {"number": request["number"], "code": code, "printed": text}


if __name__ == "__main__":
    load_model(ModelConfig(name="tiny"), "float32")
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
