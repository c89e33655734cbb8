"""The process in which a user's reward function runs: `python -P -m rlhf.judges.worker SOCKET LIFELINE FUNCTION`.

Answers calls one at a time over a socket of its own, so that whatever the function prints (to stderr: the parent
points stdout there) cannot be taken for an answer. A message is its length in 8 bytes, then the body: pickled on the
way in, because the data's columns must arrive untouched; JSON on the way out, because the answer is numbers or an
error.

Imports the standard library only, so that it starts fast and a function can be checked without loading anything heavy.
"""

import copy
import fcntl
import importlib
import importlib.util
import inspect
import json
import math
import os
import pickle
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from itertools import islice
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

RewardFunction = Callable[..., Iterable[Any]]

IMPORT_SYSTEM = "<frozen importlib"
OFFERED = "completion_ids"  # beside the data's columns
LENGTH = struct.Struct(">Q")
# Learners compute in float32, whose largest number is 3.4e38; sums of squares of rewards must fit, too.
LARGEST = 1e15


class FunctionNotFound(Exception):
    """What `function` names cannot be had: the message says which part of it, what was found, and what is expected."""


class WrongAnswer(Exception):
    """A reward function returned something that is not one number or None for each completion."""


def load_function(spec: str) -> RewardFunction:
    """The function that `package.module:name` or `path/to/file.py:name` names; importing it runs its module.

    The current folder, and the folder of a file, are searched after everything that is installed. Raises
    FunctionNotFound.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise FunctionNotFound(f"{spec!r} is neither package.module:name nor path/to/file.py:name")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    members = vars(module)
    if name not in members:
        callables = sorted(key for key, value in members.items() if callable(value) and not key.startswith("_"))
        raise FunctionNotFound(f"{place} has no {name!r}; what it has: {', '.join(callables) or 'no function at all'}")
    if not callable(members[name]):
        raise FunctionNotFound(f"{name!r} in {place} is a {type(members[name]).__name__}, expected a function")
    function: RewardFunction = members[name]
    _refuse_other_calls(function, spec)
    return function


def needed_columns(function: RewardFunction) -> list[str]:
    """The columns without which the function cannot be called, by their names in its signature."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[2:]
    except (ValueError, TypeError):  # a callable written in C
        return []
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [p.name for p in by_name if p.default is p.empty and p.name != OFFERED]


def names_by_place(function: RewardFunction) -> list[str]:
    """What the function calls its first two arguments; a column of such a name would be given a second time."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[:2]
    except (ValueError, TypeError):  # a callable written in C
        return []
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _refuse_other_calls(function: RewardFunction, spec: str) -> None:
    """Raises FunctionNotFound unless f(prompts, completions, **columns) can return a list."""
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise FunctionNotFound(f"{spec} is async, and is called as a plain function; expected def without async")
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return
    try:
        signature.bind_partial("prompts", "completions")
    except TypeError as error:
        raise FunctionNotFound(
            f"{spec} takes {signature}, and is called as f(prompts, completions, **columns): {error}"
        ) from error
    if wrong := _wrong_order(list(signature.parameters.values())):
        raise FunctionNotFound(f"{spec} takes {signature}: {wrong}; expected f(prompts, completions, **columns)")


def _wrong_order(parameters: Sequence[inspect.Parameter]) -> str | None:
    """What shows that the function was written for another call, None where nothing does: the call would go well, and
    prompts be scored in place of answers."""
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    first, second = ([p.name for p in by_place] + ["", ""])[:2]
    if first in ("completions", OFFERED) or second in ("prompts", OFFERED):
        return f"its first two arguments are {first} and {second or 'none'}, and are given the prompts and completions"
    further = [p.name for p in by_place[2:] if p.kind is p.POSITIONAL_ONLY]
    return f"{further[0]} can be given by place alone, and columns are given by name" if further else None


def call(
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> list[float | None]:
    """f(prompts, completions, **columns), checked: one finite number or None for each completion, in their order.

    The function gets those of `completion_ids` and the columns that its signature names, or all with **kwargs. True and
    False are 1 and 0. Each sample has prompt and column values of its own: a function that changes them changes neither
    the next sample's nor the caller's. Raises WrongAnswer, and whatever the function raises.
    """
    offered: dict[str, Any] = {name: _copies(values) for name, values in columns.items()}
    offered[OFFERED] = completion_ids
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # a callable written in C
        accepted = offered
    else:
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        named = {parameter.name for parameter in parameters}
        accepted = {name: value for name, value in offered.items() if takes_all or name in named}
    expected = len(completions)  # before the call: the function may change its lists
    return checked(function(_copies(prompts), completions, **accepted), expected)


def _copies(values: Sequence[Any]) -> list[Any]:
    """One by one: within one copy, or one pickle, what was the same object stays the same."""
    return [copy.deepcopy(value) for value in values]


def checked(answer: Any, expected: int) -> list[float | None]:
    """The answer as one finite number or None for each of `expected` samples. Raises WrongAnswer."""
    if isinstance(answer, str | bytes | Mapping | Set) or not isinstance(answer, Iterable):
        raise WrongAnswer(f"it returned a {type(answer).__name__}, expected a list of {expected} numbers or None")
    values = list(islice(answer, expected + 1))  # a generator may have no end
    if len(values) != expected:
        more = f"more than {expected}" if not isinstance(answer, Sized) else len(answer)
        raise WrongAnswer(f"it returned {more if values[expected:] else len(values)} values for {expected} completions")
    scores: list[float | None] = []
    for index, value in enumerate(values):
        if value is None:
            scores.append(None)
            continue
        if not isinstance(value, Real) and not _numpy_bool(value):
            raise WrongAnswer(
                f"its value for sample {index} is {value!r} of type {type(value).__name__}, expected a number or None "
                "(of a tensor, return .tolist())"
            )
        try:
            score = float(value)
        except OverflowError:
            score = math.inf
        if not math.isfinite(score):
            raise WrongAnswer(f"its value for sample {index} is {score}; a sample that cannot be scored is None")
        if abs(score) > LARGEST:
            raise WrongAnswer(
                f"its value for sample {index} is {score:g}, too large to learn from; expected at most {LARGEST:g}"
            )
        scores.append(score)
    return scores


def _numpy_bool(value: Any) -> bool:
    """numpy's truth value, which is no Real; told by its name, since a function may do without numpy."""
    return type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")


