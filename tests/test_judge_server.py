"""A reward server behind a real socket: it answers late, drips, breaks off, says 500 or something else than rewards.

Not covered: TLS, a proxy, a server on another machine.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.buffer.audit import ExperienceView
from rlhf.cli.main import main
from rlhf.config import RewardConfig, RewardSource, RunConfig
from rlhf.errors import BadInput, JudgeFailed, NothingScored
from rlhf.experience import Group
from rlhf.judges.build import build_reward_judge
from rlhf.judges.patience import RETRIES, PatientJudge
from rlhf.judges.post import read_token
from rlhf.judges.reward_server import RewardServerJudge
from rlhf.observers import read_jsonl

TOKEN = "canary-7f3a"


class Server(ThreadingHTTPServer):
    """Rewards the length of an answer; the first answers are those of `script`, by name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[str] = []
        self.seen: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.silent_at: str | None = None
        self.over = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:  # noqa: C901  one case a way to fail
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        self.server.authorizations.append(self.headers["Authorization"])
        how = self.server.script.pop(0) if self.server.script else "well"
        if self.server.silent_at in body["prompts"]:
            how = "silent"
        lengths = [float(len(text)) for text in body["completions"]]
        match how:
            case "well":
                self._say(200, json.dumps({"rewards": lengths}).encode())
            case "500":
                self._say(500, f"out of memory; you sent {self.headers['Authorization']}".encode())
            case "404":
                self._say(404, b"no such page")
            case "elsewhere":
                self.send_response(302)
                self.send_header("Location", "http://127.0.0.1:9/")
                self.end_headers()
            case "garbage":
                self._say(200, b"<html>\xff</html>")
            case "short":
                self._say(200, json.dumps({"rewards": lengths[1:]}).encode())
            case "nan":
                self._say(200, b'{"rewards": [NaN, NaN]}')
            case "words":
                self._say(200, b'{"rewards": ["good", "bad"]}')
            case "null":
                self._say(200, b'{"rewards": [null, null]}')
            case "other":
                self._say(200, b'{"scores": [1, 2]}')
            case "silent":
                self.server.over.wait(20)
            case "drips":
                self.send_response(200)
                self.send_header("Content-Length", "100")
                self.end_headers()
                while not self.server.over.wait(0.05):
                    try:
                        self.wfile.write(b" ")
                    except OSError:
                        return
            case "breaks off":
                self.send_response(200)
                self.send_header("Content-Length", "100")
                self.end_headers()
                self.wfile.write(b'{"rewards"')

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing on the test's stderr."""


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.over.set()
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def group(make_group: Callable[..., Group]) -> Group:
    return make_group(7, [None, None], [2, 1], {}, {"answer": {"x": [1, None]}})


@pytest.fixture
def judge(server: Server, monkeypatch: pytest.MonkeyPatch) -> RewardServerJudge:
    """Half a second for a call, with a token."""
    monkeypatch.setenv("SCORE_TOKEN", TOKEN)
    source = RewardSource(server=server.address, token_env="SCORE_TOKEN", timeout_s=0.5)
    made = RewardServerJudge(source, "reward")
    made.setup()
    return made


def test_it_is_asked_for_a_group_and_its_numbers_are_the_rewards(
    judge: RewardServerJudge, server: Server, group: Group
) -> None:
    assert judge.judge(group).scores == {"reward": [8.0, 8.0]}
    (body,) = server.seen
    assert body == {
        "prompts": ["say a"] * 2,
        "completions": ["answer 0", "answer 1"],
        "columns": {"answer": [{"x": [1, None]}] * 2},
    }
    assert server.authorizations == [f"Bearer {TOKEN}"]


@pytest.mark.parametrize(
    ("how", "said", "again"),
    [
        ("500", "answered 500 Internal Server Error: 'out of memory", True),
        ("404", "answered 404 Not Found: 'no such page'", False),
        ("elsewhere", "answered 302", False),
        ("garbage", "answered something that is not JSON: '<html>", True),
        ("short", "returned 1 values for 2 completions", True),
        ("nan", "value for sample 0 is nan", True),
        ("words", "value for sample 0 is 'good' of type str", True),
        ("other", "answered with the keys ['scores']; expected rewards", True),
        ("silent", "did not answer within 0.5 s", True),
        ("drips", "did not answer within 0.5 s", True),
        ("breaks off", "cannot be asked: IncompleteRead", True),
    ],
)
def test_any_other_answer_is_a_failure_with_address_and_status(
    judge: RewardServerJudge, server: Server, group: Group, how: str, said: str, again: bool
) -> None:
    """Never a number; the token is in no message, also where the server repeats it."""
    server.script = [how]
    with pytest.raises(JudgeFailed) as failure:
        judge.judge(group)
    assert said in str(failure.value) and said in failure.value.reason
    assert server.address in str(failure.value) and "prompt 7" in str(failure.value)
    assert failure.value.again is again and TOKEN not in str(failure.value) + failure.value.reason


