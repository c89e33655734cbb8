"""The worlds of a comparison on disk, and the runs in them: each is an ordinary `rlhf run` in this process.

A world is one seed's prompts, demonstrations, start (SFT), noisy pairs and reward model. What is finished stays: a
second call finds it and goes on behind it.
"""

import contextlib
import fcntl
import json
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.blueprint import draw, training_sampling
from rlhf.buffer.audit import ExperienceView
from rlhf.buffer.schema import FILE_NAME
from rlhf.cli.main import main as rlhf
from rlhf.config import RunConfig
from rlhf.config_file import load_run
from rlhf.data.prompts import PromptSet
from rlhf.experience import REF_LOGPROBS, REWARD, Group
from rlhf.generation.build import build_generator
from rlhf.judges.reference import ReferenceJudge
from rlhf.judges.reward_model import RewardModelJudge
from rlhf.learner.learner import PolicyLearner
from rlhf.observers import METRICS_FILE, read_jsonl

from . import world

HERE = Path(__file__).parent
ANSWERS = 8  # to each held-out prompt, at temperature 1


@dataclass(frozen=True, slots=True)
class World:
    """Where a seed's files are."""

    folder: Path
    seed: int

    @property
    def train(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def heldout(self) -> Path:
        return self.folder / "heldout.jsonl"

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs.jsonl"

    @property
    def start(self) -> Path:
        return self.folder / "start"

    @property
    def reward_model(self) -> Path:
        return self.folder / "reward_model"


def make_world(root: Path, seed: int) -> World:
    """The world of a seed, made where it is not there yet; `world.json` says how good its start and its reward model
    are."""
    made = World(root / f"world-{seed}", seed)
    made.folder.mkdir(parents=True, exist_ok=True)
    with (made.folder / ".lock").open("w") as lock:  # two comparisons may share a folder of worlds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made.folder / "world.json").exists():
            _make(made)
    return made


def _make(made: World) -> None:
    folder, seed = made.folder, made.seed
    world.write_prompts_and_demonstrations(folder, seed)
    if not (folder / "random" / "config.json").exists():
        world.build_model(folder / "random", seed)
    blank, of_seed = folder / "random", f"seed={seed}"
    told = f"data.path={folder / 'demonstrations.jsonl'}"
    _trained("sft", folder / "sft-run", made.start, [f"model.name={blank}", of_seed, told])
    given = answers(made.start, made.train, 2 * world.PAIRS, seed)
    world.write_rows(made.pairs, world.pairs(_texts(given), seed, "labels"))
    labelled = f"data.path={made.pairs}"
    _trained("reward_model", folder / "reward-run", made.reward_model, [f"model.name={blank}", of_seed, labelled])
    write_json(folder / "world.json", _describe(made))


def run(base: str, folder: Path, overrides: Sequence[str]) -> float:
    """`rlhf run examples/miniature/BASE.yaml OVERRIDES --in-process --run-dir FOLDER`; returns its seconds.

    What it prints is in FOLDER.log. Raises RuntimeError when it does not end well.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    with folder.with_suffix(".log").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        code = rlhf(["run", str(HERE / f"{base}.yaml"), *overrides, "--in-process", "--run-dir", str(folder)])
    if code:
        raise RuntimeError(f"rlhf run ended with {code}; the last lines of {log.name}:\n{_tail(Path(log.name))}")
    return time.process_time() - began


def policy_of(run_dir: Path) -> Path:
    """The folder of the newest checkpoint's policy."""
    return max((run_dir / "checkpoints").iterdir()) / "policy"


def answers(policy: Path, file: Path, count: int, seed: int) -> list[Group]:
    """`count` answers at temperature 1 of a policy to each prompt of a file, by the rollout engine of a run.

    Seeds are addressed by the run's seed, the prompt and the index: two policies that are equal answer alike.
    """
    config = _sampling_run(policy, file, seed)
    learner = PolicyLearner(config, draw(config).algorithm, 0, 1, None)
    learner.setup()
    generator = build_generator(config, "evaluation", 1)
    generator.setup()
    try:
        weights = learner.publish()
        assert weights is not None
        generator.load(weights)
        rows = PromptSet.load(config)
        asked = [rows.prompt(number) for number in range(len(rows))]
        return list(generator.generate(asked, training_sampling(config), count, "evaluate"))
    finally:
        generator.close()
        learner.close()


def measured(made: World, policy: Path) -> dict[str, float]:
    """Held-out answers of a policy, beside those of the start to the same prompts with the same seeds.

    true and learned reward, KL to the start (k1, nats an answer), win rates against the start's answers (a tie is half
    a win), length in words, all means over answers.
    """
    given = judged(made, answers(policy, made.heldout, ANSWERS, made.seed))
    before = _read_json(made.folder / "start_answers.json")
    texts = _texts(given)
    real = {prompt: [world.true_reward(prompt, text) for text in own] for prompt, own in texts.items()}
    learned = {str(group.prompt.content): [float(s.scores[REWARD] or 0.0) for s in group.samples] for group in given}
    return {
        "true": _mean(real.values()),
        "learned": _mean(learned.values()),
        "kl": statistics.fmean(_kl(group) for group in given),
        "true_win_rate": _win_rate(real, before["true"]),
        "learned_win_rate": _win_rate(learned, before["learned"]),
        "words": statistics.fmean(len(text.split()) for own in texts.values() for text in own),
        "unfinished": statistics.fmean(s.finish_reason == "length" for group in given for s in group.samples),
    }


def judged(made: World, groups: Sequence[Group]) -> list[Group]:
    """The groups with the reward model's scores and the start's log-probabilities, by the judges of a run."""
    config = _sampling_run(made.start, made.heldout, made.seed, f"reward.model={made.reward_model}")
    filled = list(groups)
    for judge in (RewardModelJudge(config), ReferenceJudge(config)):
        judge.setup()
        filled = [group.with_columns(judge.judge(group)) for group in filled]
        judge.close()
    return filled


def curve(run_dir: Path) -> list[dict[str, float]]:
    """Each step of an online run: KL, learned and true reward of the samples that it trained on; the last out of the
    experience buffer."""
    real: dict[int, list[float]] = {}
    for group, _, step in ExperienceView(run_dir / FILE_NAME).stored():
        if step is not None:
            prompt = str(group.prompt.content)
            real.setdefault(step, []).extend(world.true_reward(prompt, sample.text) for sample in group.samples)
    return [
        {
            "kl": round(row["kl/k1"], 4),
            "learned": round(row["reward/mean"], 4),
            "true": round(statistics.fmean(real[int(row["step"])]), 4),
        }
        for row in read_jsonl(run_dir / METRICS_FILE)
        if "kl/k1" in row and int(row["step"]) in real
    ]


def discard(run_dir: Path) -> None:
    """Takes a run that was measured off the disk, all but its resolved run file, its metrics and its report."""
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
    for file in run_dir.glob(f"{FILE_NAME}*"):
        file.unlink()


def _trained(base: str, run_dir: Path, to: Path, overrides: Sequence[str]) -> None:
    if not to.exists():
        run(base, run_dir, overrides)
        beside = to.with_name(to.name + ".new")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(policy_of(run_dir), beside)
        beside.rename(to)
        discard(run_dir)


def _describe(made: World) -> dict[str, float]:
    """How good the start is, and how often the reward model orders held-out pairs of its answers as the true reward and
    as noisy readers do."""
    given = judged(made, answers(made.start, made.heldout, 2 * world.JUDGED_PAIRS, made.seed))
    texts = _texts(given)
    real = {prompt: [world.true_reward(prompt, text) for text in own] for prompt, own in texts.items()}
    learned = {str(group.prompt.content): [float(s.scores[REWARD] or 0.0) for s in group.samples] for group in given}
    first = {
        "true": {p: own[:ANSWERS] for p, own in real.items()},
        "learned": {p: own[:ANSWERS] for p, own in learned.items()},
    }
    write_json(made.folder / "start_answers.json", first)
    score = {(p, text): value for p, own in learned.items() for text, value in zip(texts[p], own, strict=True)}
    labelled = world.pairs(texts, made.seed, "held-out labels")
    trained = [json.loads(line) for line in made.pairs.read_text().splitlines()]
    right = [_orders(score, row) == (_gap(row) > 0) for row in labelled if _gap(row)]
    return {
        "true": _mean(first["true"].values()),
        "learned": _mean(first["learned"].values()),
        "true_std": statistics.pstdev(value for own in real.values() for value in own),
        "learned_std": statistics.pstdev(value for own in learned.values() for value in own),
        "accuracy_true": statistics.fmean(right),
        "accuracy_labels": statistics.fmean(_orders(score, row) for row in labelled),
        "labels_right": statistics.fmean(_gap(row) > 0 for row in trained if _gap(row)),
        "pairs": float(len(trained)),
    }


def _gap(row: Mapping[str, str]) -> float:
    return world.true_reward(row["prompt"], row["chosen"]) - world.true_reward(row["prompt"], row["rejected"])


def _orders(score: Mapping[tuple[str, str], float], row: Mapping[str, str]) -> bool:
    return score[row["prompt"], row["chosen"]] > score[row["prompt"], row["rejected"]]


def _sampling_run(policy: Path, file: Path, seed: int, *overrides: str) -> RunConfig:
    settings = [
        f"model.name={policy}",
        f"data.path={file}",
        f"seed={seed}",
        "data.shuffle=false",
        "algorithm.kl.coef=0",
    ]
    return load_run(HERE / "online.yaml", [*settings, "learner.minibatches=1", f"reward.model={policy}", *overrides])


def _texts(groups: Sequence[Group]) -> dict[str, list[str]]:
    return {str(group.prompt.content): [sample.text for sample in group.samples] for group in groups}


def _kl(group: Group) -> float:
    """The mean over a group's answers of sum_t log pi - log pi_start."""
    sums = []
    for sample in group.samples:
        assert sample.behavior_logprobs is not None
        sums.append(float((sample.behavior_logprobs.astype(float) - sample.tokens[REF_LOGPROBS].astype(float)).sum()))
    return statistics.fmean(sums)


def _win_rate(after: Mapping[str, Sequence[float]], before: Mapping[str, Sequence[float]]) -> float:
    wins = [
        0.5 if new == old else float(new > old)
        for prompt, own in after.items()
        for new, old in zip(own, before[prompt], strict=True)
    ]
    return statistics.fmean(wins)


def _mean(values: Any) -> float:
    return statistics.fmean(value for own in values for value in own)


def _tail(file: Path) -> str:
    return "\n".join(file.read_text().splitlines()[-15:])


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def write_json(file: Path, content: object) -> None:
    """The whole file or none of it: its existence means that the work behind it is finished."""
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(json.dumps(content, indent=1))
    os.replace(fresh, file)
