"""The pairwise ranker: its loss, its text, what it learns, and what it says as a judge.

Not covered: a text-to-text ranker (the papers' T5 writes A or B), GPUs, how good a ranker is.
"""

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.nn.functional import binary_cross_entropy_with_logits

from rlhf.algorithms import pairwise_ranker
from rlhf.cli.main import main
from rlhf.config import ModelConfig, RewardSource, RunConfig
from rlhf.data.comparisons import comparison_ids, context_text, responses_text
from rlhf.data.offline import OfflineSet
from rlhf.errors import JudgeFailed, NothingScored
from rlhf.experience import RANK, Group
from rlhf.judges.ranker import RankerJudge, standing
from rlhf.models.load import load_tokenizer, stop_ids
from rlhf.models.resolve import resolve
from rlhf.models.score import start_score_model
from rlhf.observers import read_jsonl
from rlhf.ops.ranking import order_likelihood

GOOD, BAD = ("yes", "good", "fine", "well"), ("no", "bad", "poor", "ill")


def test_the_loss_is_the_cross_entropy_of_a_over_both_orders() -> None:
    """ln 2 without an opinion; else torch's own cross-entropy with the labels 1 and 0, values and gradients."""
    assert float(order_likelihood(torch.zeros(1), torch.zeros(1))) == pytest.approx(0.693147, abs=1e-6)
    drawn = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine, theirs = drawn.clone().requires_grad_(), drawn.clone().requires_grad_()
    labels = torch.tensor([1.0, 0.0], dtype=torch.float64)[:, None].expand(2, 7)
    found = order_likelihood(mine[0], mine[1])
    expected = binary_cross_entropy_with_logits(theirs, labels, reduction="none").mean(dim=0)
    found.sum().backward()
    expected.sum().backward()
    assert torch.allclose(found, expected, atol=1e-12) and torch.allclose(mine.grad, theirs.grad, atol=1e-12)


def pairs(seed: int, count: int, *, true_labels: bool) -> list[dict[str, str]]:
    """Answers of three words; good words are better."""
    drawn = random.Random(seed)
    rows = []
    for number in range(count):
        good, bad = (" ".join(drawn.choices(words, k=3)) for words in (GOOD, BAD))
        if not true_labels and drawn.random() < 0.5:
            good, bad = bad, good
        rows.append({"prompt": f"question {number}", "chosen": good, "rejected": bad})
    return rows


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    return {
        "model": {"name": "tiny"},
        "algorithm": {"name": "pairwise_ranker"},
        "data": {"path": write(tmp_path / "pairs.jsonl", pairs(0, 200, true_labels=True)), "heldout": 40},
        "loop": {"num_steps": 10, "groups_per_step": 16},
        "learner": {"engine": "torch", "lr": 2e-3},
    }


def test_a_pair_is_read_in_both_orders_as_the_judge_reads_it(content: dict[str, Any]) -> None:
    """The papers' text, the chosen answer first and then second; the tokens are those that the judge makes of it."""
    rows = OfflineSet.load(RunConfig.model_validate(content))
    group = rows.group(rows.prompt(0))
    source = pairs(0, 200, true_labels=True)[group.prompt.row]
    assert group.prompt.text == f"[CONTEXT] {source['prompt']}"
    assert group.samples[0].text == f" [RESPONSE A] {source['chosen']} [RESPONSE B] {source['rejected']}"
    assert [sample.scores[RANK] for sample in group.samples] == [0.0, 1.0]
    tokenizer = load_tokenizer("tiny", trust_remote_code=False)
    stops = stop_ids(resolve("tiny"), tokenizer)
    for sample, order in zip(group.samples, (("chosen", "rejected"), ("rejected", "chosen")), strict=True):
        ids = comparison_ids(source["prompt"], *(source[side] for side in order), tokenizer, stops)
        assert np.array_equal(ids, np.concatenate([group.prompt.token_ids, sample.token_ids]))
    dialogue = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    assert "hi" in context_text(dialogue) and "yes?" in context_text(dialogue)


def test_what_is_no_comparison_is_dropped_and_counted_or_named(content: dict[str, Any]) -> None:
    rows = OfflineSet.load(RunConfig.model_validate(content))
    group, other = rows.group(rows.prompt(0)), rows.group(rows.prompt(1))
    same = replace(group, samples=(group.samples[0], replace(group.samples[1], token_ids=group.samples[0].token_ids)))
    batch, _ = pairwise_ranker.prepare([other, same], {})
    assert [row.unit for row in batch.rows] == [0, 0] and batch.metrics["groups/dropped"].value == 1
    with pytest.raises(ValueError, match="not the two orders of one comparison"):
        pairwise_ranker.prepare([replace(group, samples=group.samples[:1])], {})


