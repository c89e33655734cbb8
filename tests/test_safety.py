"""What others give us is data: models, run directories, storage and answers run no code, write nowhere else, and no
secret in an address gets further than the message that refuses it.

Not covered: defects in torch's, transformers' and SQLite's own readers; a stored address whose password has no name
that sounds like one. tests/test_safety_run.py looks at a real run.
"""

import ast
import json
import pickle
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf import checkpoint
from rlhf.buffer.audit import ExperienceView, verify
from rlhf.buffer.codec import checksum
from rlhf.buffer.payloads import group_address
from rlhf.buffer.schema import DamagedExperience
from rlhf.buffer.store import ExperienceBuffer
from rlhf.cli.before_after import before_and_after
from rlhf.cli.main import main
from rlhf.config import RunConfig
from rlhf.credentials import refuse_credentials, without_credentials
from rlhf.errors import BadInput
from rlhf.evaluation.heldout import Answer, HeldoutReport
from rlhf.experience import Group
from rlhf.learner.state import INDEX_FILE, read_states
from rlhf.models.load import load_model, load_tokenizer
from rlhf.models.own_code import check_own_code
from rlhf.models.resolve import check_model, resolve
from rlhf.storage import Storage
from rlhf.ui.report import page

ROOT = Path(__file__).parents[1]
CANARY = "c4narysecret"


class WritesFile:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


# Secrets in addresses.


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (f"s3://key:{CANARY}@bucket/run", "s3://key:***@bucket/run"),
        (f"simplecache::ftp://me:{CANARY}@host/run", "simplecache::ftp://me:***@host/run"),
        (f"https://{CANARY}@host/score", "https://***@host/score"),
        (f"https://me:{CANARY}@host:8000/score", "https://***@host:8000/score"),
        (f"https://host/score?version=2&api_key={CANARY}", "https://host/score?***"),
        (f"az://box/run?sv=1&sig={CANARY}", "az://box/run?***"),
        (f"https://host/a?access_token={CANARY}", "https://host/a?***"),
    ],
)
def test_an_address_with_a_secret_is_refused_without_it(address: str, shown: str) -> None:
    with pytest.raises(BadInput) as refused:
        refuse_credentials(address, "storage.address")
    assert str(refused.value).startswith(f"storage.address: {shown} holds a secret") and CANARY not in str(
        refused.value
    )


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/run", "abfs://container@account.dfs.core.windows.net/run", "ssh://me@host/run", "/data/run",
        "http://127.0.0.1:8000/v1", "https://host/score?version=2", "org/model", "Rate this: http://a:b@c please",
    ],
)  # fmt: skip
def test_other_addresses_and_texts_stay_as_they_are(address: str) -> None:
    assert without_credentials(address) == address


RUN_FILE = """
model: {name: tiny}
algorithm: {name: rloo, samples_per_prompt: 2}
data: {path: prompts.jsonl}
loop: {num_steps: 1, groups_per_step: 2}
generation: {engine: transformers, max_new_tokens: 4}
learner: {engine: torch}
reward: {server: "http://127.0.0.1:1/"}
"""


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["run", "run.yaml", f"reward.server=http://me:{CANARY}@127.0.0.1:1/"], "reward.server"),
        (["run", "run.yaml", f"data.path=https://host/rows?token={CANARY}"], "data.path"),
        (["run", "run.yaml", f"model.name=https://{CANARY}@host/model"], "model.name"),
        (["run", "run.yaml", f"loop.num_steps=https://{CANARY}@host"], "loop.num_steps"),
        (["run", "run.yaml", "--cluster", "cluster.yaml"], "cluster.yaml: storage.address"),
        (["run", "secret.yaml"], "secret.yaml: reward.server"),
        (["submit", "run.yaml", "--cluster", "plain.yaml", "--run-dir", "/x", "--address", f"http://{CANARY}@h:1"],
         "--address"),
        (["data", "show", f"https://me:{CANARY}@host/rows.jsonl"], "PATH"),
    ],
)  # fmt: skip
def test_the_command_line_refuses_secrets_wherever_an_address_can_be_given(
    words: list[str], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "hi"}\n')
    Path("run.yaml").write_text(RUN_FILE)
    Path("secret.yaml").write_text(RUN_FILE.replace("http://", f"http://me:{CANARY}@"))
    Path("cluster.yaml").write_text(f"storage: {{address: 's3://key:{CANARY}@bucket/run'}}\n")
    Path("plain.yaml").write_text("address: auto\n")
    assert main(words) == 2
    printed = "".join(capsys.readouterr())
    assert key in printed and "holds a secret" in printed and "Next:" in printed and CANARY not in printed
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in ("secret.yaml", "cluster.yaml")]
    assert not [path for path in left if CANARY in path.read_text()]


