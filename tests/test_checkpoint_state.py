"""All that a learner remembers is in its checkpoint: found by walking through the object, not by a list.

Not covered: DeepSpeed's own objects, whose state test_checkpoint_layouts.py compares by what it leads to.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.algorithms.table import build
from rlhf.config import RunConfig
from rlhf.experience import Group, fill_in
from rlhf.learner.paired import PairedLearner

# What training changes and a checkpoint leaves out, with the reason.
LEFT_OUT = {"_reach": "watches the first updates of a process for tensors that no gradient reaches; begins again"}

ALGORITHMS: Mapping[str, dict[str, Any]] = {
    "ppo": {"name": "ppo", "samples_per_prompt": 4, "kl": {"coef": 0.0}, "critic": {"lr": 0.02}},
    "reinforce": {"name": "reinforce", "samples_per_prompt": 4, "kl": {"coef": 0.0}},
}


@pytest.fixture
def make(tiny_run: Callable[..., RunConfig]) -> Callable[[str, str], PairedLearner]:
    """A learner of an algorithm with weights in a dtype."""

    def build_learner(algorithm: str, dtype: str) -> PairedLearner:
        plain = tiny_run({}, {"lr": 0.01, "minibatches": 2, "dtype": dtype}, {}, {})
        content = {**plain.model_dump(exclude_unset=True), "algorithm": ALGORITHMS[algorithm]}
        config = RunConfig.model_validate(content)
        learner = PairedLearner(config, build(config.algorithm), 0, 1, None)
        learner.setup()
        return learner

    return build_learner


def train(learner: PairedLearner, groups: list[Group]) -> None:
    learner.update(learner.prepare(fill_in(groups, learner.annotate_share(groups))))


def leaves(thing: object, path: str, seen: dict[int, object]) -> Iterator[tuple[str, object]]:
    """Every tensor, number and word that can be reached from an object of this project, with its path."""
    if isinstance(thing, Tensor):
        yield path, (thing.dtype, thing.detach().clone().flatten().view(torch.uint8).tolist() if thing.numel() else [])
    elif thing is None or isinstance(thing, (bool, int, float, str)):
        yield path, thing
    elif id(thing) not in seen:
        seen[id(thing)] = thing  # kept, or another object could get the id of one that is gone
        for name, value in parts(thing).items():
            yield from leaves(value, f"{path}.{name}", seen)


def parts(thing: object) -> dict[Any, Any]:
    """What an object is made of, where it may hold state; of others nothing."""
    if isinstance(thing, torch.optim.Optimizer):
        return {"state": thing.state_dict()["state"]}
    if isinstance(thing, nn.Module):
        return {**dict(thing.named_parameters()), **dict(thing.named_buffers())}
    if isinstance(thing, Mapping):
        return dict(thing)
    if isinstance(thing, (list, tuple)):
        return dict(enumerate(thing))
    ours = type(thing).__module__.startswith("rlhf.") and not isinstance(thing, BaseModel)
    return vars(thing) if ours else {}


def memory(learner: PairedLearner) -> dict[str, object]:
    return dict(leaves(learner, "", {}))


def differing(one: Mapping[str, object], other: Mapping[str, object]) -> set[str]:
    paths = {path for path in one.keys() | other.keys() if one.get(path, "absent") != other.get(path, "absent")}
    return {path for path in paths if not any(f".{name}" in path for name in LEFT_OUT)}


@pytest.mark.parametrize(("algorithm", "dtype"), [("ppo", "float32"), ("ppo", "bfloat16"), ("reinforce", "float32")])
def test_a_fresh_learner_that_loads_remembers_all_that_training_changed(
    make: Callable[[str, str], PairedLearner],
    sampled_groups: Callable[..., list[Group]],
    tmp_path: Path,
    algorithm: str,
    dtype: str,
) -> None:
    """Bit for bit, the order of the optimizer's entries included. What training changed is found by comparing with a
    learner that was not trained: both optimizers with moments and steps, weights, masters, version, what the algorithm
    carries."""
    trained, fresh = make(algorithm, dtype), make(algorithm, dtype)
    untouched = memory(fresh)
    for step in range(2):
        train(trained, sampled_groups(step, 4, 4, step, 0.05))
    changed = differing(memory(trained), untouched)
    for part in ("_version", "._engine._optimizer", "exp_avg", "exp_avg_sq", ".step", "._engine.policy"):
        assert any(part in path for path in changed), part
    assert any(".critic._engine._optimizer" in path for path in changed) == (algorithm == "ppo")
    assert any("._state.reward_sum" in path for path in changed) == (algorithm == "reinforce")
    trained.save(tmp_path)
    fresh.load(tmp_path)
    assert differing(memory(trained), memory(fresh)) == set()


@pytest.mark.parametrize(
    "part", ["version", "run_state", "weight", "exp_avg", "exp_avg_sq", "step", "critic weight", "critic exp_avg"]
)
def test_a_part_that_was_left_out_is_noticed(
    make: Callable[[str, str], PairedLearner], sampled_groups: Callable[..., list[Group]], tmp_path: Path, part: str
) -> None:
    """The control of the test above: one part of the checkpoint is what it was before training."""
    algorithm = "reinforce" if part == "run_state" else "ppo"
    trained, fresh = make(algorithm, "float32"), make(algorithm, "float32")
    before, after = tmp_path / "before", tmp_path / "after"
    for folder in (before, after):
        folder.mkdir()
    trained.save(before)
    train(trained, sampled_groups(0, 4, 4, 0, 0.05))
    trained.save(after)
    forget(before / "trainer", after / "trainer", part)
    fresh.load(after)
    assert differing(memory(trained), memory(fresh)) != set()


def forget(before: Path, after: Path, part: str) -> None:
    if part in ("version", "run_state"):
        old, new = (json.loads((folder / "learner.json").read_text()) for folder in (before, after))
        (after / "learner.json").write_text(json.dumps({**new, part: old[part]}))
        return
    where, _, kind = part.rpartition(" ")
    old_folder, new_folder = before / where, after / where
    if kind == "step":
        old, new = (json.loads((folder / "state.json").read_text()) for folder in (old_folder, new_folder))
        for name, entry in new["tensors"].items():
            entry["step"] = old["tensors"][name]["step"]
        (new_folder / "state.json").write_text(json.dumps(new))
        return
    (file,) = new_folder.glob("state-*.safetensors")
    old, new = load_file(old_folder / file.name), load_file(file)
    save_file({key: old[key] if key.startswith(f"{kind}/") else value for key, value in new.items()}, file)
