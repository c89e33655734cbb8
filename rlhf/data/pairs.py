"""Preference pairs out of groups whose samples have rewards, as rows in the columns of TRL."""

import json
from collections.abc import Sequence
from typing import Any

import torch

from rlhf.algorithms.preference import Candidates, Pair, pairs_of, scored
from rlhf.data.conversations import Content
from rlhf.errors import BadInput
from rlhf.experience import REWARD, Group, Prompt, Sample
from rlhf.metrics import merge, values
from rlhf.ops.pairing import Pairing, best_against_worst, every_pair, first_round, tournament
from rlhf.seeding import seed_for


def pairs_from(groups: Sequence[Group], pairing: str, seed: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The pairs as rows, in the order of prompt ids, and how many comparisons made one or why not."""
    rows: list[dict[str, Any]] = []
    parts = []
    for candidates in scored(groups, REWARD):
        if not candidates.samples:
            continue
        pairs, measured = pairs_of(candidates, _compared(candidates, pairing, seed))
        rows += [_row(pair) for pair in pairs]
        parts.append(measured)
    counted = values(merge(parts))
    return rows, {name: int(counted.get(f"pairs/{name}", 0)) for name in ("made", "ties", "identical", "empty")}


def _compared(candidates: Candidates, pairing: str, seed: int) -> Pairing:
    scores, text = candidates.scores, candidates.text
    if pairing == "best_worst":
        return best_against_worst(scores, text)
    if pairing == "all":
        return every_pair(scores, text)
    generator = torch.Generator().manual_seed(seed_for(seed, "pairs", candidates.prompt.id))
    return (first_round if pairing == "first_round" else tournament)(scores, text, generator)


def _row(pair: Pair) -> dict[str, Any]:
    """Text beside a prompt that is text, messages beside messages; the row's other columns, under ours."""
    prompt = pair.prompt
    row = {
        **prompt.columns,
        "prompt": prompt.content,
        "chosen": _beside(prompt, pair.chosen),
        "rejected": _beside(prompt, pair.rejected),
        "score_chosen": pair.chosen.scores[REWARD],
        "score_rejected": pair.rejected.scores[REWARD],
        "prompt_id": prompt.id,
    }
    try:
        json.dumps(row)
    except TypeError as error:
        raise BadInput(f"row {prompt.row} of the data: a column cannot be written as JSON: {error}") from error
    return row


def _beside(prompt: Prompt, sample: Sample) -> Content:
    return sample.text if isinstance(prompt.content, str) else [{"role": "assistant", "content": sample.text}]
