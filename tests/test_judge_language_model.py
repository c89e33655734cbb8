"""A language model as a judge, over a real socket: the server speaks the chat-completions protocol and may fail.

Not covered: a real model, TLS. What a judge model is worth is not a matter of this code.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.cli.main import main
from rlhf.config import RewardSource, RunConfig
from rlhf.errors import BadInput, JudgeFailed, NothingScored
from rlhf.experience import REWARD, Group
from rlhf.judges.answers import ANSWERS_FILE, AnswerStore
from rlhf.judges.comparisons import both_orders
from rlhf.judges.language_model import INCONSISTENT, UNPARSED, LanguageModelJudge, chat_address, question
from rlhf.observers import read_jsonl

TOKEN = "canary-93bd"
TEMPLATE = "Q:{prompt}|A:{first}|B:{second}|"


def longer(text: str) -> str:
    """The verdict of a fair judge that likes long answers, on the template above."""
    first, second = text.split("|A:")[1].split("|B:")
    difference = len(first) - len(second.split("|")[0])
    return "I think [[C]], no: " + ("[[A]]" if difference > 0 else "[[B]]" if difference < 0 else "[[C]]")


class Server(ThreadingHTTPServer):
    """Says what `says` makes of the question; the first answers are those of `script`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.says: Callable[[str], str] = longer
        self.script: list[tuple[int, bytes]] = []
        self.seen: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append({"path": self.path, **body})
            self.server.authorizations.append(self.headers["Authorization"])
            scripted = self.server.script.pop(0) if self.server.script else None
        if scripted is None:
            message = {"role": "assistant", "content": self.server.says(body["messages"][-1]["content"])}
            scripted = (200, json.dumps({"choices": [{"message": message}]}).encode())
        self.send_response(scripted[0])
        self.send_header("Content-Length", str(len(scripted[1])))
        self.end_headers()
        self.wfile.write(scripted[1])

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing on the test's stderr."""


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def judge_of(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    made: list[LanguageModelJudge] = []

    def build(**settings: Any) -> LanguageModelJudge:
        llm = {"address": server.address, "model": "some-judge", "style": "pairwise", "template": TEMPLATE, **settings}
        source = RewardSource.model_validate({"llm": llm, "token_env": "JUDGE_TOKEN", "timeout_s": 5.0})
        made.append(LanguageModelJudge(source, "reward", tmp_path / "run"))
        made[-1].setup()
        return made[-1]

    yield build
    for judge in made:
        judge.close()


@pytest.fixture
def group_of(make_group: Callable[..., Group]) -> Callable[..., Group]:
    def build(*texts: str, **columns: Any) -> Group:
        group = make_group(4, [None] * len(texts), [1] * len(texts), {}, columns)
        return replace(group, samples=tuple(replace(s, text=t) for s, t in zip(group.samples, texts, strict=True)))

    return build


def test_a_fair_judge_ranks_the_answers_of_a_group(
    judge_of: Callable[..., Any], server: Server, group_of: Callable[..., Group]
) -> None:
    """Lengths 1, 3, 2, 2: mean worth by hand. Each two are asked in both orders, at temperature 0, with the token."""
    columns = judge_of(system="Be fair.").judge(group_of("x", "xxx", "xx", "yy"))
    assert columns.scores == {REWARD: [0.0, 1.0, 0.5, 0.5], INCONSISTENT: [0.0] * 4}
    assert len(server.seen) == 12 and set(server.authorizations) == {f"Bearer {TOKEN}"}
    asked = server.seen[0]
    assert (asked["path"], asked["model"], asked["temperature"], asked["seed"]) == (
        "/v1/chat/completions",
        "some-judge",
        0,
        0,
    )
    assert [message["role"] for message in asked["messages"]] == ["system", "user"]
    assert {body["messages"][1]["content"] for body in server.seen} >= {"Q:say a|A:x|B:xxx|", "Q:say a|A:xxx|B:x|"}


def test_a_judge_that_prefers_a_place_says_nothing(
    judge_of: Callable[..., Any], server: Server, group_of: Callable[..., Group]
) -> None:
    """Trap 99: always A is a tie everywhere, and all comparisons are counted as inconsistent."""
    server.says = lambda _: "[[A]]"
    columns = judge_of().judge(group_of("x", "xxx", "xx"))
    assert columns.scores == {REWARD: [0.5] * 3, INCONSISTENT: [1.0] * 3}


def test_equal_answers_are_a_tie_that_nobody_is_asked_about(
    judge_of: Callable[..., Any], server: Server, group_of: Callable[..., Group]
) -> None:
    columns = judge_of().judge(group_of("xx", "xx", "x"))
    assert columns.scores[REWARD] == [0.75, 0.75, 0.0] and len(server.seen) == 2  # the two questions are one
    assert judge_of().judge(group_of("x", "x")).scores == {REWARD: [0.5, 0.5], INCONSISTENT: [None, None]}


def test_a_text_without_a_verdict_is_no_verdict(
    judge_of: Callable[..., Any], server: Server, group_of: Callable[..., Group]
) -> None:
    """The comparison is left out in whichever order it failed; an answer without any comparison has no reward."""
    server.says = lambda text: "I cannot say." if "A:bad" in text else longer(text)
    columns = judge_of().judge(group_of("bad", "xxxx", "x"))
    assert columns.scores == {REWARD: [None, 1.0, 0.0], INCONSISTENT: [None, 0.0, 0.0], UNPARSED: [2.0, 0.0, 0.0]}
    server.says = lambda text: "no"
    with pytest.raises(NothingScored, match="no text of the judge held a judgement"):
        judge_of().judge(group_of("one", "two"))


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [
        (1.0, 0.0, (1.0, False)),
        (0.0, 1.0, (0.0, False)),
        (0.5, 0.5, (0.5, False)),
        (1.0, 1.0, (0.5, True)),
        (0.0, 0.0, (0.5, True)),
        (1.0, 0.5, (0.5, True)),
        (None, 0.0, None),
        (1.0, None, None),
    ],
)
def test_both_orders_put_together(
    forward: float | None, backward: float | None, expected: tuple[float, bool] | None
) -> None:
    """`backward` is what the other answer got when it stood first."""
    assert both_orders(forward, backward) == expected


