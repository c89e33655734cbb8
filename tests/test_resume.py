"""2N steps equal N steps, SIGKILL, and the same command again: bitwise, in one process, float32, transformers engine.

Whole runs through the command line in processes that really die. They are forked from a process that has imported what
a run needs, so that each costs a second or two. Not covered: vLLM and Ray (test_run_end_to_end.py), several ranks.
"""

import json
import multiprocessing
import runpy
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlhf.buffer.audit import ExperienceView, verify
from rlhf.buffer.schema import FILE_NAME

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["rlhf.cli.launch", "rlhf.local", "rlhf.cli.main", "torch.utils.tensorboard", "peft"])

# Runs the command line, writes down which prompts were sampled, and dies when told to: after a step was committed and
# the checkpoint that may be due then was written.
CHILD = """
import json, os, signal
os.chdir({folder!r})
told = os.open({told!r}, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(told, 1), os.dup2(told, 2)
from rlhf.cli import launch
from rlhf.cli.main import main
from rlhf.generation.transformers_engine import TransformersGenerator

sample, checkpoint_if_due = TransformersGenerator.generate, launch.Record.checkpoint_if_due

def generate(self, prompts, sampling, samples_per_prompt, purpose):
    for group in sample(self, prompts, sampling, samples_per_prompt, purpose):
        if purpose == "sample":
            with open({log!r}, "a") as file:
                tokens = sum(len(s.token_ids) for s in group.samples)
                print(json.dumps([group.prompt.id, tokens]), file=file)
        yield group

def checkpoint_or_die(self, updates):
    checkpoint_if_due(self, updates)
    if updates == {die_after}:
        os.kill(os.getpid(), signal.SIGKILL)

TransformersGenerator.generate = generate
launch.Record.checkpoint_if_due = checkpoint_or_die
raise SystemExit(main({arguments!r}))
"""

PREFERENCES = [
    {"prompt": f"Name {n}.", "chosen": f"Number {n}, {n}.", "rejected": f"{n} {n} {n} {n}", "completion": f"It is {n}."}
    for n in range(24)
]
SAMPLED: dict[str, Any] = {
    "generation": {"engine": "transformers", "max_new_tokens": 6, "temperature": 0.9},
    "reward": {"function": "reward.py:reward", "isolate": False},
}
ALGORITHMS: Mapping[str, dict[str, Any]] = {
    "rloo": {"algorithm": {"name": "rloo", "samples_per_prompt": 2, "kl": {"coef": 0.02}}, **SAMPLED},
    "reinforce": {"algorithm": {"name": "reinforce", "kl": {"coef": 0.0}}, **SAMPLED},  # carries a moving baseline
    "ppo": {"algorithm": {"name": "ppo", "critic": {"lr": 1e-3}}, **SAMPLED},
    "rso": {
        "algorithm": {
            "name": "rso",
            "samples_per_prompt": 6,
            "rejection": {"mode": "paper", "beta": 0.5, "accept": 4, "reward_units": "standardised"},
            "pairing": "tournament",
            "loss": {"name": "sigmoid", "beta": 0.1},
        },
        **SAMPLED,
    },
    "online_dpo": {
        "algorithm": {"name": "online_dpo", "samples_per_prompt": 2, "loss": {"beta": 0.1}},
        **SAMPLED,
    },
    "dpo": {"algorithm": {"name": "dpo", "loss": {"beta": 0.1}}},
}
TIMES = ("time/", "tokens/", "sync/", "faults/restarts", "faults/uploads")


