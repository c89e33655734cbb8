"""No wait without a deadline in the library and the actors: an AST check, and broken sources that it must catch.

It sees calls by their names. Not covered: `next` on a stream of Ray, waits inside other libraries, sockets whose
time-out is set elsewhere.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
THE_PLACE = "actors/waiting.py"
# Methods that block for ever when they are called without a number of seconds: of queues, threads, processes, locks.
BLOCKING = {"get", "join", "wait", "communicate", "result", "acquire"}
RECEIVING = {"recv", "recv_bytes", "recvmsg", "accept"}
# Where something is received without a time-out of its own, and why that cannot be for ever.
BOUNDED_OTHERWISE = {
    ("rlhf/judges/worker.py", "_exactly"): "the parent sets the channel's time-out; the child dies with its parent",
    ("rlhf/judges/worker_process.py", "kill"): "waits for a process that SIGKILL has ended",
}


def unbounded(source: str, path: str) -> Iterator[str]:
    """`line: call` of each call that may wait for ever."""
    tree = ast.parse(source)
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        if (path, function.name) in BOUNDED_OTHERWISE:
            for node in ast.walk(function):
                node.excused = True  # type: ignore[attr-defined]
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
        if isinstance(call.func, ast.Attribute) and not hasattr(call, "excused") and _waits_for_ever(call, call.func):
            yield f"{path}:{call.lineno}: {ast.unparse(call)}"


def _waits_for_ever(call: ast.Call, called: ast.Attribute) -> bool:
    timeouts = [word.value for word in call.keywords if word.arg is not None and "timeout" in word.arg]
    if any(not (isinstance(value, ast.Constant) and value.value is None) for value in timeouts):
        return False
    if isinstance(called.value, ast.Name) and called.value.id == "ray":
        return called.attr in ("get", "wait")
    blocks = all(
        isinstance(argument, ast.Constant) and (argument.value is True or argument.value is None)
        for argument in call.args
    )
    return called.attr in RECEIVING or (called.attr in BLOCKING and blocks)


def test_every_wait_has_a_deadline() -> None:
    files = [path for package in ("actors", "rlhf") for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 50
    found = [
        line
        for path in files
        if (name := path.relative_to(ROOT).as_posix()) != THE_PLACE
        for line in unbounded(path.read_text(), name)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "wait",
    [
        "ray.get(ref)",
        "ray.get([a, b], timeout=None)",
        "ray.wait(refs, num_returns=1)",
        "queue.get()",
        "queue.get(True)",
        "thread.join()",
        "process.wait()",
        "process.communicate()",
        "future.result(timeout=None)",
        "connection.recv()",
        "channel.recv(1024)",
    ],
)
def test_a_wait_without_a_deadline_is_found(wait: str) -> None:
    """In a copy of the pool with one more line, so that the check is known to read whole files."""
    source = (ROOT / "actors/pool.py").read_text() + f"\n\ndef broken(*_):\n    return {wait}\n"
    assert [line.split(": ", 1)[1] for line in unbounded(source, "actors/pool.py")] == [wait]


@pytest.mark.parametrize(
    "wait",
    ["ray.get(ref, timeout=5)", "row.get('key')", "', '.join(names)", "thread.join(timeout=5)", "event.wait(1.0)"],
)
def test_a_bounded_wait_passes(wait: str) -> None:
    assert not list(unbounded(f"x = {wait}", "any.py"))