def test_against_a_column_one_answer_is_enough(
    judge_of: Callable[..., Any], server: Server, group_of: Callable[..., Group]
) -> None:
    judge = judge_of(against_column="best")
    columns = judge.judge(group_of("xxx", "x", "yy", best="yy"))
    assert columns.scores == {REWARD: [1.0, 0.0, 0.5], INCONSISTENT: [0.0] * 3} and len(server.seen) == 4
    assert judge.judge(group_of("xxx", best="yy")).scores[REWARD] == [1.0]
    with pytest.raises(JudgeFailed, match=r"column 'best' .* is None; expected an answer"):
        judge.judge(group_of("xxx"))


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        ("[[7]]", None, 7.0),
        ("first [[3]], but then [[ 8.5 ]]", None, 8.5),
        ("7", None, None),
        ("[[11]]", None, None),
        ("[[-1]]", None, None),
        ("Rating: 4/5", r"(\d+)/5", 4.0),
        ("Rating: good", r"Rating: (\w+)", None),
        ("", None, None),
    ],
)
def test_ratings(
    judge_of: Callable[..., Any],
    server: Server,
    group_of: Callable[..., Group],
    text: str,
    pattern: str | None,
    expected: float | None,
) -> None:
    """The last number in the range, else none: never 0. A second answer that always parses keeps the group."""
    server.says = lambda asked: "[[5]] 5/5 Rating: 5" if "other" in asked else text
    judge = judge_of(style="pointwise", template="{prompt}{completion}", pattern=pattern)
    if pattern == r"Rating: (\w+)":
        server.says = lambda asked: "Rating: 5" if "other" in asked else text
    columns = judge.judge(group_of("one", "other"))
    assert columns.scores[REWARD] == [expected, 5.0]
    assert (UNPARSED in columns.scores) == (expected is None)


def test_nothing_is_asked_twice(
    judge_of: Callable[..., Any], server: Server, group_of: Callable[..., Group], tmp_path: Path
) -> None:
    """By content: another judge object asks nothing, another model asks anew; a failure keeps what was answered."""
    first = judge_of().judge(group_of("x", "xxx"))
    assert len(server.seen) == 2 and (tmp_path / "run" / ANSWERS_FILE).is_file()
    server.says = lambda _: "[[B]]"
    assert judge_of().judge(group_of("xxx", "x")).scores[REWARD] == first.scores[REWARD][::-1]
    assert len(server.seen) == 2
    judge_of(model="another-judge").judge(group_of("x", "xxx"))
    assert len(server.seen) == 4
    server.says, server.script = longer, [(200, b'{"choices": [{"message": {"content": "[[B]]"}}]}'), (500, b"busy")]
    judge = judge_of(parallel=1)
    with pytest.raises(JudgeFailed, match="answered 500"):
        judge.judge(group_of("y", "yyy"))
    assert judge.judge(group_of("y", "yyy")).scores[REWARD] == [0.0, 1.0] and len(server.seen) == 7
    assert TOKEN.encode() not in (tmp_path / "run" / ANSWERS_FILE).read_bytes()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, f"who is {TOKEN}?".encode()), "answered 500 Internal Server Error: 'who is ***?'"),
        ((200, b"<html>"), "is not JSON: '<html>'"),
        ((200, f'{{"error": "{TOKEN}"}}'.encode()), "without choices[0].message.content: {'error': '***'}"),
        ((200, b'{"choices": []}'), "without choices[0].message.content"),
        ((200, b'{"choices": [{"message": {"content": null}}]}'), "content of type NoneType"),
    ],
)
def test_garbage_is_a_failure_and_is_not_kept(
    judge_of: Callable[..., Any],
    server: Server,
    group_of: Callable[..., Group],
    answer: tuple[int, bytes],
    said: str,
) -> None:
    server.script = [answer]
    judge = judge_of(parallel=1)
    with pytest.raises(JudgeFailed) as failure:
        judge.judge(group_of("x", "xxx"))
    assert said in failure.value.reason and TOKEN not in str(failure.value) and failure.value.again
    assert judge.judge(group_of("x", "xxx")).scores[REWARD] == [0.0, 1.0]


