"""No wait without a deadline in the library and the actors: an AST check, and broken sources that it must catch.

It sees calls by their names. Not covered: waits inside other libraries, sockets whose time-out is set elsewhere, loops
that wait by sleeping.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
THE_PLACE = "actors/waiting.py"
# Methods that block for ever when they are called without a number of seconds: of queues, threads, processes, locks.
BLOCKING = {"get", "join", "wait", "communicate", "result", "acquire", "barrier", "monitored_barrier"}
# Methods and functions that take no seconds, or wait for a peer whatever they are given.
RECEIVING = {
    "recv",
    "recv_bytes",
    "recvmsg",
    "accept",
    "readline",
    "waitpid",
    "waitid",
    "pause",
    "flock",
    "lockf",
    "sigwait",
}
# Calls that wait for ever unless a keyword says how long.
NEED_TIMEOUT = {
    *("run", "call", "check_call", "check_output", "urlopen", "create_connection", "HTTPConnection", "HTTPSConnection"),
    *("as_completed", "init_process_group", "request", "post", "get", "stream"),
}
OWNERS = {"subprocess", "request", "socket", "client", "futures", "dist", "requests", "httpx", "urllib"}
# Where something is waited for without a time-out of its own, and why that cannot be for ever.
BOUNDED_OTHERWISE = {
    ("rlhf/judges/worker.py", "_exactly"): "the parent sets the channel's time-out; the child dies with its parent",
    ("rlhf/judges/worker_process.py", "kill"): "waits for a process that SIGKILL has ended",
    ("rlhf/judges/worker_process.py", "_ended"): "waits for a process that SIGKILL has ended",
    ("rlhf/chaos/journal.py", "claim"): "whoever holds the lock writes one line; the kernel frees it with its process",
    ("rlhf/learner/build_locks.py", "free_abandoned_locks"): "held for one look at /proc; freed with its process; "
    "inside a call to an actor, whose wait has a deadline",
    ("rlhf/cli/chat.py", "_next_line"): "a person is asked",
    ("actors/keeper.py", "be_head"): "it is there to wait: it dies with the keeper, which dies with the run",
    ("actors/worker.py", "pairs"): "ray.wait has said that the next item is there",
}


def unbounded(source: str, path: str) -> Iterator[str]:
    """`line: call` of each call that may wait for ever."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for function in functions:
        if (path, function.name) in BOUNDED_OTHERWISE:
            for node in ast.walk(function):
                node.excused = True  # type: ignore[attr-defined]
    bare = bare_names(tree)
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
        if not hasattr(call, "excused") and _waits_for_ever(call, bare):
            yield f"{path}:{call.lineno}: {ast.unparse(call)}"


def bare_names(tree: ast.AST) -> dict[str, str]:
    """Functions that are called by their bare name, and the module that they were imported from."""
    return {
        alias.asname or alias.name: node.module or ""
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def _waits_for_ever(call: ast.Call, bare: dict[str, str]) -> bool:
    timeouts = [word.value for word in call.keywords if word.arg is not None and "timeout" in word.arg]
    bounded = any(not (isinstance(value, ast.Constant) and value.value is None) for value in timeouts)
    if isinstance(call.func, ast.Name):
        owner, name = bare.get(call.func.id, "").rpartition(".")[2], call.func.id
        if name == "next" and len(call.args) == 2 and ast.unparse(call.args[0]).endswith("stream"):
            return True  # of Ray: waits for the next item
        return not bounded and (
            (owner == "ray" and name in ("get", "wait")) or (owner in OWNERS and name in NEED_TIMEOUT)
        )
    if bounded or not isinstance(call.func, ast.Attribute):
        return False
    owner, name = ast.unparse(call.func.value).rpartition(".")[2], call.func.attr
    if owner == "ray":
        return name in ("get", "wait")
    if owner == "select" and name == "select":
        return len(call.args) < 4
    if owner in OWNERS and (name in NEED_TIMEOUT or (owner == "futures" and name == "wait")):
        return True
    if name in RECEIVING:
        return not any(
            "WNOHANG" in ast.unparse(argument) or "LOCK_NB" in ast.unparse(argument) for argument in call.args
        )
    blocks = all(
        isinstance(argument, ast.Constant) and (argument.value is True or argument.value is None)
        for argument in call.args
    )
    return name in BLOCKING and blocks


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


def test_every_excuse_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that excuses nothing any more would excuse the next wait of that function."""
    excuses = dict(BOUNDED_OTHERWISE)
    for path, function in excuses:
        monkeypatch.delitem(BOUNDED_OTHERWISE, (path, function))
        assert list(unbounded((ROOT / path).read_text(), path)), f"{path}: {function}"
        monkeypatch.setitem(BOUNDED_OTHERWISE, (path, function), excuses[path, function])


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
        "subprocess.run(command, check=True)",
        "subprocess.check_output(command)",
        "os.waitpid(pid, 0)",
        "fcntl.flock(file, fcntl.LOCK_EX)",
        "select.select([a], [], [])",
        "urllib.request.urlopen(address)",
        "requests.get(address)",
        "socket.create_connection(address)",
        "http.client.HTTPConnection(host)",
        "futures.as_completed(asked)",
        "futures.wait(asked)",
        "dist.barrier()",
        "dist.init_process_group('gloo')",
        "process.stdout.readline()",
        "next(self.stream, None)",
    ],
)
def test_a_wait_without_a_deadline_is_found(wait: str) -> None:
    """In a copy of the pool with one more line, so that the check is known to read whole files."""
    source = (ROOT / "actors/pool.py").read_text() + f"\n\ndef broken(*_):\n    return {wait}\n"
    assert [line.split(": ", 1)[1] for line in unbounded(source, "actors/pool.py")] == [wait]


@pytest.mark.parametrize("wait", ["run(command)", "urlopen(address)"])
def test_a_wait_by_its_bare_name_is_found(wait: str) -> None:
    source = f"from subprocess import run\nfrom urllib.request import urlopen\nasync def x():\n    {wait}\n"
    assert len(list(unbounded(source, "any.py"))) == 1
    assert not list(unbounded(f"def run(*_): ...\ndef urlopen(*_): ...\n{wait}\n", "any.py"))


@pytest.mark.parametrize(
    "wait",
    [
        *("ray.get(ref, timeout=5)", "row.get('key')", "', '.join(names)", "thread.join(timeout=5)", "event.wait(1.0)"),
        *(
            "os.waitpid(-1, os.WNOHANG)",
            "fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)",
            "select.select([a], [], [], 1)",
        ),
        *("subprocess.run(command, timeout=5)", "asyncio.run(main())", "HTTPConnection(host, timeout=1)"),
    ],
)
def test_a_bounded_wait_passes(wait: str) -> None:
    assert not list(unbounded(f"x = {wait}", "any.py"))
