"""A KL price that holds the KL at a target: around any algorithm whose run file has `kl.target`.

    e = clip(KL / target - 1, -0.2, 0.2);   beta <- beta (1 + e N / horizon)           arXiv 1909.08593, section 2.2

KL, the mean over the step's N samples of the sum of k1, at the start of the step; stale samples are not reweighted.
beta is what the algorithm carries from step to step, so it is in every checkpoint; a step is trained at the beta that
it began with.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from rlhf.algorithms import ActorCriticAlgorithm, Algorithm, RunState
from rlhf.config import OnlineConfig
from rlhf.experience import Group, TrainBatch
from rlhf.metrics import last
from rlhf.ops.kl import adaptive_coefficient
from rlhf.ops.microbatch import LossSums, MicroBatch, Outputs

COEF = "kl/coef"  # key of the run state, and the metric
PRICE = "kl_price"  # token column: beta, the same at every token, where the KL is a loss

Online = Algorithm | ActorCriticAlgorithm
Config = TypeVar("Config", bound=OnlineConfig)


def wrap(config: Config, build: Callable[[Config], Online]) -> Online:
    """The algorithm that `build` makes of the settings, with a price that moves; unchanged without a target."""
    plain = build(config)
    if config.kl.target is None:
        return plain
    target, horizon = config.kl.target, config.kl.horizon
    is_loss = config.kl.place == "loss"

    def at(price: float) -> Online:
        return build(config.model_copy(update={"kl": config.kl.model_copy(update={"coef": price})}))

    def prepare(groups: Sequence[Group], state: RunState) -> tuple[TrainBatch, RunState]:
        price = state[COEF]
        batch, carried = at(price).prepare(groups, {key: kept for key, kept in state.items() if key != COEF})
        samples = sum(len(group.samples) for group in groups)
        kl = batch.metrics["kl/k1"].value if samples else None
        rows = batch.rows
        if is_loss:
            rows = tuple(
                replace(row, tokens={**row.tokens, PRICE: np.full(len(row.completion_ids), price, np.float32)})
                for row in rows
            )
        moved = price if kl is None else adaptive_coefficient(price, kl, target, samples, horizon)
        measured = {**batch.metrics, COEF: last(price)}
        return TrainBatch(rows, batch.normalizer, measured), {**carried, COEF: moved}

    def loss(outputs: Outputs, batch: MicroBatch) -> LossSums:
        prices = batch.tokens[PRICE]
        # A filler's price is 0; so is its loss, and that of empty completions, which have no token to hold a price.
        return at(float(prices.max()) if prices.numel() else 0.0).loss(outputs, batch)

    state = {**plain.initial_state, COEF: config.kl.coef}
    moving = plain._replace(initial_state=state, prepare=prepare)
    return moving._replace(loss=loss) if is_loss else moving
