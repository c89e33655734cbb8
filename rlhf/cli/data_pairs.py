"""`rlhf data pairs`: preference pairs from a policy and a judge, in the columns that `rlhf run` and TRL read.

The policy of a run file answers prompts, its reward scores the answers, and a pairing compares them. Answers and scores
are in a run directory before anything is written, so a command that was killed goes on with what it had.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.blueprint import draw
from rlhf.buffer.audit import ExperienceView
from rlhf.buffer.schema import FILE_NAME
from rlhf.cli.exit_codes import DONE, INTERRUPTED
from rlhf.cli.folders import writing
from rlhf.cli.ownership import check_actors_is_ours
from rlhf.cli.preflight import check_cheaply, check_prompts
from rlhf.cli.run_directory import check_directory, settled
from rlhf.cluster import Cluster
from rlhf.config import LoopConfig, RunConfig
from rlhf.config_file import load_cluster, load_run
from rlhf.durable import append_durably, read_jsonl, replace_durably
from rlhf.errors import BadInput
from rlhf.experience import REWARD, Group
from rlhf.sources import Interrupted
from rlhf.team import Order, Prompts

WRITTEN_FILE = "written.jsonl"  # in the run directory: checksums of the files that came out of it
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
    _check(config, arguments.prompts)
    if not arguments.in_process:
        check_actors_is_ours()
    check_directory(run_dir, config, "pairs", fresh=False)
    check_cheaply(config, cluster)
    check_target(arguments.to, arguments.config, config, run_dir)
    prompts = check_prompts(config)
    count: int = arguments.prompts or len(prompts)
    # With --json standard output is the one object and nothing else.
    note = partial(print, file=sys.stderr if arguments.json else sys.stdout)
    try:
        with settled(run_dir, config, cluster, "pairs", fresh=False) as moved:
            for line in moved:
                note(line)
            groups = judged_groups(config, cluster, run_dir, prompts, count, note, in_process=arguments.in_process)
    except Interrupted:
        return INTERRUPTED
    from rlhf.data.pairs import pairs_from

    rows, found = pairs_from(groups, arguments.pairing, config.seed)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with writing("--to", arguments.to):
        arguments.to.parent.mkdir(parents=True, exist_ok=True)
        # Before the file itself, or one of a command that was killed in between would be taken for somebody else's.
        append_durably(run_dir / WRITTEN_FILE, {"sha256": hashlib.sha256(text.encode()).hexdigest()})
        replace_durably(arguments.to, text)
    dropped = ExperienceView(run_dir / FILE_NAME).overview().drop_reasons
    told = {"file": str(arguments.to), "prompts": len(groups), **found, "dropped": dict(dropped)}
    print(json.dumps(told) if arguments.json else _in_words(told))
    return DONE


def judged_groups(
    config: RunConfig,
    cluster: Cluster,
    run_dir: Path,
    prompts: Prompts,
    count: int,
    note: Callable[[str], None],
    *,
    in_process: bool,
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
    restarts = launch.Restarts(config.loop.max_restarts, note)
    order = Order(blueprint, cluster, run_dir.absolute(), prompts, None, 0, stop, note, restarts.count)
    launch.gather(order, stop, in_process=in_process)
    view = ExperienceView(run_dir / FILE_NAME)
    return [group for group, state, _ in view.stored() if state == "complete"][:count]


def check_target(to: Path, run_file: Path, config: RunConfig, run_dir: Path) -> None:
    """Raises BadInput unless `to` can be written and takes nothing away: it is new, or as this run directory left it,
    and is not what the run reads."""
    if to.suffix != ".jsonl" or to.is_dir():
        raise BadInput(f"--to {to}: expected a file that ends in .jsonl")
    with writing("--to", to):
        above = next(folder for folder in to.absolute().parents if folder.exists())
        if not above.is_dir():
            raise BadInput(f"--to {to}: {above} is a file; expected a folder, or nothing")
        place, exists = to.resolve(), to.exists()
    read = {"the run file": str(run_file), "data.path": config.data.path}
    read |= {} if config.mix is None else {"mix.data.path": config.mix.data.path}
    for what, path in read.items():
        if Path(path).exists() and place.is_relative_to(Path(path).resolve()):
            raise BadInput(f"--to {to}: would overwrite or change {what}, {path}; expected another file")
    if place.is_relative_to(run_dir.resolve()):
        raise BadInput(f"--to {to}: is inside --run-dir {run_dir}; expected a file outside")
    if not exists:
        return
    ours = {row["sha256"] for row in read_jsonl(run_dir / WRITTEN_FILE)}
    if hashlib.sha256(to.read_bytes()).hexdigest() not in ours:
        raise BadInput(
            f"--to {to}: exists already, and is not as this command wrote it with --run-dir {run_dir}; expected a new "
            "file. Next: another --to, or move it away"
        )


def _check(config: RunConfig, count: int | None) -> None:
    if config.records != "prompts":
        raise BadInput(
            f"algorithm.name={config.algorithm.name} learns from {config.records} and samples nothing; expected the "
            "run file of an algorithm that samples, such as rloo or online_dpo"
        )
    if config.algorithm.samples_per_prompt < 2:
        raise BadInput("algorithm.samples_per_prompt=1: a pair needs two answers; expected 2 or more")
    if count is not None and count < 1:
        raise BadInput(f"--prompts {count}: expected 1 or more")


def _in_words(told: dict[str, Any]) -> str:
    lines = [f"{told['file']}: {told['made']} pairs of {told['prompts']} prompts"]
    reasons = {"ties": "equal scores", "identical": "equal answers", "empty": "an answer without a token"}
    lines += [f"no pair: {told[name]} comparisons ({reason})" for name, reason in reasons.items() if told[name]]
    return "\n".join(lines + [f"left out: {count} prompts ({reason})" for reason, count in told["dropped"].items()])
