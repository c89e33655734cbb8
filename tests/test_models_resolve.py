"""Names to folders, and what a folder must hold. Not covered: downloads from a hub or a package index."""

import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf.config import ModelConfig
from rlhf.errors import BadInput
from rlhf.models.load import load_model, load_tokenizer, stop_ids
from rlhf.models.own_code import check_own_code, check_readable
from rlhf.models.resolve import check_model, is_encoder_decoder, resolve
from rlhf.models.score_head import check_language_model


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model folder whose weights are in two shards."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "sharded"
    source = resolve("tiny")
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder, max_shard_size="200KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    return folder


def test_tiny_model_has_the_same_bytes_whoever_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two builds at once in one cache, and one in another: same bytes, no leftovers. Not covered: other machines."""
    digests = set()
    for cache, builders in (("one", 2), ("two", 1)):
        monkeypatch.setenv("RLHF_CACHE", str(tmp_path / cache))
        with ThreadPoolExecutor(builders) as pool:
            folders = list(pool.map(resolve, ["tiny"] * builders))
        assert [path.name for path in (tmp_path / cache).iterdir()] == [folders[0].name]
        digests |= {hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() for folder in folders}
    assert len(digests) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "file"))
    with pytest.raises(BadInput, match=r"file: built models are kept there.* Next: set RLHF_CACHE"):
        resolve("tiny")


def test_tied_and_untied_differ_in_the_output_head_only() -> None:
    """By the names in the weight files."""
    from safetensors import safe_open

    names = {}
    for name in ("tiny", "tiny-untied"):
        with safe_open(resolve(name) / "model.safetensors", "pt") as file:
            names[name] = set(file.keys())
    assert names["tiny-untied"] - names["tiny"] == {"lm_head.weight"}
    assert names["tiny"] < names["tiny-untied"]


def test_tiny_tokenizer_pads_with_eos_and_round_trips() -> None:
    """pad = eos != bos, one BOS in a templated prompt, EOS inside it, text comes back."""
    tokenizer = load_tokenizer("tiny", trust_remote_code=False)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id != tokenizer.bos_token_id
    messages = [{"role": "user", "content": "the thing, naïve 你"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id in ids
    assert tokenizer.decode(ids) == text


def test_stop_ids_are_those_of_all_three_sources(tmp_path: Path) -> None:
    """Ids of generation config (a list), model config (a number) and tokenizer; trap 16."""
    tokenizer = load_tokenizer("tiny", trust_remote_code=False)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert stop_ids(tmp_path, tokenizer) == (1, 2, 7, 9)


def test_missing_shard_is_named(sharded: Path) -> None:
    """The folder is fine before, and refused by both calls after."""
    check_model(str(sharded))
    shard = sorted(sharded.glob("model-*.safetensors"))[-1]
    shard.unlink()
    for call in (check_model, resolve):
        with pytest.raises(BadInput, match=shard.name):
            call(str(sharded))


def test_shard_that_was_cut_short_is_named(sharded: Path) -> None:
    """Half a file: its header says how long it should be."""
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(BadInput, match=shard.name):
        check_model(str(sharded))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "config.json"),
        ({"adapter_config.json": "{}"}, "LoRA adapter"),
        ({"config.json": "{"}, "not JSON"),
        ({"config.json": "{}"}, "tokenizer"),
        ({"config.json": "{}", "tokenizer.json": "{}"}, "no weights"),
        ({"config.json": "{}", "tokenizer.json": "{}", "model.safetensors": ""}, "not a whole safetensors file"),
        ({"config.json": "{}", "tokenizer.json": "{}", "model.safetensors.index.json": "{}"}, "weight_map"),
    ],
)
def test_folder_that_is_no_model_is_refused_with_what_it_lacks(
    tmp_path: Path, files: dict[str, str], expected: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=expected):
        check_model(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("model.safetensors", b"\x06\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff", "no readable header .*UnicodeDecodeError"),
        ("model.safetensors", b"\x02\0\0\0\0\0\0\0}{", "no readable header .*JSONDecodeError"),
        ("model.safetensors", b"\x02\0\0\0\0\0\0\0[]", "no readable header .*AttributeError"),
        ("model.safetensors", b'\x09\0\0\0\0\0\0\0{"a": {}}', "no readable header .*KeyError"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 3, "b": "c"}}', "names the shard 3"),
        ("generation_config.json", b"{", "generation_config.json is not JSON"),
        ("generation_config.json", b'{"eos_token_id": "</s>"}', "generation_config.json: eos_token_id is '</s>'"),
        ("config.json", b'{"eos_token_id": [1, null]}', r"config.json: eos_token_id is \[1, None\]; expected a whole"),
    ],
)
def test_damaged_files_of_a_model_are_named(tmp_path: Path, file: str, content: bytes, expected: str) -> None:
    for name, text in {"config.json": "{}", "tokenizer.json": "{}"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(BadInput, match=expected):
        check_model(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("config.json", {"model_type": "unheard-of"}, "cannot read config.json of .*unheard-of"),
        ("config.json", {"max_position_embeddings": "8"}, "cannot read config.json of .*max_position_embeddings"),
        ("tokenizer.json", {"added_tokens": None}, "cannot read the tokenizer of"),
        ("tokenizer_config.json", {"eos_token": None, "pad_token": None}, "has no EOS token"),
    ],
)
def test_files_that_transformers_cannot_read_are_bad_input(
    tmp_path: Path, file: str, changes: dict[str, object], expected: str
) -> None:
    """Found before weights are loaded or actors start; None: the entry is taken out. The whole folder passes."""
    folder = tmp_path / "model"
    shutil.copytree(resolve("tiny"), folder)
    check_readable(str(folder), "reward.model", trust_remote_code=False)
    content = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(BadInput, match=f"reward.model: .*{expected}"):
        check_readable(str(folder), "reward.model", trust_remote_code=False)


def test_a_model_that_scores_is_no_policy(tmp_path: Path) -> None:
    """With tied embeddings transformers would load it without a word about the head that it leaves out."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(BadInput, match=r"model.name: .* is a reward model or ranker \(LlamaForSequenceClassification"):
        check_language_model(str(tmp_path), "model.name")
    check_language_model(str(resolve("tiny")), "model.name")


@pytest.mark.parametrize(
    "content", ["", "[]", "\x00\xff", '{"auto_map": "code.Own"}', '{"auto_map": {"AutoTokenizer": [3]}}']
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_file_of_another_form_is_named(tmp_path: Path, name: str, content: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(resolve("tiny"), folder)
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(BadInput, match=rf"model.name: .*/{name}"):
        check_model(str(folder))


def test_the_older_form_of_a_tokenizer_s_code_is_code(tmp_path: Path) -> None:
    """A list without a class's name, which transformers runs like the newer form. In config.json it reads none."""
    folder = tmp_path / "model"
    shutil.copytree(resolve("tiny"), folder)
    content = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"auto_map": ["code.OwnTokenizer", None], "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(content | own))
    with pytest.raises(BadInput, match=r"code of its own \(tokenizer_config.json: code.OwnTokenizer\)"):
        check_own_code(str(folder), "model.name", trust_remote_code=False)
    (folder / "config.json").write_text('{"auto_map": ["code.Own"]}')
    with pytest.raises(BadInput, match=r"model/config\.json: auto_map is"):
        check_model(str(folder))


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["removed", "emptied"])
def test_a_built_model_that_has_lost_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, how: str
) -> None:
    entry = tmp_path / resolve("tiny").name
    shutil.copytree(resolve("tiny"), entry)
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    assert resolve("tiny") == entry
    (entry / lost).unlink() if how == "removed" else (entry / lost).write_bytes(b"")
    with pytest.raises(BadInput, match=f"{lost}.*{entry} was built here and is not whole any more. Next: remove"):
        resolve("tiny")
    shutil.rmtree(entry)
    resolve("tiny")


def test_tensors_of_another_shape_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(resolve("tiny"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 10}))
    with pytest.raises(BadInput, match=r"lacks tensors, or has them in another shape: .*embed_tokens"):
        load_model(ModelConfig(name=str(folder)), "float32")