# Code that comes with data.

FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
READERS = {"load", "loads", "Unpickler", "open"}
# The parent's own socket pair: neither a network nor a run directory.
ALLOWED = {("rlhf/judges/worker.py", "pickle.loads")}
EXPLICIT = {"from_pretrained": "trust_remote_code", "from_config": "trust_remote_code"}


def unsafe(source: str, path: str) -> Iterator[str]:
    """`line: call` of each call that may run what it reads."""
    for call in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]:
        name, words = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
        module, _, function = name.rpartition(".")
        plain_yaml = name == "yaml.load" and [ast.unparse(argument) for argument in call.args[1:]] != ["_Loader"]
        if (
            (module in FORBIDDEN_MODULES and function in READERS and (path, name) not in ALLOWED)
            or (name == "torch.load" and words.get("weights_only") != "True")
            or words.get("allow_pickle", "False") != "False"
            or words.get("weights_only", "True") != "True"
            or words.get("trust_remote_code") == "True"
            or (function in EXPLICIT and EXPLICIT[function] not in words)
            or plain_yaml
            or name in ("yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system")
            or words.get("shell") == "True"
        ):
            yield f"{path}:{call.lineno}: {ast.unparse(call)}"


def test_nothing_in_the_sources_runs_what_it_reads() -> None:
    files = [path for package in ("actors", "rlhf") for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    found = [line for path in files for line in unsafe(path.read_text(), path.relative_to(ROOT).as_posix())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(file)", "pickle.loads(body)", "torch.load(path)", "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)", "yaml.load(text, yaml.Loader)", "yaml.unsafe_load(text)", "eval(text)",
        "AutoModel.from_pretrained(folder)", "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
    ],
)  # fmt: skip
def test_a_line_that_would_is_found(line: str) -> None:
    source = (ROOT / "rlhf/models/resolve.py").read_text()
    assert not list(unsafe(source, "x.py"))
    assert len(list(unsafe(f"{source}\n\ndef broken(*_):\n    return {line}\n", "x.py"))) == 1


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(resolve("tiny"), tmp_path / "model"))


def with_code(folder: Path, which: str) -> Path:
    """Gives a model code of its own, which it needs; returns the file that the code writes."""
    written = folder.parent / "executed"
    (folder / "code.py").write_text(
        f"from pathlib import Path\nPath({str(written)!r}).touch()\n"
        "from transformers import LlamaConfig, PreTrainedTokenizerFast\n"
        # Loading one marks its class as one with code of its own: never a class of transformers.
        "class Own(LlamaConfig):\n    pass\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    name, entry, kind, own = {
        "config": ("config.json", {"AutoConfig": "code.Own"}, "model_type", "their_own"),
        "tokenizer": (
            "tokenizer_config.json",
            {"AutoTokenizer": ["code.OwnTokenizer", None]},
            "tokenizer_class",
            "Own",
        ),
    }[which]
    content = json.loads((folder / name).read_text()) | {"auto_map": entry, kind: own}
    (folder / name).write_text(json.dumps(content))
    return written


