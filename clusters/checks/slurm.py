"""Rules for the Slurm script: how it starts, its token, how it ends, and whether its nodes hold the cluster file."""

import re
from collections.abc import Iterator, Mapping

from clusters.checks.commands import cluster_file, run_command
from clusters.checks.documents import Fault
from clusters.checks.places import Kind, missing_room
from clusters.checks.scripts import ray_nodes, syntax, without_comments

OPTION = re.compile(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", re.MULTILINE)
KNOWN = {
    "job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "mem", "exclusive", "time", "signal",
    "requeue", "open-mode", "output", "partition", "account", "qos", "constraint",
}  # fmt: skip
NUMBERS = ("nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node")
# Lines without which a part of the script's promise is not kept.
PROMISES = {
    "umask 077": "files must be the user's own from the start",
    "chmod 600": "the token must be the user's own",
    "RAY_AUTH_MODE=token": "tokens are off",
    "RAY_AUTH_TOKEN_PATH=": "the token belongs in a file, not on a command line",
    "scontrol requeue": "a run that was interrupted must be queued again",
}
DEFAULT_CLUSTER = re.compile(r"^cluster=\$\{CLUSTER:-(\S+)\}$", re.MULTILINE)
# The script's arguments, as in the example at its top.
EXAMPLE = {"config": "configs/rloo_smollm2.yaml", "run_dir": "/shared/runs/rloo_smollm2", "@": ""}


def faults(text: str) -> Iterator[Fault]:
    yield from syntax("(script)", text)
    options = dict(OPTION.findall(text))
    yield from _options(text, options)
    code = without_comments(text)
    for line, why in PROMISES.items():
        if line not in code:
            yield Fault("(script)", f"`{line}` is missing: {why}")
    if not re.search(r"^trap \w+ TERM$", code, re.MULTILINE):
        yield Fault("(script)", "`trap ... TERM` is missing: the run would not be told that its time is up")
    named = DEFAULT_CLUSTER.search(code)
    if named is None:
        yield Fault("(script)", "cluster=${CLUSTER:-FILE} is missing: no cluster file is named")
        return
    yield from run_command("(script)", code, {**EXAMPLE, "cluster": named[1]}, None)
    yield from _room(code, named[1], {name: options.get(name, "") for name in NUMBERS})


def _options(text: str, options: Mapping[str, str]) -> Iterator[Fault]:
    for line in re.findall(r"^#SBATCH.*$", text, re.MULTILINE):
        if not OPTION.fullmatch(line):
            yield Fault("#SBATCH", f"`{line}`: expected #SBATCH --name=value")
    for name in options.keys() - KNOWN:
        yield Fault(f"#SBATCH --{name}", "unknown option")
    for name in NUMBERS:
        if not options.get(name, "").isdecimal():
            yield Fault(f"#SBATCH --{name}", f"found {options.get(name)!r}; expected a whole number")
    if not options.get("signal", "").startswith("B:TERM@"):
        yield Fault("#SBATCH --signal", f"found {options.get('signal')!r}; expected B:TERM@SECONDS, to save in time")
    if "requeue" not in options:
        yield Fault("#SBATCH --requeue", "is missing: a run whose time is up would not go on")


def _room(code: str, name: str, numbers: Mapping[str, str]) -> Iterator[Fault]:
    """Whether the nodes hold the cluster file."""
    head, others, wrong = ray_nodes("(script)", code)
    yield from wrong
    cluster, _ = cluster_file("(script)", name)  # a missing one is a fault of the command
    if cluster is None or wrong or not all(number.isdecimal() for number in numbers.values()):
        return
    machine = {"CPU": float(numbers["cpus-per-task"]), "GPU": float(numbers["gpus-per-node"])}
    kinds = [
        Kind("first node", {**machine, **head}, 1),
        Kind("other nodes", {**machine, **others}, max(0, int(numbers["nodes"]) - 1)),
    ]
    for fault in missing_room(cluster, kinds):
        yield Fault("#SBATCH --nodes", f"{name}: {fault.field}: {fault.text}")
