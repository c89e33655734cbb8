"""One request to a server that answers JSON: within a time limit as a whole, without redirects, with an error that says
what came back. The run file names the environment variable that holds a token; only the process that asks reads it, and
it is in no message."""

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import Any
from urllib.parse import urlsplit

from rlhf.errors import BadInput

BIGGEST_ANSWER = 64 << 20  # bytes
SHOWN_CHARACTERS = 200
# Statuses beside 5xx with which a server asks for patience.
BUSY = (408, 425, 429)


class ServerFailed(Exception):
    """No usable answer: the address, and the status, the time limit or what was read. again, whether another try may
    help."""

    def __init__(self, message: str, *, again: bool) -> None:
        super().__init__(message)
        self.again = again


def read_token(variable: str | None, key: str) -> str | None:
    """The token without white space around it (a file's last newline), None where the run file names none.

    Raises BadInput, with the key, when the variable is not set, or cannot be sent: http.client would show it."""
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise BadInput(f"{key}={variable}: there is no such environment variable, or it is empty")
    if not (token.isascii() and token.isprintable()):
        raise BadInput(
            f"{key}={variable}: the variable holds a character that cannot stand in a header (a line break, a control "
            "character or one outside ASCII); expected printable ASCII. Its value is not shown here"
        )
    return token


def check_address(address: str, key: str) -> None:
    """Raises BadInput, with the key, for an address that no request could be made of. Asks nobody."""
    try:
        parts = urlsplit(address)
        port = parts.port
        (parts.hostname or "").encode("idna")
    except ValueError as error:  # UnicodeError, of a name with an empty or a long part, is one
        raise BadInput(f"{key}={address!r} is no address: {error}") from error
    if port == 0:
        raise BadInput(f"{key}={address!r} is no address: port 0; expected 1 to 65535")
    rest = parts.path + parts.query
    if not (rest.isascii() and rest.isprintable()) or " " in rest:
        raise BadInput(f"{key}={address!r}: the path holds characters to be written as %XX, such as a space or é")


def post_json(address: str, body: Mapping[str, Any], token: str | None, timeout_s: float) -> Any:
    """What the server answered to the body, as plain values. Raises ServerFailed.

    The limit holds for the whole call: also for a server that sends a byte now and then.
    """
    try:
        status, said, content = _exchange(address, json.dumps(body).encode(), token, timeout_s)
    except TimeoutError as error:
        raise ServerFailed(f"{address} did not answer within {timeout_s:g} s", again=True) from error
    except (OSError, HTTPException) as error:
        shown = hidden(f"{type(error).__name__}: {error}", token)
        raise ServerFailed(f"{address} cannot be asked: {shown}", again=True) from error
    text = _shown(content, token)
    if status != 200:
        again = status >= 500 or status in BUSY
        raise ServerFailed(f"{address} answered {status} {hidden(said, token)}: {text}", again=again)
    try:
        return json.loads(content)
    except ValueError as error:
        raise ServerFailed(f"{address} answered something that is not JSON: {text}", again=True) from error


def _exchange(address: str, body: bytes, token: str | None, timeout_s: float) -> tuple[int, str, bytes]:
    parts = urlsplit(address)
    connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    began = time.monotonic()
    connection = connect(parts.hostname or "", parts.port, timeout=timeout_s)
    headers = {"Content-Type": "application/json"} | ({} if token is None else {"Authorization": f"Bearer {token}"})
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    late = threading.Event()
    try:
        connection.connect()
        alarm = threading.Timer(max(began + timeout_s - time.monotonic(), 0.0), _hang_up, (connection.sock, late))
        alarm.daemon = True
        alarm.start()
        try:
            connection.request("POST", target, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.reason, _content(answer)
        finally:
            alarm.cancel()
            if late.is_set():  # whatever a connection that was cut said
                raise TimeoutError
    finally:
        connection.close()


def _hang_up(line: socket.socket, late: threading.Event) -> None:
    """Wakes whoever reads from the connection."""
    late.set()
    try:
        line.shutdown(socket.SHUT_RDWR)
    except OSError:  # the server was faster
        return


def _content(answer: HTTPResponse) -> bytes:
    content = answer.read(BIGGEST_ANSWER + 1)
    if len(content) > BIGGEST_ANSWER:
        raise HTTPException(f"an answer of more than {BIGGEST_ANSWER} bytes")
    if answer.length:  # http.client itself is silent about it
        raise IncompleteRead(content, answer.length)
    return content


def _shown(content: bytes, token: str | None) -> str:
    text = hidden(content.decode("utf-8", errors="replace"), token)
    return repr(text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…")


def hidden(text: str, token: str | None) -> str:
    """The text without the token, which a server may have sent back."""
    return text.replace(token, "***") if token else text
