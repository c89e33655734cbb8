"""`rlhf data pairs`: preference pairs from a policy and a judge, in the columns that `rlhf run` and TRL read.

The policy of a run file answers prompts, its reward scores the answers, and a pairing compares them. Answers and scores
are in a run directory before anything is written, so a command that was killed goes on with what it had.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.blueprint import draw
from rlhf.buffer.audit import ExperienceView
from rlhf.buffer.schema import FILE_NAME
from rlhf.cli.exit_codes import DONE, INTERRUPTED
from rlhf.cli.ownership import check_actors_is_ours
from rlhf.cli.preflight import check_cheaply, check_prompts
from rlhf.cli.run_directory import check_directory, settled
from rlhf.cluster import Cluster
from rlhf.config import LoopConfig, RunConfig
from rlhf.config_file import load_cluster, load_run
from rlhf.errors import BadInput
from rlhf.experience import REWARD, Group
from rlhf.observers import replace_durably
from rlhf.sources import Interrupted
from rlhf.team import Order, Prompts

PAIRINGS = ("best_worst", "all", "first_round", "tournament")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="run file of an algorithm that samples (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the file's")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="file for the pairs (.jsonl)")
    parser.add_argument("--prompts", type=int, metavar="N", help="how many prompts; without it: one epoch of the data")
    parser.add_argument("--pairing", choices=PAIRINGS, default="best_worst", help="which answers are compared")
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="cluster file (YAML); without one: this machine")
    parser.add_argument("--in-process", action="store_true", help="the whole team in this process, without Ray")
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="where answers and scores are kept (default: FILE.run)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    config = load_run(arguments.config, arguments.overrides)
    cluster = Cluster() if arguments.cluster is None else load_cluster(arguments.cluster, [])
    run_dir: Path = arguments.run_dir or arguments.to.with_name(arguments.to.name + ".run")
    _check(config, arguments.to, arguments.prompts)
    if not arguments.in_process:
        check_actors_is_ours()
    check_directory(run_dir, config, "pairs", fresh=False)
    check_cheaply(config, cluster)
    prompts = check_prompts(config)
    count: int = arguments.prompts or len(prompts)
    try:
        with settled(run_dir, config, cluster, "pairs", fresh=False):
            groups = judged_groups(config, cluster, run_dir, prompts, count, in_process=arguments.in_process)
    except Interrupted:
        return INTERRUPTED
    from rlhf.data.pairs import pairs_from

    rows, found = pairs_from(groups, arguments.pairing, config.seed)
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(arguments.to, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    dropped = ExperienceView(run_dir / FILE_NAME).overview().drop_reasons
    told = {"file": str(arguments.to), "prompts": len(groups), **found, "dropped": dict(dropped)}
    print(json.dumps(told) if arguments.json else _in_words(told))
    return DONE


def judged_groups(
    config: RunConfig, cluster: Cluster, run_dir: Path, prompts: Prompts, count: int, *, in_process: bool
) -> list[Group]:
    """`count` groups of the policy as it is, scored, by prompt id; those that the directory holds are not made again.

    A group that cannot be judged is replaced by that of a later prompt. Raises Interrupted, and what the team raises.
    """
    from rlhf.cli import launch
    from rlhf.cli.stop import StopRequest

    # Nothing is trained, so nothing ages: every prompt may be answered at once.
    loop = config.loop.model_dump() | {"num_steps": count, "groups_per_step": 1, "max_staleness": count - 1}
    blueprint = replace(
        draw(config.model_copy(update={"loop": LoopConfig(**loop)})),
        judged=frozenset({REWARD}),
        reference_judge=False,
        learner_annotates=False,
    )
    stop = StopRequest()
    restarts = launch.Restarts(config.loop.max_restarts, print)
    order = Order(blueprint, cluster, run_dir.absolute(), prompts, None, 0, stop, print, restarts.count)
    launch.gather(order, stop, in_process=in_process)
    view = ExperienceView(run_dir / FILE_NAME)
    return [group for group, state, _ in view.stored() if state == "complete"][:count]


def _check(config: RunConfig, to: Path, count: int | None) -> None:
    if config.records != "prompts":
        raise BadInput(
            f"algorithm.name={config.algorithm.name} learns from {config.records} and samples nothing; expected the "
            "run file of an algorithm that samples, such as rloo or online_dpo"
        )
    if config.algorithm.samples_per_prompt < 2:
        raise BadInput("algorithm.samples_per_prompt=1: a pair needs two answers; expected 2 or more")
    if count is not None and count < 1:
        raise BadInput(f"--prompts {count}: expected 1 or more")
    if to.suffix != ".jsonl" or to.is_dir():
        raise BadInput(f"--to {to}: expected a file that ends in .jsonl")


def _in_words(told: dict[str, Any]) -> str:
    lines = [f"{told['file']}: {told['made']} pairs of {told['prompts']} prompts"]
    reasons = {"ties": "equal scores", "identical": "equal answers", "empty": "an answer without a token"}
    lines += [f"no pair: {told[name]} comparisons ({reason})" for name, reason in reasons.items() if told[name]]
    return "\n".join(lines + [f"left out: {count} prompts ({reason})" for reason, count in told["dropped"].items()])