def test_it_learns_with_other_seeds_too(tmp_path: Path, content: dict[str, Any]) -> None:
    """Two more seeds of model order and data: held-out accuracy after 10 steps, and that of random labels. The first
    seed is the next test's."""
    found = []
    for seed in (1, 2):
        for labels in (True, False):
            content["data"]["path"] = write(tmp_path / f"{seed}-{labels}.jsonl", pairs(seed, 200, true_labels=labels))
            (tmp_path / "ranker.yaml").write_text(yaml.safe_dump(content | {"seed": seed}))
            run_dir = tmp_path / f"run-{seed}-{labels}"
            assert main(["run", str(tmp_path / "ranker.yaml"), "--in-process", "--run-dir", str(run_dir)]) == 0
            found.append(read_jsonl(run_dir / "evaluations.jsonl")[-1]["values"]["rewards/accuracies"])
    assert min(found[::2]) > 0.9 and max(found[1::2]) < 0.75, found


def test_it_learns_to_tell_unseen_pairs_serves_as_a_judge_and_random_labels_teach_nothing(
    tmp_path: Path, content: dict[str, Any], tiny_run: Callable[..., RunConfig], make_group: Callable[..., Group]
) -> None:
    """10 steps: held-out accuracy over 0.9, at random labels under 0.75; as a judge it puts every good answer above
    every bad one; RLOO trains a step under it."""
    (tmp_path / "ranker.yaml").write_text(yaml.safe_dump(content))
    command = ["run", str(tmp_path / "ranker.yaml"), "--in-process", "--run-dir"]
    assert main([*command, str(tmp_path / "ranker")]) == 0
    first, last = (row["values"] for row in read_jsonl(tmp_path / "ranker" / "evaluations.jsonl"))
    assert first["rewards/accuracies"] < 0.75 and last["rewards/accuracies"] > 0.9
    assert last["loss/ranker"] < 0.3 and last["ranker/first_mean"] == pytest.approx(0.5, abs=0.1)
    noise = write(tmp_path / "noise.jsonl", pairs(0, 200, true_labels=False))
    assert main([*command, str(tmp_path / "noise"), f"data.path={noise}"]) == 0
    control = read_jsonl(tmp_path / "noise" / "evaluations.jsonl")[-1]["values"]
    assert control["rewards/accuracies"] < 0.75

    folder = str(tmp_path / "ranker" / "checkpoints" / "step-000010" / "policy")
    judge = RankerJudge(tiny_run({}, {}, {}, {}), RewardSource.model_validate({"ranker": {"model": folder}}), "reward")
    judge.setup()
    texts = ["no bad ill", "good well yes", "poor poor no", "fine fine good"]
    group = make_group(0, [None] * 4, [1] * 4, {}, {})
    group = replace(group, samples=tuple(replace(s, text=t) for s, t in zip(group.samples, texts, strict=True)))
    rewards = judge.judge(group).scores["reward"]
    assert max(rewards[0], rewards[2]) < 0 < min(rewards[1], rewards[3])

    online = {
        "model": {"name": "tiny"},
        "algorithm": {"name": "rloo", "samples_per_prompt": 3, "kl": {"coef": 0.0}},
        "data": {"path": content["data"]["path"]},
        "loop": {"num_steps": 1, "groups_per_step": 2},
        "generation": {"engine": "transformers", "max_new_tokens": 4},
        "learner": {"engine": "torch"},
        "reward": {"ranker": {"model": folder}},
    }
    (tmp_path / "online.yaml").write_text(yaml.safe_dump(online))
    assert main(["run", str(tmp_path / "online.yaml"), "--in-process", "--run-dir", str(tmp_path / "online")]) == 0
    (step,) = read_jsonl(tmp_path / "online" / "metrics.jsonl")
    assert step["reward/mean"] == pytest.approx(0.0, abs=1e-6) and step["reward/std"] > 0
    assert "reward/inconsistent/mean" in step


@pytest.fixture
def ranker(tmp_path: Path, tiny_run: Callable[..., RunConfig]) -> Callable[..., RankerJudge]:
    """A ranker with a made-up head, large enough to have opinions."""
    model = start_score_model(ModelConfig(name="tiny"), "float32", 0)
    model.score.weight.data.mul_(20)
    model.save_pretrained(tmp_path / "judge")
    load_tokenizer("tiny", trust_remote_code=False).save_pretrained(tmp_path / "judge")

    def build(**settings: Any) -> RankerJudge:
        source = RewardSource.model_validate({"ranker": {"model": str(tmp_path / "judge"), **settings}})
        made = RankerJudge(tiny_run({}, {}, {}, {}), source, "reward")
        made.setup()
        return made

    return build