@pytest.mark.parametrize("which", ["config", "tokenizer"])
def test_code_of_a_model_is_run_only_where_the_key_says_so(
    which: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused by the command before anything starts, with the key; and, as a control, run where it is asked for."""
    written = with_code(model_folder, which)
    monkeypatch.chdir(model_folder.parent)
    monkeypatch.setenv("HF_MODULES_CACHE", str(model_folder.parent / "modules"))
    Path("prompts.jsonl").write_text('{"prompt": "hi"}\n' * 4)
    Path("run.yaml").write_text(RUN_FILE)
    for words in (["run", "run.yaml", f"model.name={model_folder}", "--in-process"], ["chat", str(model_folder)]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "model.trust_remote_code=true" in said and "code.Own" in said and str(model_folder) in said
    if which == "tokenizer":
        assert main(["data", "show", "prompts.jsonl", "--model", str(model_folder)]) == 2
    assert not written.exists()
    with pytest.raises(BadInput, match=r"^reward\.model: .*trust_remote_code=true"):
        check_own_code(str(model_folder), "reward.model", trust_remote_code=False)
    check_own_code(str(model_folder), "reward.model", trust_remote_code=True)
    if which == "tokenizer":
        load_tokenizer(str(model_folder), trust_remote_code=True)
        assert written.exists()


def test_code_that_a_model_brings_and_does_not_need_is_left_alone(model_folder: Path) -> None:
    written = with_code(model_folder, "config")
    content = json.loads((model_folder / "config.json").read_text()) | {"model_type": "llama"}
    (model_folder / "config.json").write_text(json.dumps(content))
    check_own_code(str(model_folder), "model.name", trust_remote_code=False)
    assert not written.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_are_read_as_tensors_or_not_at_all(
    model_folder: Path, zipped: bool, make_config: Callable[[Path], RunConfig]
) -> None:
    tensors = load_file(model_folder / "model.safetensors")
    (model_folder / "model.safetensors").unlink()
    weights, written = model_folder / "pytorch_model.bin", model_folder.parent / "executed"
    torch.save({**tensors, "more": WritesFile(written)}, weights, _use_new_zipfile_serialization=zipped)
    for read in (
        lambda: check_model(str(model_folder)),
        lambda: load_model(make_config(model_folder).model, "float32"),
    ):
        with pytest.raises(
            BadInput, match=r"model\.name: .*pytorch_model\.bin does not hold tensors alone.*safetensors"
        ):
            read()
    assert not written.exists()
    torch.save(tensors, weights, _use_new_zipfile_serialization=zipped)
    check_model(str(model_folder))
    loaded = load_model(make_config(model_folder).model, "float32").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[[Path], RunConfig]:
    from rlhf.config_file import load_run

    def build(model: Path) -> RunConfig:
        (tmp_path / "run.yaml").write_text(RUN_FILE)
        return load_run(tmp_path / "run.yaml", [f"model.name={model}"])

    return build


def test_a_pickle_in_the_buffer_is_refused_with_its_place(tmp_path: Path, rollout: Callable[..., Group]) -> None:
    """Its checksum is right, as that of a buffer would be that somebody else made."""
    file, written = tmp_path / "experience.db", tmp_path / "executed"
    buffer = ExperienceBuffer(file, frozenset(), None, 3)
    buffer.open()
    (lease,) = buffer.lease(1, "engine", 0)
    buffer.add_group(lease.prompt_id, lease.ticket, rollout(lease.prompt_id, 0, 2, 3, {}))
    buffer.close()
    payload = pickle.dumps(WritesFile(written))
    with sqlite3.connect(file) as connection:
        row = (payload, checksum(group_address(0), payload))
        connection.execute("UPDATE groups SET payload = ?, checksum = ? WHERE prompt_id = 0", row)
    with pytest.raises(DamagedExperience, match=r"experience\.db: groups: prompt 0: the payload starts with"):
        ExperienceView(file).group(0)
    assert any("prompt 0" in problem for problem in verify(file).problems)
    assert not written.exists()
    pickle.loads(payload)  # the control: it would have
    assert written.exists()


# Names that lead elsewhere.

OUTSIDE = ["../outside", "policy/../../outside", "/tmp/outside", "./x", ""]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_that_leads_outside_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 1, {}, lambda folder: (folder / "part").write_text("x"))
    folder = tmp_path / "checkpoints" / "step-000001"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"].pop("part")
    (tmp_path / "checkpoints" / "outside").write_text("x")  # with the same bytes
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.committed(tmp_path) == []
    (fault,) = checkpoint.problems(folder)
    assert "manifest.json" in fault and repr(name) in fault


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_stored_manifest_writes_nothing_outside(name: str, tmp_path: Path) -> None:
    run_dir, to = tmp_path / "run", tmp_path / "deep" / "to"
    checkpoint.write(run_dir, 1, {}, lambda folder: (folder / "part").write_text("x"))
    storage = Storage(str(tmp_path / "stored"))
    storage.put("checkpoints", run_dir / "checkpoints" / "step-000001", 1)
    stored = tmp_path / "stored" / "checkpoints"
    manifest = json.loads((stored / "step-000001" / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"].pop("part")
    (stored / "outside").write_text("x")
    (stored / "step-000001" / "manifest.json").write_text(json.dumps(manifest))
    before = sorted(tmp_path.rglob("*"))
    fault = storage.fetch("checkpoints", 1, to)
    assert fault is not None and repr(name) in fault
    assert sorted(tmp_path.rglob("*")) == before


def test_shards_lie_beside_their_index(model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "../outside.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match=r"names the shard '\.\./outside\.safetensors'; expected a file beside it"):
        check_model(str(model_folder))
    state = {"format": 1, "tensors": {"w": {"file": "../outside.safetensors", "shape": [2], "step": 1.0}}}
    (tmp_path / INDEX_FILE).write_text(json.dumps(state))
    with pytest.raises(BadInput, match=r"w is in '\.\./outside\.safetensors'"):
        list(read_states(tmp_path, {"w": [2]}))


# Texts of models.

NASTY = [
    "<script>alert(1)</script>", "</td></table><img src=x onerror=alert(1)>", "<!--", "<a href='javascript:x()'>x</a>",
    "&lt;script&gt;", "\x1b]0;owned\x07\x1b[2J", "<svg/onload=alert(1)>", '"><style>*{display:none}</style>',
]  # fmt: skip


class Page(HTMLParser):
    """The tags and attributes that a browser would see, and the texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def report_of(texts: list[str]) -> str:
    """A page with these texts wherever a model, a data set, a judge or a user can put one."""
    answers = tuple(Answer(text, text, 1.0, text) for text in texts)
    reports = [HeldoutReport(step, 0.0, 1.0, 1, 0, 1.0, 0.0, answers) for step in (0, 1)]
    metrics = [{"step": step, "reward/mean": 0.0, **{f"faults/{text}": 1.0 for text in texts}} for step in (0, 1)]
    return page("".join(texts), metrics, reports, "\n".join(texts), dict.fromkeys(texts, 1))


def test_what_models_and_data_say_is_inert_in_the_report() -> None:
    """The same elements and attributes as with harmless texts, each text whole."""
    nasty, plain = Page(report_of(NASTY)), Page(report_of([f"plain {number}" for number in range(len(NASTY))]))
    assert nasty.tags == plain.tags and nasty.attributes == plain.attributes
    assert not {"script", "img", "a", "iframe"} & nasty.tags.keys() and not [
        a for a in nasty.attributes if a[:2] == "on"
    ]
    shown = "".join(nasty.texts)
    assert all(text in shown for text in NASTY)


def test_what_models_say_does_not_steer_a_terminal(tmp_path: Path) -> None:
    answers = tuple(Answer(text, text, 1.0, "stop") for text in NASTY)
    lines = [json.dumps(HeldoutReport(step, 0.0, 1.0, 1, 0, 1.0, 0.0, answers).to_json()) for step in (0, 1)]
    (tmp_path / "evaluations.jsonl").write_text("\n".join(lines) + "\n")
    said = before_and_after(tmp_path)
    assert "owned" in said and not [letter for letter in said if not letter.isprintable() and letter != "\n"]
