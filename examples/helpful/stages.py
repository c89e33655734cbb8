"""Helpful answers, stage by stage: a reward model, one SFT start, then DPO, RSO and RLOO for the same CPU time each.

    python -m examples.helpful.stages data --pairs FILE   # JSONL: prompt, chosen, rejected; split by prompt
    python -m examples.helpful.stages reward_model        # accuracy on held-out pairs, beside "the longer wins"
    python -m examples.helpful.stages sft
    python -m examples.helpful.stages dpo | rso | rloo    # each ends after --cpu-minutes of training
    python -m examples.helpful.stages table               # reward, KL, length, win rate on held-out prompts

Every stage may be interrupted; the same command goes on with it. The budget of a policy is the CPU time of all
processes of its run, start and sampling included, so that other work on the machine does not eat into it: it is
counted in used.json, over interruptions."""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from . import evaluate

HERE = Path(__file__).parent
POLICIES = ("dpo", "rso", "rloo")
RLHF = (sys.executable, "-m", "rlhf.cli.main")
INTERRUPTED = 130


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["data", "reward_model", "sft", *POLICIES, "table"])
    parser.add_argument("--root", type=Path, default=Path("runs/helpful"), help="where everything is kept")
    parser.add_argument("--pairs", help="with `data`: the preference pairs")
    parser.add_argument("--heldout", type=int, default=100, help="with `data`: prompts set aside")
    parser.add_argument("--cpu-minutes", type=float, default=60.0, help="budget of a policy; 0: to the last step")
    parser.add_argument("--model", default="smollm2", help="the model that all start from (`tiny` for a trial)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="passed on to `rlhf run`")
    arguments = parser.parse_intermixed_args()
    root: Path = arguments.root.resolve()
    if arguments.stage == "data":
        if arguments.pairs is None:
            parser.error("data needs --pairs FILE")
        split = ("data", "split", arguments.pairs, "--to", str(root / "data"), "--heldout", str(arguments.heldout))
        call(*split, "--drop-bad-rows")
    elif arguments.stage == "reward_model":
        settings = [f"model.name={arguments.model}", *arguments.settings]
        train(root, "reward_model", settings, 0.0)
        export(root, "reward_model", root / "reward-model")
        print(evaluate.accuracy(root / "reward-model", root / "data" / "test.jsonl", root / "reward_model.json"))
    elif arguments.stage == "sft":
        train(root, "sft", [f"model.name={arguments.model}", *arguments.settings], 0.0)
        export(root, "sft", root / "sft-policy")
    elif arguments.stage in POLICIES:
        settings = [f"model.name={root / 'sft-policy'}", *arguments.settings]
        if arguments.stage != "dpo":
            settings.append(f"reward.model={root / 'reward-model'}")
        train(root, arguments.stage, settings, arguments.cpu_minutes)
        export(root, arguments.stage, root / f"{arguments.stage}-policy")
    else:
        trained = [name for name in POLICIES if (root / f"{name}-policy").exists()]
        print(evaluate.table(root, trained))


def call(*words: str) -> None:
    subprocess.run([*RLHF, *words], check=True)


def train(root: Path, stage: str, settings: Sequence[str], cpu_minutes: float) -> None:
    """`rlhf run` of a stage, ended by an interrupt, which saves its state, when its CPU time is used up."""
    run_dir, kept = root / stage, root / stage / "used.json"
    before = json.loads(kept.read_text()) if kept.exists() else {"cpu_minutes": 0.0, "minutes": 0.0}
    if cpu_minutes and before["cpu_minutes"] >= cpu_minutes:
        print(f"{stage} has used its {cpu_minutes:g} CPU minutes")
        return
    command = [*RLHF, "run", str(HERE / f"{stage}.yaml"), f"data.path={root / 'data' / 'train.jsonl'}", *settings]
    began = time.monotonic()
    process = subprocess.Popen([*command, "--run-dir", str(run_dir)])
    used: dict[int, float] = {}
    try:
        while (code := ended(process)) is None:
            used |= cpu_seconds(process.pid)
            if cpu_minutes and before["cpu_minutes"] + sum(used.values()) / 60 >= cpu_minutes:
                process.send_signal(signal.SIGINT)
                code = process.wait()
                break
    finally:
        if run_dir.exists():
            now = {"cpu_minutes": sum(used.values()) / 60, "minutes": (time.monotonic() - began) / 60}
            kept.write_text(json.dumps({name: before[name] + now[name] for name in now}))
    if code not in (0, INTERRUPTED):
        sys.exit(code)


def ended(process: "subprocess.Popen[bytes]") -> int | None:
    """The exit code, or None after a second in which the process did not end."""
    try:
        return process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return None


def cpu_seconds(root: int) -> dict[int, float]:
    """CPU seconds of a process and of all that descend from it, by process id. One that is gone is left out: who
    asks often keeps what it had last."""
    found = {}
    with suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(root), *psutil.Process(root).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                found[process.pid] = times.user + times.system
    return found


def export(root: Path, stage: str, to: Path) -> None:
    """The model of a stage's newest checkpoint; an older export makes way."""
    if to.exists():
        shutil.rmtree(to)
    call("export", str(root / stage), "--to", str(to))


if __name__ == "__main__":
    main()