def send(channel: socket.socket, body: bytes) -> None:
    """One message, within the channel's time-out."""
    channel.sendall(LENGTH.pack(len(body)) + body)


def receive(channel: socket.socket) -> bytes:
    """One message; raises EOFError when the other side is gone."""
    (length,) = LENGTH.unpack(_exactly(channel, LENGTH.size))
    return _exactly(channel, length)


def error_text(error: BaseException, own_frames: int) -> str:
    """The traceback as Python prints it, without the first frames, which are not the user's."""
    frames = error.__traceback__
    for _ in range(own_frames):
        frames = frames.tb_next if frames is not None and frames.tb_next is not None else frames
    told = traceback.TracebackException(type(error), error, frames)
    told.stack = traceback.StackSummary.from_list([f for f in told.stack if not f.filename.startswith(IMPORT_SYSTEM)])
    return _writable("".join(told.format()))


def _writable(text: str) -> str:
    """Half a character, which neither JSON's readers nor the ledger take, is shown by its number."""
    return text.encode("utf-8", "backslashreplace").decode()


def _exactly(channel: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = channel.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError("the other side of the channel is gone")
        parts += part
    return bytes(parts)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FunctionNotFound(f"there is no file {path} (seen from {Path.cwd()})")
    _search_last(str(path.parent.resolve()))
    name = f"reward_function_{path.stem}"  # never the name of an installed module
    description = importlib.util.spec_from_file_location(name, path)
    if description is None or description.loader is None:
        raise FunctionNotFound(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(description)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    try:
        description.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise FunctionNotFound(f"importing {path} failed:\n{error_text(error, 1)}") from error
    return module


def _import_module(name: str) -> ModuleType:
    _search_last(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise FunctionNotFound(f"there is no module {error.name} (seen from {Path.cwd()})") from error
        raise FunctionNotFound(f"importing module {name} failed:\n{error_text(error, 1)}") from error


def _search_last(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)


def _die_with_parent(lifeline: int) -> None:
    """Has the kernel kill this whole process group when the parent's end of the pipe closes, however the parent ends.

    A thread that waits for that could not: a regular expression that runs away holds the interpreter lock for ever.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # it was gone before the kernel was asked to watch
        sys.exit(1)


def main(arguments: Sequence[str]) -> None:
    """Loads the function, says so (or why not), then answers calls until the parent is gone."""
    descriptor, lifeline, spec = int(arguments[0]), int(arguments[1]), arguments[2]
    for own in (descriptor, lifeline):
        os.set_inheritable(own, False)  # what the function starts must not keep the channel open
    _die_with_parent(lifeline)
    with socket.socket(fileno=descriptor) as channel:
        try:
            function = load_function(spec)
        except FunctionNotFound as error:
            send(channel, json.dumps({"missing": str(error)}).encode())
            return
        except BaseException as error:  # noqa: BLE001  nobody interrupts this process but the module that it imports
            send(channel, json.dumps({"missing": f"importing {spec} failed:\n{error_text(error, 1)}"}).encode())
            return
        told = {"needs": needed_columns(function), "by_place": names_by_place(function)}
        send(channel, json.dumps(told).encode())
        while True:
            try:
                request = receive(channel)
            except EOFError:
                return
            send(channel, json.dumps(_answer(function, request)).encode())


def _answer(function: RewardFunction, request: bytes) -> dict[str, Any]:
    try:
        return {"scores": call(function, *pickle.loads(request))}
    except WrongAnswer as error:
        return {"wrong": _writable(str(error))}
    except BaseException as error:  # noqa: BLE001  whatever the user's code raises goes to the parent, with its traceback
        return {"raised": error_text(error, 2)}


if __name__ == "__main__":
    main(sys.argv[1:])
