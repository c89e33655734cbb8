"""Measures what the stages made, with plain transformers: it shares no code with the training.

Held-out prompts are answered once each at temperature 1, in fixed seeded batches."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

LONGEST_ANSWER = 96
BATCH = 16
SEED = 17


def accuracy(model: Path, pairs: Path, to: Path) -> str:
    """Share of held-out pairs whose preferred answer scores higher, beside that of the longer answer (in words).

    The interval is that of a proportion at 95 %, 1.96 sqrt(p (1 - p) / n); pairs of one prompt are not independent, so
    it is too narrow where a prompt has many. An equal score, or length, counts as half."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    prompts = [row["prompt"] for row in rows]
    scored = Scorer(model).scores(prompts * 2, [row[side] for side in ("chosen", "rejected") for row in rows])
    right = sum(half(chosen, other) for chosen, other in zip(scored[: len(rows)], scored[len(rows) :], strict=True))
    longer = sum(half(len(row["chosen"].split()), len(row["rejected"].split())) for row in rows)
    share, rule = right / len(rows), longer / len(rows)
    around = 1.96 * math.sqrt(share * (1 - share) / len(rows))
    to.write_text(json.dumps({"pairs": len(rows), "accuracy": share, "interval": around, "longer_answer": rule}))
    return f"{len(rows)} held-out pairs: reward model {share:.1%} ± {around:.1%}, the longer answer {rule:.1%}"


def table(root: Path, policies: Sequence[str]) -> str:
    """Reward, KL to the SFT start, length and win rate against it, on the held-out prompts, as a Markdown table.

    The reward is that of the model that RSO and RLOO were trained under, and wins are by it: neither says what people
    would prefer. KL is that of whole answers in nats, estimated on the policy's own samples."""
    rows = [json.loads(line) for line in (root / "data" / "test.jsonl").read_text().splitlines()]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    scorer, start = Scorer(root / "reward-model"), Policy(root / "sft-policy")
    answers = start.answers(prompts)
    baseline = scorer.scores(prompts, [text for text, _ in answers])
    lines = [
        "| policy | steps | CPU minutes | reward | KL to SFT | tokens | ended | wins against SFT |",
        "|---" * 8 + "|",
    ]
    lines.append(f"| SFT | – | – | {mean(baseline)} | 0 | {sizes(answers, start.end)} | – |")
    for name in policies:
        policy = Policy(root / f"{name}-policy")
        answers = policy.answers(prompts)
        rewards = scorer.scores(prompts, [text for text, _ in answers])
        gaps = [policy.logprob(p, ids) - start.logprob(p, ids) for p, (_, ids) in zip(prompts, answers, strict=True)]
        wins = mean([half(mine, theirs) for mine, theirs in zip(rewards, baseline, strict=True)])
        steps = len((root / name / "metrics.jsonl").read_text().splitlines())
        minutes = json.loads((root / name / "used.json").read_text())["cpu_minutes"]
        told = f"{mean(rewards)} | {mean(gaps)} | {sizes(answers, start.end)} | {wins}"
        lines.append(f"| {name.upper()} | {steps} | {minutes:.0f} | {told} |")
    text = "\n".join(lines)
    (root / "table.md").write_text(text + "\n")
    return text


def sizes(answers: Sequence[tuple[str, list[int]]], end: int) -> str:
    """Mean tokens of an answer, and the share of answers that ended by themselves."""
    ended = sum(ids[-1] == end for _, ids in answers) / len(answers)
    return f"{sum(len(ids) for _, ids in answers) / len(answers):.0f} | {ended:.0%}"


def half(mine: float, theirs: float) -> float:
    return 0.5 if mine == theirs else float(mine > theirs)


def mean(values: Sequence[float]) -> str:
    """Mean ± 1.96 standard errors."""
    centre = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - centre) ** 2 for value in values) / max(1, len(values) - 1))
    return f"{centre:.2f} ± {1.96 * spread / math.sqrt(len(values)):.2f}"


class Scorer:
    """A reward model: the score at the EOS behind the answer."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
        self._model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """One score an answer. Batches are of like length; padding does not enter a score."""
        ids = [self._ids(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        found: dict[int, float] = {}
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        for first in range(0, len(order), BATCH):
            places = order[first : first + BATCH]
            batch = self._tokenizer.pad({"input_ids": [ids[place] for place in places]}, return_tensors="pt")
            found |= dict(zip(places, self._model(**batch).logits[:, 0].tolist(), strict=True))
        return [found[place] for place in range(len(ids))]

    def _ids(self, prompt: str, answer: str) -> list[int]:
        text = self._tokenizer.encode(answer, add_special_tokens=False)
        return [*asked(self._tokenizer, prompt), *text, self._tokenizer.eos_token_id]


class Policy:
    """A language model that answers at temperature 1."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.end: int = self._tokenizer.eos_token_id

    @torch.no_grad()
    def answers(self, prompts: Sequence[str]) -> list[tuple[str, list[int]]]:
        """Text and token ids of one answer to each prompt, its EOS included."""
        found = []
        torch.manual_seed(SEED)  # transformers' generate knows only the global generator
        for first in range(0, len(prompts), BATCH):
            encoded = [asked(self._tokenizer, prompt) for prompt in prompts[first : first + BATCH]]
            batch = self._tokenizer.pad({"input_ids": encoded}, return_tensors="pt")
            tokens = self._model.generate(
                **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=LONGEST_ANSWER
            )
            found += [self._cut(row.tolist()) for row in tokens[:, batch["input_ids"].shape[1] :]]
        return found

    @torch.no_grad()
    def logprob(self, prompt: str, answer: Sequence[int]) -> float:
        """Log-probability of the answer's tokens, summed."""
        before = asked(self._tokenizer, prompt)
        logits = self._model(input_ids=torch.tensor([[*before, *answer]])).logits[0, len(before) - 1 : -1]
        return float(torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None]).sum())

    def _cut(self, ids: list[int]) -> tuple[str, list[int]]:
        kept = ids[: ids.index(self.end) + 1] if self.end in ids else ids
        return self._tokenizer.decode(kept, skip_special_tokens=True), kept


def asked(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt through the chat template, or as it is where the model has none."""
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(prompt))
    turn = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False))
