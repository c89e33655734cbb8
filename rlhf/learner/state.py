"""What an engine must not forget, as files that every engine reads: whole float32 tensors by the parameter's name.

For each trainable tensor its master weight, the two moments of AdamW and the steps taken, in safetensors files and an
index. Nothing in it depends on ranks, on ZeRO's stage or on the engine, so a run may go on with others. No pickle.
The learning rate is a function of the version (`schedule`), and no random generator has a state to save.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf.errors import BadInput

LEARNER_FILE = "learner.json"  # in trainer/: the version, and what the algorithm carries from step to step
CRITIC_FOLDER = "critic"  # in trainer/: the critic's state, in the same form as the policy's
INDEX_FILE = "state.json"
FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of AdamW's first and second moment
_SHARD_BYTES = 1 << 30  # what the writing rank holds in memory at a time


class TensorState(NamedTuple):
    """One trainable tensor: weight and moments are whole and float32; steps of AdamW, 0 before the first."""

    name: str
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: float

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Weight and moments under the names that they have in the files."""
        return {"weight": self.weight, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


def write_states(states: Iterable[TensorState], folder: Path, *, write: bool) -> None:
    """Writes the states into an existing folder. Collective where `states` is: every rank goes through all of them,
    and the one with `write` puts them on the disk, in files of about 1 GiB, so that it never holds more in memory."""
    index: dict[str, dict[str, Any]] = {}
    shard: dict[str, Tensor] = {}
    held, number = 0, 0
    for state in states:
        if not write:
            continue
        index[state.name] = {"file": _shard_name(number), "shape": list(state.weight.shape), "step": state.step}
        for kind, tensor in state.tensors.items():
            shard[f"{kind}/{state.name}"] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            held += tensor.numel() * 4
        if held >= _SHARD_BYTES:
            save_file(shard, folder / _shard_name(number))
            shard, held, number = {}, 0, number + 1
    if not write:
        return
    if shard:
        save_file(shard, folder / _shard_name(number))
    (folder / INDEX_FILE).write_text(json.dumps({"format": FORMAT, "tensors": index}, indent=1))


def read_states(folder: Path, shapes: Mapping[str, Sequence[int]]) -> Iterator[TensorState]:
    """The states of exactly these tensors, in their order, one in memory at a time.

    Raises BadInput, naming tensors, when the folder holds others or other shapes, or was written in another format.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        raise BadInput(f"{path}: missing; expected the state that this version of rlhf writes")
    content = json.loads(path.read_text())
    if content["format"] != FORMAT:
        raise BadInput(f"{path}: format {content['format']}, this version reads format {FORMAT}")
    index = content["tensors"]
    found = {name: tuple(entry["shape"]) for name, entry in index.items()}
    expected = {name: tuple(shape) for name, shape in shapes.items()}
    if found != expected:
        differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        told = ", ".join(f"{name} {found.get(name, 'absent')}, expected {expected.get(name, 'none')}"
                         for name in differing[:3])  # fmt: skip
        raise BadInput(
            f"{path}: not the state of this model: {len(differing)} of {len(found | expected)} tensors differ: {told}. "
            "Go on with the model that was trained, or start a new run"
        )
    for name in expected:
        if not _SHARD.fullmatch(index[name]["file"]):
            raise BadInput(f"{path}: {name} is in {index[name]['file']!r}; expected a file beside it: {_shard_name(0)}")
        with safe_open(folder / index[name]["file"], framework="pt") as file:
            weight, first, second = (file.get_tensor(f"{kind}/{name}") for kind in ("weight", *MOMENTS))
        yield TensorState(name, weight, first, second, float(index[name]["step"]))


def states_of(
    names: Sequence[str], masters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> Iterator[TensorState]:
    """The states of an optimizer that holds whole float32 masters, in the order of their names."""
    for name, master in zip(names, masters, strict=True):
        held = optimizer.state.get(master, {})
        first, second = (held.get(kind, torch.zeros_like(master)) for kind in MOMENTS)
        yield TensorState(name, master, first, second, float(held.get("step", 0.0)))


@torch.no_grad()
def restore_states(
    states: Iterable[TensorState], masters: Sequence[nn.Parameter | Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Puts states in the order of the masters into them and their optimizer."""
    for state, master in zip(states, masters, strict=True):
        master.copy_(state.weight)
        optimizer.state[master] = fresh_state(master)
        for kind in MOMENTS:
            optimizer.state[master][kind].copy_(state.tensors[kind])
        optimizer.state[master]["step"].fill_(state.step)


def fresh_state(master: Tensor) -> dict[str, Tensor]:
    """What torch's AdamW makes for a tensor at its first step."""
    moments = {kind: torch.zeros_like(master, memory_format=torch.preserve_format) for kind in MOMENTS}
    return {"step": torch.tensor(0.0), **moments}


def one_step_count(steps: Mapping[str, float], folder: Path) -> float:
    """The steps that all tensors have in common. Raises BadInput where they differ: ZeRO counts once for all."""
    fewest, most = min(steps, key=lambda name: steps[name]), max(steps, key=lambda name: steps[name])
    if steps[fewest] != steps[most]:
        raise BadInput(
            f"{folder}: {fewest} has had {steps[fewest]:g} optimizer steps, {most} {steps[most]:g}; ZeRO counts once "
            "for all tensors. Go on with learner.engine=torch"
        )
    return steps[most]


_SHARD = re.compile(r"state-[0-9]{5}\.safetensors")


def _shard_name(number: int) -> str:
    return f"state-{number:05d}.safetensors"
