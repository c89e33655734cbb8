"""A cluster that cannot be joined is bad input, within a deadline and with a remedy. Without Ray: the address is asked
before. Not covered here: a wrong token and a head that listens and is silent (tests/test_cluster_nodes.py has the
first)."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

pytest.importorskip("ray")
from ray._private import services
from ray_nodes import workplace

from actors import joining, placement
from rlhf.cli.main import main
from rlhf.errors import BadInput

BAD_INPUT = 2


@pytest.fixture
def bound() -> Iterator[socket.socket]:
    """A port that is ours, and on which nothing listens yet."""
    with socket.socket() as server:
        server.bind(("", 0))  # Ray takes 127.0.0.1 for the machine's own address
        yield server


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts back what joining sets in the environment."""
    for name in (*joining.TRIES, *placement.QUIET):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def address_of(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def test_what_listens_is_reached_and_what_does_not_is_refused(bound: socket.socket) -> None:
    with pytest.raises(BadInput, match=r"nothing answers at .*:\d+ after 0.1 s .*refused.*Next: start Ray there"):
        joining.reach(address_of(bound), 0.1)
    bound.listen()
    joining.reach(address_of(bound), 0.1)


def test_a_head_that_comes_up_meanwhile_is_reached(bound: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """It listens after the first pause."""
    monkeypatch.setattr(joining.time, "sleep", lambda seconds: bound.listen())
    joining.reach(address_of(bound), 600.0)


def test_auto_finds_none_on_a_machine_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray looks at all processes of the machine, which may have one: it is told that there is none."""
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: set())
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: None)
    with pytest.raises(BadInput, match="address=auto: no Ray runs on this machine, and RAY_ADDRESS is not set"):
        joining.reach("auto", 600.0)


@pytest.mark.parametrize(
    ("address", "said"), [("autto", "expected local, auto, or host:port"), ("ray://head:10001", "Ray Client")]
)
def test_what_is_no_address_is_refused(address: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        joining.reach(address, 600.0)


def test_a_head_that_is_not_ready_is_tried_again_and_a_wrong_token_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray raises in both cases was seen on real heads; here it is raised by a stand-in."""
    not_ready = ConnectionError("Failed to connect to Ray cluster")
    not_ready.__cause__ = RuntimeError("GCS cannot find the node")
    refused = ConnectionError("Failed to connect to Ray cluster")
    refused.__cause__ = RuntimeError("trace\nray.exceptions.AuthenticationError: InvalidAuthToken: incorrect. Ensure")
    told: list[Exception | None] = [not_ready, not_ready, None]

    def init(**settings: object) -> None:
        if (error := told.pop(0)) is not None:
            raise error

    monkeypatch.setattr(joining.ray, "init", init)
    monkeypatch.setattr(joining.time, "sleep", lambda seconds: None)
    joining.join("head:6379", 600.0)
    assert not told
    told += [refused, None]
    with pytest.raises(BadInput, match=r"InvalidAuthToken: incorrect\. Expected .* its token in RAY_AUTH_TOKEN"):
        joining.join("head:6379", 600.0)
    told[:] = [not_ready]
    with pytest.raises(BadInput, match="GCS cannot find the node"):
        joining.join("head:6379", -1.0)


def test_the_command_ends_with_2_and_the_remedy(
    bound: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = workplace(tmp_path)
    (folder / "cluster.yaml").write_text(yaml.safe_dump({"address": address_of(bound)}))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(placement, "REACH_S", 0.1)
    words = ["run", "plain.yaml", "--cluster", "cluster.yaml", "--run-dir", "out"]
    assert main(words) == BAD_INPUT
    said = capsys.readouterr().err
    assert said.startswith("rlhf: cluster file: address=127.0.0.1:") and "Next: start Ray there" in said
