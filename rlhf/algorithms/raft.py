"""RAFT, arXiv 2304.06767: of a prompt's samples the one of highest reward, then its log-likelihood.

    i* = argmax_i R_i,   R_i = r_i - beta sum_t m_t d_t;        loss = -sum over prompts of sum_t m_t a_t l_t(y_i*)

a_t is from `aggregation`. The samples that lose are generated and judged, and teach nothing.
"""

from collections.abc import Sequence
from functools import partial

import torch

from rlhf.algorithms import Algorithm, RunState, bandit
from rlhf.algorithms.aggregation import divisor, normalizer, token_weights
from rlhf.algorithms.bandit import Episode
from rlhf.config import RaftConfig
from rlhf.experience import LOSS_WEIGHTS, Group, TrainBatch
from rlhf.metrics import mean_of
from rlhf.ops.losses import policy_gradient
from rlhf.ops.microbatch import LossSums, MicroBatch, Outputs


def build(config: RaftConfig) -> Algorithm:
    """RAFT with these settings; it carries nothing from step to step."""
    return Algorithm(
        needs=bandit.needed_columns(config.kl),
        initial_state={},
        prepare=partial(prepare, config),
        loss=partial(loss, config),
    )


def prepare(config: RaftConfig, groups: Sequence[Group], state: RunState) -> tuple[TrainBatch, RunState]:
    """One row a prompt: the sample that was selected. Pure; the order of groups is irrelevant."""
    scored = bandit.score(groups, config)
    kept = bandit.varied(scored, drop_equal_groups=config.drop_equal_groups)
    chosen = select_best(kept) if config.selection == "best" else select_first(kept)
    columns = [{LOSS_WEIGHTS: token_weights(config.aggregation, episode)} for episode in chosen]
    measured = bandit.measure(groups, scored, kept)
    measured["reward/selected_mean"] = mean_of(episode.score for episode in chosen)
    return TrainBatch(bandit.rows(chosen, columns, config.kl), normalizer(config.aggregation), measured), state


def select_best(episodes: Sequence[Episode]) -> list[Episode]:
    """Of each prompt the episode of highest reward R; of equal ones the first, which is one of them at random."""
    best: dict[int, Episode] = {}
    for episode in episodes:
        if episode.prompt_id not in best or episode.reward > best[episode.prompt_id].reward:
            best[episode.prompt_id] = episode
    return list(best.values())


def select_first(episodes: Sequence[Episode]) -> list[Episode]:
    """Of each prompt the first scorable episode: samples of a prompt are drawn alike, so it is one at random."""
    first: dict[int, Episode] = {}
    for episode in episodes:
        first.setdefault(episode.prompt_id, episode)
    return list(first.values())


def loss(config: RaftConfig, outputs: Outputs, batch: MicroBatch) -> LossSums:
    """The negative log-likelihood of the selected completions, summed. No importance weight: a winner is imitated,
    whoever drew it."""
    credit = torch.ones_like(outputs.logprobs)
    nll = policy_gradient(outputs.logprobs, credit, batch.mask, batch.tokens[LOSS_WEIGHTS])
    return LossSums(nll, {"loss/nll": (nll.detach(), divisor(config.aggregation, batch))})