def scores_one_by_one(folder: Path, first: str, second: str) -> float:
    """The independent reference: transformers' own classifier on the unpadded text."""
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer("tiny", trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    ids = tokenizer(context_text("say a"), add_special_tokens=False)["input_ids"]
    if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        ids = [tokenizer.bos_token_id, *ids]
    ids += tokenizer(responses_text(first, second), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    states = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state
    return float(model.score(states[0, -1]).detach().squeeze())


def test_rewards_are_mean_logits_over_both_orders(
    ranker: Callable[..., RankerJudge], make_group: Callable[..., Group], tmp_path: Path
) -> None:
    """Against transformers' own scores, one text at a time: the mean over the others, which sums to 0 over a group;
    against one, whose own reward is 0; against a column."""
    texts = [f"answer {i}" for i in range(3)]
    logit = {
        (a, b): (scores_one_by_one(tmp_path / "judge", a, b) - scores_one_by_one(tmp_path / "judge", b, a)) / 2
        for a, b in itertools.permutations([*texts, "gold"], 2)
    }
    group = make_group(1, [None] * 3, [1] * 3, {}, {"best": "gold"})
    rewards = ranker().judge(group).scores["reward"]
    expected = [np.mean([logit[a, b] for b in texts if b != a]) for a in texts]
    assert rewards == pytest.approx(expected, abs=1e-4) and sum(rewards) == pytest.approx(0, abs=1e-4)
    assert np.std(rewards) > 0.01
    one = ranker(against="one").judge(group).scores["reward"]
    baseline = texts[one.index(0.0)]
    assert one == pytest.approx([0.0 if a == baseline else logit[a, baseline] for a in texts], abs=1e-4)
    column = ranker(against_column="best")
    assert column.judge(group).scores["reward"] == pytest.approx([logit[a, "gold"] for a in texts], abs=1e-4)
    with pytest.raises(JudgeFailed, match=r"column 'gold' \(against_column\) is None"):
        ranker(against_column="gold").judge(group)


def test_equal_answers_and_comparisons_that_do_not_fit(
    ranker: Callable[..., RankerJudge], make_group: Callable[..., Group]
) -> None:
    """A tie is 0 without being read; an answer too long to be read with any other has no reward, the others have."""
    judge = ranker()
    group = make_group(1, [None] * 3, [1] * 3, {}, {})

    def said(*texts: str) -> list[float | None]:
        samples = tuple(replace(s, text=t) for s, t in zip(group.samples, texts, strict=False))
        return list(judge.judge(replace(group, samples=samples)).scores["reward"])

    assert said("a", "a") == [0.0, 0.0]
    long = said("a " * 3000, "a", "b")
    assert long[0] is None and long[1] == pytest.approx(-long[2])
    with pytest.raises(NothingScored):
        said("a " * 3000, "b " * 3000)


def test_a_preference_for_a_place_is_taken_out_and_counted() -> None:
    """Logits (3, 1) in the two orders: 2 nats of place, 1 of merit; both for the first shown: inconsistent."""
    logits = {("x", "y"): 3.0, ("y", "x"): 1.0, ("x", "z"): 2.0, ("z", "x"): -1.0}
    assert standing("x", ["y"], logits) == (1.0, 1.0) and standing("y", ["x"], logits) == (-1.0, 1.0)
    assert standing("x", ["y", "z", "x"], logits) == (pytest.approx((1.0 + 1.5 + 0.0) / 3), 0.5)
    assert standing("x", ["y"], {("x", "y"): 3.0, ("y", "x"): None}) == (None, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"name": "tiny", "lora": {"base": "nf4"}}}, "not loaded in 4 bits"),
        ({"data": {"path": "x", "system_prompt": "be good"}}, "data.system_prompt would do nothing"),
        ({"learner": {"packing": True}}, "rows are padded"),
        ({"reward": {"function": "a:b"}}, "learns from the comparisons of data.path"),
    ],
)
def test_settings_that_cannot_work_are_refused(content: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RunConfig.model_validate({**content, **changes})


def test_a_ranker_compares_and_its_keys_have_a_use(tiny_run: Callable[..., RunConfig]) -> None:
    online = tiny_run({}, {}, {}, {}).model_dump() | {"reward": {"ranker": {"model": "x"}}}
    assert RunConfig.model_validate(online).reward is not None
    with pytest.raises(ValueError, match="a held-out prompt has one answer"):
        RunConfig.model_validate(online | {"data": {"path": "x", "heldout": 3}})
    with pytest.raises(ValueError, match="against would do nothing"):
        RewardSource.model_validate({"ranker": {"model": "x", "against": "one", "against_column": "y"}})
