"""The `rlhf` command: one file a subcommand, imported only when it is called."""

import argparse
import errno
import importlib
import io
import os
import select
import sys
import traceback
from collections.abc import Sequence
from typing import Protocol

from rlhf import __version__
from rlhf.cli.exit_codes import BAD_INPUT, DONE, FAILED, INTERRUPTED, NO_CAPACITY, READER_GONE
from rlhf.errors import BadInput, NoCapacity, RunFailed

COMMANDS = {
    "run": "start a run, or go on with it when its directory holds one",
    "inspect": "where a run stands: step, versions, ledger, throughput",
    "verify": "check every checksum and ledger invariant of a run",
    "replay": "train a step again from the buffer and compare it with the record",
    "export": "write the policy as a model folder, or the experience as a data set",
    "data": "show what a data set holds, split it by prompt, or make preference pairs",
    "submit": "ship a run to the job server of a cluster and follow it",
    "chat": "talk to a model or to the policy of a run",
    "plan": "placement, batches, memory and time of a run, without starting it",
    "doctor": "check the installation and this machine",
}

# What the system says of a name that nothing can have, whoever looks it up: one that is too long, a link to itself.
NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP)


class Command(Protocol):
    """A subcommand's module."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int:
        """Does it; returns the exit code, or raises one of rlhf.errors."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the subcommand; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without ± or é gets a question mark, not a traceback
    try:
        return _called(list(sys.argv[1:] if argv is None else argv))
    finally:
        if _nobody_reads():  # or Python would say so when it flushes at the very end, and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _called(words: Sequence[str]) -> int:
    try:
        parser, command = _parser(words)
        arguments = _parse(parser, words)
        if command is None:
            parser.print_help()
            return DONE
        return command.run(arguments)
    except BadInput as error:
        return _say(str(error), BAD_INPUT)
    except NoCapacity as error:
        return _say(str(error), NO_CAPACITY)
    except RunFailed as error:
        return _say("\n".join([str(error), *getattr(error, "__notes__", [])]), FAILED)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return READER_GONE
        if error.errno in NO_NAME:
            return _say(f"{str(error.filename)[:100]!r}: {error.strerror}; expected the name of a file", BAD_INPUT)
        traceback.print_exc()
        return FAILED
    except Exception:  # noqa: BLE001  the outermost frame: an unforeseen error is shown whole, with the exit code of a failure
        traceback.print_exc()
        return FAILED


def _nobody_reads() -> bool:
    """Whether whoever read our output is gone, as with `rlhf inspect RUN_DIR | head -1`."""
    if sys.stdout is None or sys.stdout.closed:
        return False
    try:
        sys.stdout.flush()
        place = sys.stdout.fileno()
    except BrokenPipeError:
        return True
    except io.UnsupportedOperation:  # no file, as in a test
        return False
    pipe = select.poll()  # without a buffer nothing is left to flush
    pipe.register(place, 0)
    return any(event & select.POLLERR for _, event in pipe.poll(0))


def _parser(words: Sequence[str]) -> tuple[argparse.ArgumentParser, Command | None]:
    """The parser, with the arguments of the one command that is called, and that command's module."""
    parser = argparse.ArgumentParser(
        prog="rlhf", description="Online and offline alignment of language models on Ray.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"ray-rlhf {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    called = next((word for word in words if not word.startswith("-")), None)
    command: Command | None = None
    for name, meaning in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=meaning, description=meaning, allow_abbrev=False)
        if name == called:
            command = importlib.import_module(f"rlhf.cli.{name}")
            assert command is not None
            command.add_arguments(subparser)
    return parser, command


def _parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parses the words; `key=value` may stand anywhere behind the run file, also behind options, which argparse alone
    does not allow."""
    arguments, rest = parser.parse_known_args(words)
    settings = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(settings) < len(rest) or (rest and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += settings
    _refuse_repeated(arguments.overrides if "overrides" in arguments else [])
    return arguments


def _refuse_repeated(overrides: Sequence[str]) -> None:
    """Raises BadInput for a key that stands twice, as in a file: only one of the values could be meant."""
    seen: dict[str, str] = {}
    for override in overrides:
        key = override.partition("=")[0]
        if key in seen:
            raise BadInput(f"override '{override}': key {key} stands twice, first as '{seen[key]}'; expected it once")
        seen[key] = override


def _say(message: str, code: int) -> int:
    print(f"rlhf: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
