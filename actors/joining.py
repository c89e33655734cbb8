"""Joining a Ray that runs: found and reached within a deadline, or refused with a remedy.

Ray by itself tries an address where nothing listens for a quarter of an hour."""

import logging
import os
import socket
import time

import ray
from ray._common.network_utils import parse_address
from ray._private import services
from ray.exceptions import AuthenticationError

from rlhf.errors import BadInput

REACH_S = 15.0  # a head that is started at the same moment may take some seconds to listen
JOIN_S = 60.0  # a head that listens may not know its own node yet; so long no error but a wrong token is final
POLL_S = 0.5  # between two tries: nothing tells that a port on another machine has begun to listen
# How often Ray tries a head that listens and does not answer, each time for some forty seconds: twenty times by itself.
TRIES = {"RAY_gcs_server_port_wait_time_s": "2"}
REMEDY = "Next: start Ray there (`ray start --head` prints the address), or set address in the cluster file"


def reach(address: str, timeout_s: float) -> None:
    """Raises BadInput unless something listens at an address of a cluster file, `auto` or host:port, within timeout_s.

    Whether it is a Ray, and lets this run join, is seen when it is joined."""
    for name, value in TRIES.items():
        os.environ.setdefault(name, value)
    if address.startswith("ray://"):
        raise BadInput(
            f"cluster file: address={address}: that is Ray Client, which has no places of its own. Expected host:port "
            "of the head (6379 unless it was started otherwise), from a machine of the cluster; `rlhf submit` ships a "
            "run from elsewhere"
        )
    host, port = _found(address)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=timeout_s).close()
        except OSError as error:
            if time.monotonic() + POLL_S > deadline:
                raise BadInput(
                    f"cluster file: address={address}: nothing answers at {host}:{port} after {timeout_s:g} s "
                    f"({error}). Expected the head of a Ray that runs. {REMEDY}"
                ) from error
            time.sleep(POLL_S)
        else:
            return


def join(address: str, timeout_s: float) -> None:
    """`ray.init` for a Ray that runs. Raises BadInput: at once where the token is wrong, otherwise when what Ray says
    is still so after timeout_s; one try of a head that listens and is silent may last longer."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, AuthenticationError) as error:
            why = (str(error.__cause__ or "").strip() or str(error).strip()).splitlines()[-1].split(". ")[0]
            refused = isinstance(error, AuthenticationError) or AuthenticationError.__name__ in why
            if refused or time.monotonic() > deadline:
                raise BadInput(
                    f"cluster file: address={address}: no Ray cluster lets this run join: {why}. Expected the address "
                    "of one that runs, and its token in RAY_AUTH_TOKEN with RAY_AUTH_MODE=token; `ray get-auth-token` "
                    "on the head prints it. RAY_AUTH_MODE=disabled for one that asks for none"
                ) from error
            ray.shutdown()
            time.sleep(POLL_S)
        else:
            return


def _found(address: str) -> tuple[str, int]:
    """host and port. Raises BadInput for `auto` where no Ray runs, and for what is no address."""
    try:
        where = services.canonicalize_bootstrap_address(address)
        host, port = parse_address(where or "") or ("", "")
        return host, int(port)
    except ConnectionError as error:
        raise BadInput(
            f"cluster file: address={address}: no Ray runs on this machine, and RAY_ADDRESS is not set. {REMEDY}; "
            "`local` starts one for the run"
        ) from error
    except ValueError as error:
        raise BadInput(f"cluster file: address={address}: expected local, auto, or host:port of a head") from error
