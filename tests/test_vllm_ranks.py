"""A vLLM engine of two processes against plain transformers forward passes, at every token; and what it leaves behind.

CPU, float32, the tiny models: two heads, one in each process, and one head of keys and values, which both have.
Not covered: GPUs; more than two processes; a vocabulary that is not divided evenly.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.errors import EngineLost, WeightMismatch
from rlhf.experience import Group, Prompt, Sampling
from rlhf.generation.engine import EngineSpec
from rlhf.generation.vllm_engine import VllmGenerator
from rlhf.models.resolve import resolve
from rlhf.weights import Probe, Weights, pack, probe_ids, state_once

pytestmark = [pytest.mark.vllm, pytest.mark.soak]

TOLERANCE = 1e-4  # nats, at every token
LONG_S = 1200.0  # a machine that does a lot else


def spec(folder: Path) -> EngineSpec:
    return EngineSpec(
        name="rollout-0",
        model=folder,
        dtype="float32",
        attention="sdpa",
        trust_remote_code=False,
        run_seed=3,
        max_sequence_tokens=400,
        max_sequences=16,
        cache_gib=0.1,
        gpu_memory_fraction=0.5,
        probe_tolerance=1e-3,
        mid_sequence=True,
        sleeps=False,
        tensor_parallel=2,
    )


class Setting:
    """An engine of two processes, with the model that it should agree with, and the next version's number."""

    def __init__(self, name: str) -> None:
        folder = resolve(name)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.version = 0
        self.engine = VllmGenerator(spec(folder))

    @torch.no_grad()
    def token_logprobs(self, ids: Sequence[int]) -> np.ndarray:
        """Of tokens 1.. by a whole forward pass."""
        tokens = torch.tensor(list(ids))
        logits = self.model(input_ids=tokens[None]).logits[0, :-1].double()
        return logits.log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1).float().numpy()

    @torch.no_grad()
    def perturb(self) -> None:
        """A random step on every tensor."""
        generator = torch.Generator().manual_seed(self.version)
        for parameter in self.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))

    def publish(self) -> Weights:
        self.version += 1
        ids = probe_ids(self.model.config.vocab_size)
        return pack(self.version, state_once(self.model).items(), Probe(ids, self.token_logprobs(ids.tolist())))

    def sample(self) -> list[Group]:
        return list(self.engine.generate(prompts(), Sampling(1.0, 1.0, 0, 12), 4, "sample"))

    def difference(self, groups: Sequence[Group]) -> float:
        """The largest |engine - forward pass| over all tokens of all samples."""
        worst = 0.0
        for group in groups:
            prompt = group.prompt.token_ids.tolist()
            for sample in group.samples:
                expected = self.token_logprobs([*prompt, *sample.token_ids.tolist()])[len(prompt) - 1 :]
                worst = max(worst, float(np.abs(sample.behavior_logprobs - expected).max()))
        return worst

    def in_rank(self, rank: int, action: Callable[[], None]) -> None:
        """Does something in one of the engine's processes."""

        def act(worker: Any) -> None:
            if worker.rank == rank:
                action()

        self.engine._engine.collective_rpc(act)


def prompts() -> list[Prompt]:
    """The last one is longer than a block of the prefix cache, so that stale blocks of it would be found."""
    random = np.random.default_rng(8)
    return [
        Prompt(i, i, 0, "?", "?", random.integers(5, 320, length, dtype=np.int32), {})
        for i, length in enumerate([3, 8, 300])
    ]


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def ranks_of(pid: int) -> list[psutil.Process]:
    """The processes of an engine that process `pid` holds, the interpreter's own tracker left out."""
    found = psutil.Process(pid).children(recursive=True)
    return [child for child in found if "resource_tracker" not in " ".join(child.cmdline())]