@pytest.mark.parametrize("name", ["tiny", "tiny-untied", "tiny_t5"])
def test_layers_that_the_config_does_not_count_are_named(tmp_path: Path, name: str) -> None:
    """transformers loads half a model without a word. Tensors of other kinds may stand beside the model's own."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(resolve(name), folder)
    tensors = load_file(folder / "model.safetensors")
    embedding = next(tensor for key, tensor in tensors.items() if "embed" in key or "shared" in key)
    extras = {
        "score.weight": embedding[:1], "v_head.summary.0.weight": embedding[:1], "lm_head.weight": embedding,
        "model.layers.1.self_attn.rotary_emb.inv_freq": embedding[0],
    }  # fmt: skip
    extras = {key: tensor.clone() for key, tensor in extras.items() if key not in tensors}
    save_file(tensors | extras, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(ModelConfig(name=str(folder)), "float32")
    config = json.loads((folder / "config.json").read_text())
    fewer = {key: 1 for key in ("num_hidden_layers", "num_layers", "num_decoder_layers") if key in config}
    (folder / "config.json").write_text(json.dumps(config | fewer))
    with pytest.raises(BadInput, match=r"holds layers that its config.json does not count: .*(layers|block)\.1\."):
        load_model(ModelConfig(name=str(folder)), "float32")


@pytest.mark.parametrize("name", ["nobody/nothing", "./not/here", "no such name"])
def test_unknown_name_is_bad_input_that_lists_what_is_possible(name: str) -> None:
    """Offline: nothing is downloaded. Not covered: the answers of a hub that can be reached."""
    with pytest.raises(BadInput, match="smollm2"):
        check_model(name)


def test_checking_a_folder_loads_no_torch(sharded: Path) -> None:
    """Bad input must be found before anything heavy is imported."""
    check = f"from rlhf.models.resolve import check_model; check_model({str(sharded)!r})"
    code = f"import sys; {check}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_missing_tensor_is_named_instead_of_drawn_at_random(tmp_path: Path) -> None:
    """transformers warns and fills it with random numbers; here the load is refused."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(resolve("tiny"), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(ModelConfig(name=str(folder)), "float32")


def test_an_encoder_decoder_is_told_by_its_config(tmp_path: Path) -> None:
    """Before its weights are read: built-in names, and a folder that holds nothing but a config."""
    from transformers import T5Config

    T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    found = {name: is_encoder_decoder(name) for name in ("tiny", "tiny-untied", "tiny_t5", "smollm2", str(tmp_path))}
    assert [name for name, told in found.items() if told] == ["tiny_t5", str(tmp_path)]
    assert not is_encoder_decoder(str(resolve("tiny")))
