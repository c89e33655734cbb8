"""`rlhf plan`: placement, batch arithmetic, memory by role and time by phase of a run, without starting anything."""

import argparse
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf.cli.exit_codes import DONE, NO_CAPACITY
from rlhf.cli.plan_text import in_words
from rlhf.cli.preflight import check_settings, config_of
from rlhf.cluster import Cluster, Role
from rlhf.cluster import this_machine as whole_machine
from rlhf.config import PpoConfig, RunConfig
from rlhf.config_file import load_cluster, load_run
from rlhf.config_section import Dtype
from rlhf.data.conversations import content_of
from rlhf.data.examples import read_examples
from rlhf.data.prompts import key_of
from rlhf.data.records import load_rows
from rlhf.errors import BadInput
from rlhf.planning.batches import DataSize, Lengths
from rlhf.planning.devices import GPUS, Device, gpu, this_machine
from rlhf.planning.plan import Given, Models, Plan, make_plan
from rlhf.planning.shapes import Shape, shape_of

GIGABIT = 1e9 / 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="run file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the file's")
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="cluster file (YAML); without one: this machine")
    parser.add_argument("--gpu", metavar="NAME", help=f"the GPU of roles that have one: {', '.join(GPUS)}")
    parser.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="length of a prompt; default: data.max_prompt_tokens"
    )
    parser.add_argument(
        "--completion-tokens",
        type=int,
        metavar="N",
        help="length of a completion on average; default: the longest, generation.max_new_tokens or "
        "data.max_completion_tokens",
    )
    parser.add_argument(
        "--network-gbit", type=float, metavar="N", help="speed between nodes; without it: all roles on one node"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object; see docs/plan.md")


def run(arguments: argparse.Namespace) -> int:
    config = load_run(arguments.config, arguments.overrides)
    cores = os.cpu_count() or 1
    cluster = whole_machine(cores) if arguments.cluster is None else load_cluster(arguments.cluster, [])
    device = _gpu(arguments.gpu, cluster)
    lengths = _lengths(config, arguments.prompt_tokens, arguments.completion_tokens)
    if arguments.network_gbit is not None and not 0 < arguments.network_gbit < math.inf:
        raise BadInput(f"--network-gbit {arguments.network_gbit:g}: expected a speed above 0")
    models = _models(config)
    check_settings(config, cluster)
    given = Given(
        config=config,
        cluster=cluster,
        models=models,
        lengths=lengths,
        data=data_to_train_on(config),
        machine=this_machine(),
        gpu=device,
        network=None if arguments.network_gbit is None else arguments.network_gbit * GIGABIT,
    )
    plan = make_plan(given)
    print(json.dumps(as_json(given, plan)) if arguments.json else in_words(given, plan))
    return NO_CAPACITY if plan.problems else DONE


def data_to_train_on(config: RunConfig) -> DataSize:
    """Rows of an epoch: all but the held-out prompts and what cannot be learnt from. Raises BadInput when none is left.

    No tokenizer is loaded, so that rows over the limits on length are counted."""
    records, answers = load_rows(config.data), 1
    if config.records == "prompts":
        keys = [key_of(content_of(record, config.data.prompt_column)) for record in records]
    else:
        examples, _ = read_examples(records, config.data, config.records)
        keys = [key_of(example.content) for example in examples]
        answers = max(1, *(len(example.answers) for example in examples))
    heldout = set(sorted(set(keys))[: config.data.heldout])
    left = sum(key not in heldout for key in keys)
    if not left:
        raise BadInput(
            f"data.heldout={config.data.heldout} leaves nothing to train on: {config.data.path} has {len(set(keys))} "
            "distinct prompts"
        )
    return DataSize(left, answers)


def as_json(given: Given, plan: Plan) -> dict[str, Any]:
    """The plan as plain values. Names are stable; sizes in bytes, times in seconds."""
    shape = given.models.policy
    return {
        "model": {
            "name": given.config.model.name,
            "family": shape.family,
            "parameters": shape.parameters,
            "cache_bytes_per_token": 2 * shape.cached_values,
        },
        "lengths": asdict(given.lengths),
        "placement": [
            {
                "role": placed.role,
                "replicas": placed.replicas,
                "needed": placed.needed,
                "takes": dict(placed.takes),
                "threads": placed.threads,
                "processes": placed.processes,
                "together": placed.together,
                "shares_with": list(placed.shares_with),
            }
            for placed in plan.placement
        ],
        "demand": dict(plan.demand),
        "batches": asdict(plan.batches),
        "memory": [asdict(role) for role in plan.memory],
        "turns": [asdict(turn) for turn in plan.turns],
        "published_bytes": plan.published,
        "object_store_bytes": plan.object_store,
        "update_flops": plan.update_flops,
        "time": asdict(plan.time),
        "devices": {name: asdict(device) for name, device in _devices(given, plan).items()},
        "problems": list(plan.problems),
        "fits": not plan.problems,
    }


def _devices(given: Given, plan: Plan) -> Mapping[str, Device]:
    return {placed.role: given.device_of(placed.settings) for placed in plan.placement}


def _gpu(name: str | None, cluster: Cluster) -> Device | None:
    """The GPU of the roles that have one. Raises BadInput when it is not said, or said for nobody."""
    roles: dict[str, Role] = {"trainer": cluster.trainer, "critic": cluster.critic, "rollout": cluster.rollout}
    roles |= {"reference": cluster.reference, "reward": cluster.reward, "buffer": cluster.buffer}
    with_gpus = [f"{key}.gpus={role.gpus:g}" for key, role in roles.items() if role.gpus]
    if name is None and with_gpus:
        raise BadInput(
            f"cluster file: {', '.join(with_gpus)}, but which GPU is not said; expected --gpu NAME, one of "
            f"{', '.join(GPUS)}"
        )
    if name is None:
        return None
    device = gpu(name)
    if not with_gpus:
        raise BadInput(f"--gpu {name} would do nothing: the cluster file gives no role a GPU (such as trainer.gpus: 1)")
    return device


def _lengths(config: RunConfig, prompt: int | None, completion: int | None) -> Lengths:
    """Where nothing is said, the limits of the run file. Raises BadInput for lengths beyond them."""
    generation, data = config.generation, config.data
    key, longest = "data.max_completion_tokens", data.max_completion_tokens
    if generation is not None:
        key, longest = "generation.max_new_tokens", generation.max_new_tokens
    limits = {
        "--prompt-tokens": (prompt, data.max_prompt_tokens, "data.max_prompt_tokens"),
        "--completion-tokens": (completion, longest, key),
    }
    for option, (said, limit, name) in limits.items():
        if said is not None and not 1 <= said <= limit:
            raise BadInput(f"{option} {said}: expected 1 to {name}={limit}")
    return Lengths(prompt or data.max_prompt_tokens, completion or longest, longest)


def _models(config: RunConfig) -> Models:
    policy = _shape(config.model.name, "model.name")
    critic = None
    if isinstance(config.algorithm, PpoConfig):
        init = config.algorithm.critic.init
        critic = policy if init == "policy" else _shape(init, "algorithm.critic.init")
    judges: dict[str, tuple[Shape, Dtype]] = {}
    for key, source in config.reward.sources().items() if config.reward is not None else ():
        if source.model is not None:
            judges[f"{key}.model"] = (_shape(source.model, f"{key}.model"), source.dtype)
        if source.ranker is not None:
            judges[f"{key}.ranker"] = (_shape(source.ranker.model, f"{key}.ranker.model"), source.dtype)
    return Models(policy, critic, judges)


def _shape(name: str, key: str) -> Shape:
    try:
        return shape_of(config_of(name), f"{key}: {name}")
    except BadInput as error:
        raise BadInput(str(error).replace("model.name", key)) from error
