"""Helpful answers, stage by stage: a reward model, one SFT start, then DPO, RSO and RLOO for the same time each.

    python -m examples.helpful.stages data --pairs FILE   # JSONL: prompt, chosen, rejected; split by prompt
    python -m examples.helpful.stages reward_model        # accuracy on held-out pairs, beside "the longer wins"
    python -m examples.helpful.stages sft
    python -m examples.helpful.stages dpo | rso | rloo    # each ends after --minutes of training
    python -m examples.helpful.stages table               # reward, KL, length, win rate on held-out prompts

Every stage may be interrupted; the same command goes on with it. The budget of a policy is wall time on one machine:
the minutes used are kept in minutes.json, over interruptions."""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

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
    parser.add_argument("--minutes", type=float, default=60.0, help="training time of a policy; 0: to the last step")
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
        train(root, arguments.stage, settings, arguments.minutes)
        export(root, arguments.stage, root / f"{arguments.stage}-policy")
    else:
        trained = [name for name in POLICIES if (root / f"{name}-policy").exists()]
        print(evaluate.table(root, trained))


def call(*words: str) -> None:
    subprocess.run([*RLHF, *words], check=True)


def train(root: Path, stage: str, settings: Sequence[str], minutes: float) -> None:
    """`rlhf run` of a stage, ended by an interrupt, which saves its state, when its minutes are used up."""
    run_dir, clock = root / stage, root / stage / "minutes.json"
    used = json.loads(clock.read_text())["minutes"] if clock.exists() else 0.0
    if minutes and used >= minutes:
        print(f"{stage} has used its {minutes:g} minutes")
        return
    command = [*RLHF, "run", str(HERE / f"{stage}.yaml"), f"data.path={root / 'data' / 'train.jsonl'}", *settings]
    began = time.monotonic()
    process = subprocess.Popen([*command, "--run-dir", str(run_dir)])
    try:
        code = process.wait(timeout=60 * (minutes - used) if minutes else None)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        code = process.wait()
    finally:
        if run_dir.exists():
            clock.write_text(json.dumps({"minutes": used + (time.monotonic() - began) / 60}))
    if code not in (0, INTERRUPTED):
        sys.exit(code)


def export(root: Path, stage: str, to: Path) -> None:
    """The model of a stage's newest checkpoint; an older export makes way."""
    if to.exists():
        shutil.rmtree(to)
    call("export", str(root / stage), "--to", str(to))


if __name__ == "__main__":
    main()