def test_braces_in_an_answer_mean_nothing(judge_of: Callable[..., Any], group_of: Callable[..., Group]) -> None:
    settings = judge_of()._settings
    body = question(settings, {"prompt": "{first}", "first": "{second} {x}", "second": "two"})
    assert body["messages"][0]["content"] == "Q:{first}|A:{second} {x}|B:two|"


LLM = {"address": "http://127.0.0.1:1/v1", "model": "m"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({**LLM, "template": "{prompt}"}, "template: {completion} missing"),
        ({**LLM, "style": "pairwise", "template": "{prompt} {first}"}, "template: {second} missing"),
        ({**LLM, "pattern": "("}, "not a regular expression"),
        ({**LLM, "pattern": "x"}, "0 groups; expected one"),
        ({**LLM, "against_column": "best"}, "against_column would do nothing"),
        ({**LLM, "style": "pairwise", "score_range": (0.0, 1.0)}, "score_range would do nothing"),
        ({**LLM, "score_range": (5.0, 5.0)}, "5 is not below 5"),
        ({**LLM, "address": "here"}, "no address of a server"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as refused:
        RewardSource.model_validate({"llm": settings})
    assert said in str(refused.value)


def test_comparisons_need_company(tiny_run: Callable[..., RunConfig]) -> None:
    """A pairwise judge without a column to compare with has nothing to say of a held-out answer, nor of a reference."""
    content = tiny_run({}, {}, {}, {}).model_dump()
    pairwise = {"llm": {**LLM, "style": "pairwise"}}
    assert RunConfig.model_validate({**content, "reward": pairwise}).reward is not None
    for changes, said in [
        ({"data": {"path": "x", "heldout": 2}}, "a held-out prompt has one answer"),
        ({"algorithm": {"name": "reinforce", "samples_per_prompt": 1}}, "samples_per_prompt is 1; use 2"),
        ({"reward": {**pairwise, "normalise": "mean", "reference": {"path": "x"}}}, "a reference answer is alone"),
    ]:
        with pytest.raises(ValueError, match=said):
            RunConfig.model_validate({**content, "reward": pairwise, **changes})


def test_a_run_is_judged_and_gone_on_with_without_a_question_twice(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RLOO under a pairwise judge, ended after a step by a server that is gone for good, then gone on with."""
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(20)))
    content = {
        "model": {"name": "tiny"},
        "algorithm": {"name": "rloo", "samples_per_prompt": 3, "kl": {"coef": 0.0}},
        "data": {"path": str(tmp_path / "prompts.jsonl")},
        "loop": {"num_steps": 2, "groups_per_step": 2},
        "generation": {"engine": "transformers", "max_new_tokens": 4},
        "learner": {"engine": "torch"},
        "reward": {
            "llm": {"address": server.address, "model": "m", "style": "pairwise", "template": TEMPLATE},
            "token_env": "JUDGE_TOKEN", "retries": 0, "max_failed_in_a_row": 1,
        },
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    command = ["run", str(tmp_path / "run.yaml"), "--in-process", "--run-dir", str(tmp_path / "run")]
    fails = threading.Event()

    def breaks_down(text: str) -> str:
        with server.lock:
            if len(server.seen) > 15 and not fails.is_set():
                fails.set()
                server.script = [(503, b"down")] * 9
        return longer(text)

    server.says = breaks_down
    assert main(command) == 4 and fails.is_set()
    server.script = []
    assert main(command) == 0
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["reward/mean"] for row in rows] == [pytest.approx(0.5)] * 2 and "reward/inconsistent/mean" in rows[0]
    kept = [json.dumps(body, sort_keys=True) for body in server.seen]
    twice = [body for body in set(kept) if kept.count(body) > 1]
    assert len(twice) <= 4  # those that the server did not answer the first time; four were under way
    assert not any(TOKEN.encode() in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())


def test_the_query_of_an_address_stays_at_its_end() -> None:
    assert chat_address("http://host/v1/") == "http://host/v1/chat/completions"
    assert chat_address("http://host/v1?api-version=1/2") == "http://host/v1/chat/completions?api-version=1/2"


@pytest.mark.parametrize("damage", ["text", "cut", "folder"])
def test_answers_that_cannot_be_read_are_named(tmp_path: Path, damage: str) -> None:
    file = tmp_path / ANSWERS_FILE
    if damage == "text":
        file.write_text("no database " * 100)
    elif damage == "folder":
        file.mkdir()
    else:
        with closing(AnswerStore(file)) as store:
            for number in range(200):
                store.keep({"number": number}, "x" * 200)
        with file.open("r+b") as stream:
            stream.truncate(3 * 4096)
    with pytest.raises(BadInput, match=rf"{ANSWERS_FILE}: what the judge has answered cannot be read.*move the file"):
        AnswerStore(file)