@pytest.fixture(scope="module", params=["tiny", "tiny-untied"])
def running(request: pytest.FixtureRequest) -> Iterator[Setting]:
    """At the end nothing that the engine started may live on; how many threads this process has is not its business."""
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    others = set(ranks_of(os.getpid()))  # of tests before this one
    setting = Setting(request.param)
    setting.engine.setup()
    assert len(set(ranks_of(os.getpid())) - others) == 2
    assert (torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")) == (threads, variable)
    yield setting
    setting.engine.close()
    assert set(ranks_of(os.getpid())) <= others


@pytest.mark.timeout(LONG_S)
def test_two_processes_agree_with_a_forward_pass_before_and_after_updates(running: Setting) -> None:
    """Also after an update that came between two tokens, for what was asked for since; prefix cache included. Nothing
    of a version's shared memory stays. That the comparison can fail is shown below."""
    descriptors = len(os.listdir("/proc/self/fd"))
    for update in range(3):
        if update:
            running.perturb()
        receipt = running.engine.load(running.publish())
        assert receipt.version == running.version and receipt.probe_abs_max <= TOLERANCE
        assert running.difference(running.sample()) <= TOLERANCE
    assert len(os.listdir("/proc/self/fd")) == descriptors
    steps = running.engine.steps(prompts(), Sampling(1.0, 1.0, 0, 24), 8, "sample")
    before = [next(steps) for _ in range(4)]
    running.perturb()
    running.engine.load(running.publish())
    groups = [group for group in [*before, *steps] if group is not None]
    versions = {int(version) for group in groups for sample in group.samples for version in sample.versions}
    assert versions == {running.version - 1, running.version}
    assert running.difference(running.sample()) <= TOLERANCE


@pytest.mark.timeout(LONG_S)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_head_that_one_process_does_not_pack_again_is_caught(running: Setting, rank: int) -> None:
    """The control of the test above, in either process: the probe refuses the tied model, and only that."""

    def leave_the_head() -> None:
        from rlhf.generation import vllm_weights

        # Kept in the module, which is all that lives on in the rank's process between two calls.
        vllm_weights.packed_again = vllm_weights.refresh_output_heads  # type: ignore[attr-defined]
        vllm_weights.refresh_output_heads = lambda model: None

    def pack_it_again() -> None:
        from rlhf.generation import vllm_weights

        vllm_weights.refresh_output_heads = vllm_weights.packed_again  # type: ignore[attr-defined]

    running.engine.load(running.publish())
    running.perturb()
    running.in_rank(rank, leave_the_head)
    try:
        if running.model.config.tie_word_embeddings:
            with pytest.raises(WeightMismatch, match=r"lm_head\.weight"):
                running.engine.load(running.publish())
        else:
            running.engine.load(running.publish())
    finally:
        running.in_rank(rank, pack_it_again)
    running.engine.load(running.publish())
    assert running.difference(running.sample()) <= TOLERANCE


HOLDER = """
import os, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_vllm_ranks import Setting
if __name__ == "__main__":
    setting = Setting("tiny")
    setting.engine.setup()
    setting.engine.load(setting.publish())
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        setting.sample()
    except Exception as error:
        print(type(error).__name__, flush=True)
    setting.engine.close()
    print("closed", flush=True)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds an engine of two processes, which have loaded a version."""
    script = tmp_path / "holder.py"
    script.write_text(HOLDER)
    process = subprocess.Popen(
        [sys.executable, str(script), str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert process.stdout is not None
    try:
        assert any(line == "ready\n" for line in process.stdout)
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until_gone(processes: Sequence[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60.0)
    assert not alive, [process.cmdline() for process in alive]


@pytest.mark.timeout(LONG_S)
def test_the_processes_die_with_a_killed_engine_also_when_one_of_them_is_stopped(
    holder: "subprocess.Popen[str]",
) -> None:
    """SIGKILL of the process that holds the engine, as a pool ends an actor that hangs; one of its own is stopped."""
    ranks = ranks_of(holder.pid)
    everything = psutil.Process(holder.pid).children(recursive=True)
    assert len(ranks) == 2
    ranks[1].suspend()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    wait_until_gone(everything)


@pytest.mark.timeout(LONG_S)
def test_an_engine_that_loses_a_process_says_so_and_can_be_closed(holder: "subprocess.Popen[str]") -> None:
    """Killed amid nothing: the next call raises EngineLost, by which its actor ends, and nothing is left."""
    ranks = ranks_of(holder.pid)
    ranks[1].kill()
    assert holder.stdin is not None and holder.stdout is not None
    holder.stdin.write("go on\n")
    holder.stdin.flush()
    said = holder.stdout.read().splitlines()  # vLLM's own words among them
    assert [line for line in said if line in (EngineLost.__name__, "closed")] == [EngineLost.__name__, "closed"], said
    holder.wait()
    wait_until_gone(ranks)