def test_nothing_scored_nobody_there_and_columns_that_are_no_json(
    judge: RewardServerJudge, server: Server, group: Group, make_group: Callable[..., Group]
) -> None:
    server.script = ["null"]
    with pytest.raises(NothingScored, match="answered null for each"):
        judge.judge(group)
    with pytest.raises(JudgeFailed, match="a column of the data cannot be sent as JSON"):
        judge.judge(make_group(7, [None], [2], {}, {"answer": {1, 2}}))
    nobody = RewardServerJudge(RewardSource(server="http://127.0.0.1:9/"), "reward")
    nobody.setup()
    with pytest.raises(JudgeFailed, match=r"http://127.0.0.1:9/ cannot be asked: ConnectionRefusedError"):
        nobody.judge(group)


def test_500_twice_then_an_answer_is_one_score_and_two_repetitions(server: Server, group: Group) -> None:
    """Trap 82."""
    config = RewardConfig.model_validate({"server": server.address, "backoff_s": 0.0})
    run = RunConfig.model_construct(reward=config)
    judge = build_reward_judge(run, {}, Path("unused"))
    assert isinstance(judge, PatientJudge)
    judge.setup()
    server.script = ["500", "garbage"]
    assert judge.judge(group).scores == {"reward": [8.0, 8.0], RETRIES: [2.0, 0.0]}
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"server": "localhost:80"}, "no address of a server"),
        ({"server": "http://user:pass@host/"}, "would be written into the run directory"),
        ({"server": "http://host/", "isolate": False}, "isolate would do nothing"),
        ({"function": "a:b", "token_env": "X"}, "token_env would do nothing"),
        ({"server": "http://host/", "token_env": "a secret!"}, "String should match"),
        ({"function": "a:b", "backoff_s": 2.0}, "backoff_s would do nothing"),
        ({"server": "http://host/", "model": "m"}, "both are set: model, server"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RewardConfig.model_validate(settings)


def test_a_token_that_is_not_there_is_bad_input(server: Server) -> None:
    judge = RewardServerJudge(RewardSource(server=server.address, token_env="NO_SUCH_TOKEN"), "reward")
    with pytest.raises(BadInput, match=r"reward.token_env=NO_SUCH_TOKEN: there is no such environment variable"):
        judge.setup()


def test_a_run_goes_on_through_a_server_that_fails_and_never_writes_its_token(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """500 and garbage are asked again; a prompt at which the server never answers is dropped with the reason."""
    monkeypatch.setenv("SCORE_TOKEN", TOKEN)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(20)))
    content = {
        "model": {"name": "tiny"},
        "algorithm": {"name": "rloo", "samples_per_prompt": 2, "kl": {"coef": 0.0}},
        "data": {"path": str(tmp_path / "prompts.jsonl"), "shuffle": False},
        "loop": {"num_steps": 2, "groups_per_step": 4},
        "generation": {"engine": "transformers", "max_new_tokens": 4},
        "learner": {"engine": "torch"},
        "reward": {"server": server.address, "token_env": "SCORE_TOKEN", "timeout_s": 0.5, "backoff_s": 0.05},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    server.script, server.silent_at = ["500", "well", "garbage", "500"], "say 4"
    began = time.monotonic()
    assert main(["run", str(tmp_path / "run.yaml"), "--in-process", "--run-dir", str(tmp_path / "run")]) == 0
    print(f"{time.monotonic() - began:.1f} s")
    overview = ExperienceView(tmp_path / "run" / "experience.db").overview()
    ((reason, count),) = overview.drop_reasons.items()
    assert count == 1 and reason == f"reward server: {server.address} did not answer within 0.5 s"
    assert (overview.counts.trained, overview.counts.dropped, overview.counts.lost) == (8, 1, 0)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert sum(row.get("faults/judge_retries", 0) for row in rows) == 3
    shown = capsys.readouterr()
    assert TOKEN not in shown.out + shown.err
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 8 and not any(TOKEN.encode() in path.read_bytes() for path in written)


@pytest.mark.parametrize("value", [f"{TOKEN}\nX: y", f"{TOKEN}\x07", f"{TOKEN}é", f"{TOKEN}☃", " \n"])
def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """A newline at the end, as `$(cat FILE; echo)` leaves it, is no part of the token."""
    monkeypatch.setenv("T", f" {TOKEN}\r\n")
    assert read_token("T", "reward.token_env") == TOKEN
    monkeypatch.setenv("T", value)
    with pytest.raises(BadInput, match=r"reward\.token_env=T") as refused:
        read_token("T", "reward.token_env")
    assert TOKEN not in str(refused.value)
