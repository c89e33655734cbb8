"""The comparisons of examples/: the true reward, the noisy labels, the verdicts, and that each method's run file loads.

Not covered: the runs themselves, which take half an hour; what they gave is in docs/results.
"""

import importlib
import itertools
import math
import random
from pathlib import Path
from types import ModuleType

import pytest

from rlhf.config_file import load_run

ROOT = Path(__file__).parents[1]
PROMPT = "write a sad short note about the sea"


def part(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module(f"examples.{name}")


def test_true_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the best answer, wrong mood, repetition, length, nothing at all."""
    world = part("miniature.world", monkeypatch)
    best = "wave salt ship gull grey lost lonely tide"
    assert world.true_reward(PROMPT, best) == world.BEST == 3.0
    # one of three words of the mood, none of the topic; half are fillers; two of eight asked; nothing twice
    assert world.true_reward(PROMPT, "grey the") == pytest.approx(1 / 3 + 1 / 2 - 6 / 8)
    # a happy word takes a sad one back, and the same word a second time counts once
    assert world.true_reward(PROMPT, "grey grey bright wave") == pytest.approx(1 / 4 + 0 + 1 - 4 / 8 - 1 / 4)
    assert world.true_reward(PROMPT, "") == -1.0
    for mood, length, topic in itertools.product(world.MOODS, world.LENGTHS, world.TOPICS):
        words = [
            *world.TOPICS[topic],
            *world.MOODS[mood],
            *(w for t in world.TOPICS if t != topic for w in world.TOPICS[t]),
        ]
        answer = " ".join(words[: world.LENGTHS[length]])
        assert world.true_reward(f"write a {mood} {length} note about the {topic}", answer) <= world.BEST


def test_prompts_are_on_one_side_and_labels_follow_bradley_terry(monkeypatch: pytest.MonkeyPatch) -> None:
    world = part("miniature.world", monkeypatch)
    train, heldout = world.prompts(3)
    assert not set(train) & set(heldout) and len(train) == world.TRAIN_PROMPTS and len(heldout) == world.HELDOUT_PROMPTS
    better, worse = "wave salt", "wave the"
    gap = world.true_reward(PROMPT, better) - world.true_reward(PROMPT, worse)
    source, draws = random.Random(0), 4000
    share = sum(world.preferred(PROMPT, worse, better, source)[0] == better for _ in range(draws)) / draws
    expected = 1 / (1 + math.exp(-world.SHARPNESS * gap))
    assert 0.6 < expected < 0.95
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)


def test_intervals_and_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Student's t of five numbers: mean 3, standard error sqrt(2.5 / 5), 2.776 of it."""
    page = part("miniature.page", monkeypatch)
    mean, half = page.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == (3.0, pytest.approx(2.776 * math.sqrt(0.5), rel=1e-9))
    assert page.verdict([1.0, 1.1, 0.9]) == "agrees"
    assert page.verdict([-1.0, -1.1, -0.9]) == "the opposite"
    assert page.verdict([1.0, -1.1, 0.9]) == "not decided"


@pytest.mark.parametrize("name", ["back_to_basics", "rso"])
def test_each_method_has_a_run_file_that_loads_and_a_budget_like_the_others(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As many optimizer steps for every method, as many completions for every one that samples; rates come from a
    method that chose before."""
    methods = part(f"{name}.compare", monkeypatch).METHODS
    folder = ROOT / "examples" / "miniature"
    steps, sampled = set(), set()
    for number, method in enumerate(methods):
        config = load_run(folder / f"{method.base}.yaml", ["model.name=tiny", *method.overrides])
        loop, learner = config.loop, config.learner
        steps.add(loop.num_steps * learner.epochs * learner.minibatches)
        if not method.on_pairs:
            sampled.add(loop.num_steps * loop.groups_per_step * config.algorithm.samples_per_prompt)
        assert method.rate_of is None or method.rate_of in [other.name for other in methods[:number]]
    assert len(steps) == 1 and len(sampled) == 1