class Place:
    """A folder with a run file, and runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, content: Mapping[str, Any]) -> None:
        (self.folder / "run.yaml").write_text(yaml.safe_dump(dict(content)))

    def rlhf_run(self, run_dir: str, *arguments: str, die_after: int | None = None) -> int:
        """The exit code of `rlhf run run.yaml`, -9 when it was killed."""
        command = ["run", "run.yaml", "--in-process", "--run-dir", run_dir, *arguments]
        script = self.folder / "child.py"
        log = str(self.folder / f"{run_dir}.sampled")
        told = str(self.folder / "told")
        script.write_text(
            CHILD.format(folder=str(self.folder), told=told, log=log, die_after=die_after, arguments=command)
        )
        process = PROCESSES.Process(target=runpy.run_path, args=(str(script),))
        process.start()
        process.join(200)
        assert process.exitcode is not None, "the run does not end"
        return process.exitcode

    def told(self) -> str:
        """What the last run said."""
        return (self.folder / "told").read_text()

    def sampled(self, run_dir: str) -> list[tuple[int, int]]:
        """(prompt id, tokens) of every group that was sampled, in the order of time, over all processes of the run."""
        log = self.folder / f"{run_dir}.sampled"
        return [tuple(json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PREFERENCES))
    (tmp_path / "reward.py").write_text(
        "def reward(prompts, completions, **columns):\n    return [t.count('e') + len(t) / 10 for t in completions]\n"
    )
    return Place(tmp_path)


def content_of(algorithm: str) -> dict[str, Any]:
    return {
        "seed": 7,
        "model": {"name": "tiny"},
        "data": {"path": "prompts.jsonl", "heldout": 2},
        "loop": {"num_steps": 4, "groups_per_step": 3, "checkpoint_every": 2, "keep_checkpoints": 1},
        "learner": {"engine": "torch", "lr": 1e-3, "schedule": "linear", "minibatches": 2, "threads": 1},
        **ALGORITHMS[algorithm],
    }


def assert_same_run(left: Path, right: Path, *, replayed: list[int]) -> None:
    """Weights, optimizers, carried state, ledger and metrics, bitwise; times and rates apart."""
    for name in ("policy", "trainer"):
        mine, theirs = (tensors(run / "checkpoints" / "step-000004" / name) for run in (left, right))
        assert mine.keys() == theirs.keys()
        assert [
            key for key in mine if not torch.equal(mine[key].view(torch.uint8), theirs[key].view(torch.uint8))
        ] == []
    states = [(run / "checkpoints" / "step-000004" / "trainer" / "learner.json").read_text() for run in (left, right)]
    assert states[0] == states[1]
    views = [ExperienceView(run / FILE_NAME) for run in (left, right)]
    assert views[0].counts() == views[1].counts()
    for mine, theirs in zip(*(view.history() for view in views), strict=True):
        assert (mine.step, mine.version, mine.fingerprint, mine.prompt_ids) == (
            theirs.step,
            theirs.version,
            theirs.fingerprint,
            theirs.prompt_ids,
        )
        assert lasting(mine.metrics) == lasting(theirs.metrics)
        assert theirs.rewound_fingerprint == (theirs.fingerprint if theirs.step in replayed else None)
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (left, right)]
    assert [lasting(row) for row in rows[0]] == [lasting(row) for row in rows[1]]
    assert verify(right / FILE_NAME).ok


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return {f"{path.relative_to(folder)}/{name}": t for path in files for name, t in load_file(path).items()}


def lasting(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(TIMES)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm",
    [
        "rloo",
        "ppo",
        "rso",
        "dpo",
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("reinforce", "online_dpo")),
    ],
)
def test_a_run_killed_a_step_after_its_checkpoint_ends_as_one_that_was_not(place: Place, algorithm: str) -> None:
    """Killed after three of four steps, checkpoint after two: the third is trained again from the buffer, for which not
    one token is sampled, and the fourth as ever."""
    place.write(content_of(algorithm))
    assert place.rlhf_run("straight") == 0, place.told()
    assert place.rlhf_run("killed", die_after=3) == -signal.SIGKILL
    before = place.sampled("killed")
    assert [path.name for path in (place.folder / "killed/checkpoints").iterdir()] == ["step-000002"]
    assert place.rlhf_run("killed") == 0, place.told()
    assert_same_run(place.folder / "straight", place.folder / "killed", replayed=[2])
    trained = ExperienceView(place.folder / "killed" / FILE_NAME).history()
    if algorithm != "dpo":
        assert {prompt_id for prompt_id, _ in before} >= {n for step in trained[:3] for n in step.prompt_ids}
    assert sorted(place.sampled("killed")) == sorted(place.sampled("straight")), "sampled twice, or another length"
    assert (len(place.sampled("killed")) == 0) == (algorithm == "dpo")


@pytest.mark.slow
def test_a_run_whose_machine_vanished_goes_on_from_storage(place: Place) -> None:
    """Killed after three steps and the run directory gone: an empty one and the same address end with the same bits.
    Steps whose buffer was uploaded are trained from it; what was sampled since the last upload is sampled again, to the
    same tokens, and no prompt is trained twice. `verify` looks at the address too."""
    place.write(content_of("rloo"))
    (place.folder / "cluster.yaml").write_text(
        yaml.safe_dump({"storage": {"address": f"file://{place.folder}/stored", "buffer_every": 1}})
    )
    there = ["--cluster", "cluster.yaml"]
    assert place.rlhf_run("straight") == 0, place.told()
    assert place.rlhf_run("moved", *there, die_after=3) == -signal.SIGKILL
    before = len(place.sampled("moved"))
    shutil.rmtree(place.folder / "moved")
    (place.folder / "stored/checkpoints/step-000009").mkdir()  # half an upload
    (place.folder / "stored/checkpoints/step-000009/learner.json").write_text("{}")
    assert place.rlhf_run("moved", *there) == 0, place.told()
    assert_same_run(place.folder / "straight", place.folder / "moved", replayed=[2])
    again = place.sampled("moved")[before:]
    assert {prompt_id for prompt_id, _ in again} == {9, 10, 11}, "the groups of the fourth step, and no other"
    # An address that holds the end of the run: a third directory has nothing left to do.
    assert place.rlhf_run("third", *there) == 0, place.told()
    assert place.sampled("third") == []
    assert_same_run(place.folder / "straight", place.folder / "third", replayed=[2])


@pytest.mark.slow
def test_a_damaged_checkpoint_is_said_and_the_one_before_used(place: Place) -> None:
    """By file name; the run ends with the bits of an undisturbed one. Without its ledger a checkpoint is refused."""
    content = content_of("dpo")
    content["loop"] |= {"checkpoint_every": 1, "keep_checkpoints": 3}
    content["learner"]["schedule"] = "constant"  # so that the run may be made longer
    place.write(content)
    assert place.rlhf_run("straight") == 0, place.told()
    assert place.rlhf_run("killed", die_after=3) == -signal.SIGKILL
    damaged = next((place.folder / "killed/checkpoints/step-000003/trainer").glob("state-*.safetensors"))
    bits = bytearray(damaged.read_bytes())
    bits[len(bits) // 2] ^= 1
    damaged.write_bytes(bits)
    assert place.rlhf_run("killed") == 0, place.told()
    told = place.told()
    assert "step-000003 is not used" in told and damaged.name in told and "goes on from" in told
    assert_same_run(place.folder / "straight", place.folder / "killed", replayed=[2])
    (place.folder / "killed" / FILE_NAME).unlink()
    assert place.rlhf_run("killed", "loop.num_steps=5") == 2
    assert FILE_NAME in place.told() and "is missing" in place.told()
