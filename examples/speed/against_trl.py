"""RLOO here and in TRL, one after the other on the same machine: seconds a step and tokens a second.

    python -m examples.speed.against_trl                 # SmolLM2-135M, 8 prompts x 4 answers of up to 96 tokens a step
    python -m examples.speed.against_trl --model tiny --rounds 3

Same model, prompts, reward function, batch, lengths, learning rate, KL, and count of threads. They take turns for
`--rounds` rounds, each in a process of its own; the first `WARM_UP` steps of each are left out. Answers differ, so
seconds are also given per sampled token. Start-up, checkpoints and evaluation are not part of a step."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

EXAMPLES = Path(__file__).parents[1]
WARM_UP = 2
GROUPS, SAMPLES, LR, KL, PROMPT_TOKENS = 8, 4, 1e-5, 0.01, 64
IN_PROCESS = {"generation": {"engine": "transformers"}, "learner": {"engine": "torch"}}
ON_RAY = {"generation": {"engine": "vllm", "cache_gib": 1.0}, "learner": {"engine": "deepspeed", "zero_stage": 2}}


class Step(NamedTuple):
    """How long it took, and the tokens that were sampled for it."""

    seconds: float
    tokens: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/speed"), help="where everything is kept")
    parser.add_argument("--model", default="smollm2", choices=["smollm2", "tiny"])
    parser.add_argument("--tokens", type=at_least_one, default=96, help="longest answer")
    parser.add_argument("--steps", type=at_least_one, default=6, help="steps of each that count")
    parser.add_argument("--rounds", type=at_least_one, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)  # this process is TRL's: where its steps go
    arguments = parser.parse_args()
    if arguments.trl is not None:
        train_with_trl(arguments)
        return
    root: Path = arguments.root.resolve()
    found: dict[str, list[Step]] = {}
    for turn in range(arguments.rounds):
        folder = root / f"{arguments.model}-{arguments.tokens}-{arguments.dtype}-{turn}-{time.strftime('%H%M%S')}"
        folder.mkdir(parents=True)
        found.setdefault("TRL", []).extend(trl(arguments, folder))
        found.setdefault("in one process", []).extend(rlhf(arguments, folder, IN_PROCESS, ["--in-process"]))
        found.setdefault("Ray, vLLM, DeepSpeed", []).extend(rlhf(arguments, folder, ON_RAY, []))
    text = table(found)
    (root / f"{arguments.model}-{arguments.tokens}-{arguments.dtype}.md").write_text(text + "\n")
    print(text)


def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {number}")
    return number


def table(found: dict[str, list[Step]]) -> str:
    """Medians over all steps that count, as a Markdown table; ratios are TRL's seconds by the others'."""
    lines = ["| | steps | s a step, median | min to max | tokens a step | tokens/s | TRL's s/token over this |"]
    lines.append("|---" * 7 + "|")
    each = {name: [step.seconds / step.tokens for step in steps] for name, steps in found.items()}
    for name, steps in found.items():
        seconds = sorted(step.seconds for step in steps)
        per_token = statistics.median(each[name])
        times = f"{statistics.median(seconds):.2f} | {seconds[0]:.2f} to {seconds[-1]:.2f}"
        tokens = f"{statistics.mean(step.tokens for step in steps):.0f} | {1 / per_token:.0f}"
        lines.append(
            f"| {name} | {len(steps)} | {times} | {tokens} | {statistics.median(each['TRL']) / per_token:.2f} |"
        )
    return "\n".join(lines)


def prompts() -> list[str]:
    rows = (EXAMPLES / "data" / "prompts.jsonl").read_text().splitlines()
    return [json.loads(row)["prompt"] for row in rows]


def rlhf(arguments: argparse.Namespace, folder: Path, engines: dict[str, Any], flags: Sequence[str]) -> list[Step]:
    """A run of this project, read from its metrics."""
    name = "in-process" if flags else "ray"
    settings: dict[str, Any] = {
        "seed": 0,
        "model": {"name": arguments.model},
        "algorithm": {"name": "rloo", "samples_per_prompt": SAMPLES, "kl": {"coef": KL}},
        "data": {"path": str(EXAMPLES / "data" / "prompts.jsonl"), "max_prompt_tokens": PROMPT_TOKENS},
        "loop": {"num_steps": arguments.steps + WARM_UP, "groups_per_step": GROUPS, "checkpoint_every": 0},
        "generation": engines["generation"] | {"max_new_tokens": arguments.tokens},
        "learner": engines["learner"] | {"lr": LR, "dtype": arguments.dtype, "tokens_per_microbatch": 8192},
        "reward": {"function": f"{EXAMPLES / 'rewards' / 'positivity.py'}:positivity"},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "rlhf.cli.main", "run", str(folder / f"{name}.yaml"), *flags]
    subprocess.run([*command, "--run-dir", str(folder / name)], check=True)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    samples = GROUPS * SAMPLES
    return [Step(row["time/step_s"], row["completion/length_mean"] * samples) for row in rows[WARM_UP:]]


def trl(arguments: argparse.Namespace, folder: Path) -> list[Step]:
    """The same in TRL, in a process of its own."""
    to = folder / "trl.json"
    settings = [f"--{name}={vars(arguments)[name]}" for name in ("model", "tokens", "steps", "dtype")]
    subprocess.run([sys.executable, "-m", "examples.speed.against_trl", *settings, "--trl", str(to)], check=True)
    return [Step(*step) for step in json.loads(to.read_text())][WARM_UP:]


def train_with_trl(arguments: argparse.Namespace) -> None:
    """TRL's RLOOTrainer, with a clock at the end of each of its steps."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    from examples.rewards.positivity import positivity
    from rlhf.models.resolve import resolve

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    folder = resolve(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    steps: list[Step] = []

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.began = 0.0

        def on_step_begin(self, *given: Any, **more: Any) -> None:
            """The first batch is sampled after the first of these."""
            self.began = self.began or time.monotonic()

        def on_log(self, _settings: Any, _state: Any, _control: Any, logs: dict[str, float], **more: Any) -> None:
            if "completions/mean_length" in logs:
                now = time.monotonic()
                steps.append(Step(now - self.began, logs["completions/mean_length"] * GROUPS * SAMPLES))
                self.began = now

    settings = RLOOConfig(
        output_dir=str(arguments.trl.parent / "trl"),
        use_cpu=not torch.cuda.is_available(),
        bf16=arguments.dtype == "bfloat16",
        gradient_checkpointing=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        max_steps=arguments.steps + WARM_UP,
        per_device_train_batch_size=GROUPS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=arguments.tokens,
        temperature=1.0,
        beta=KL,
        learning_rate=LR,
        lr_scheduler_type="constant",
        seed=0,
    )
    asked = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts()]

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        return positivity(prompts, [answer[0]["content"] for answer in completions])

    RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list(asked),
        processing_class=tokenizer,
        callbacks=[Clock()],
    ).train()
    arguments.trl.write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
