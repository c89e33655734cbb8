"""Not a test: a process that does what one role does in a run, and says how much memory that took.

    python measured_memory.py JSON       trainer: a run file's content, groups, prompt, completion (tokens)
                                         rollout: the same

Prints one JSON object: the peak of resident memory in bytes. Started by tests/test_plan_memory.py.
"""

import json
import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf.config import RunConfig
from rlhf.experience import Group, Prompt, Sample, Sampling, fill_in

STATUS = Path("/proc/self/status")


def peak() -> int:
    """VmHWM: the most that was resident since the process began."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def prompt(number: int, tokens: int) -> Prompt:
    ids = np.random.default_rng(number).integers(5, 300, tokens).astype(np.int32)
    return Prompt(number, number, 0, "", "", ids, {})


def groups(config: RunConfig, step: int, prompt_tokens: int, completion: int) -> list[Group]:
    random, made = np.random.default_rng(step), []
    for number in range(config.loop.groups_per_step):
        samples = []
        for index in range(config.algorithm.samples_per_prompt):
            samples.append(
                Sample(
                    index=index,
                    token_ids=random.integers(5, 300, completion).astype(np.int32),
                    loss_mask=np.ones(completion, np.bool_),
                    text="",
                    finish_reason="length",
                    behavior_logprobs=np.full(completion, -9.0, np.float32),
                    versions=np.full(completion, step, np.int32),
                    sampling=Sampling(1.0, 1.0, 0, completion),
                    seed=index,
                    scores={"reward": float(random.normal())},
                    tokens={},
                )
            )
        made.append(Group(prompt(number, prompt_tokens), tuple(samples), "policy"))
    return made


def train(config: RunConfig, prompt_tokens: int, completion: int) -> None:
    """Two steps of the trainer, published each: the second has AdamW's moments beside its passes."""
    from rlhf.algorithms.table import build
    from rlhf.learner.learner import PolicyLearner

    learner = PolicyLearner(config, build(config.algorithm), 0, 1, None)
    learner.setup()
    for step in range(2):
        sampled = groups(config, step, prompt_tokens, completion)
        sampled = fill_in(sampled, learner.annotate_share(sampled))
        learner.update(learner.prepare(sampled))
        learner.publish()


def publish(config: RunConfig, file: Path) -> None:
    """A version of the model, for an engine in another process."""
    from rlhf.models.load import load_model
    from rlhf.models.policy import PolicyModel, probe_inputs
    from rlhf.weights import Probe, pack, probe_ids

    model = PolicyModel(load_model(config.model, config.learner.dtype), config.learner.logit_chunk)
    with torch.no_grad():
        logprobs = model(*probe_inputs(model.base.config))[0].numpy().astype(np.float32)
    weights = pack(0, model.base.named_parameters(), Probe(probe_ids(model.base.config.vocab_size), logprobs))
    file.write_bytes(pickle.dumps(weights, protocol=5))


def sample(config: RunConfig, prompt_tokens: int, completion: int) -> None:
    """Two rounds of a rollout engine, which takes weights before each."""
    from rlhf.generation.build import build_generator

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights"
        if os.fork() == 0:
            publish(config, file)
            os._exit(0)
        os.wait()
        with file.open("rb") as stream:
            weights = pickle.load(stream)
    generator = build_generator(config, "rollout-0", 1)
    generator.setup()
    for _ in range(2):
        generator.load(weights)
        prompts = [prompt(number, prompt_tokens) for number in range(config.loop.groups_per_step)]
        settings = Sampling(1.0, 1.0, 0, completion)
        list(generator.generate(prompts, settings, config.algorithm.samples_per_prompt, "train"))
    generator.close()


def main() -> None:
    order: dict[str, Any] = json.loads(sys.argv[1])
    config = RunConfig.model_validate(order["config"])
    torch.set_num_threads(1)
    work = {"trainer": train, "rollout": sample}[order["role"]]
    work(config, order["prompt"], order["completion"])
    print(json.dumps({"peak": peak()}))


main()
