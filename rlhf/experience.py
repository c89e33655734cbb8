"""The one noun: a `Group` is a prompt, its samples, and the columns that judges and the learner fill in.

A rollout of n samples is a group of n, an offline preference pair is a group of two with ranks, a demonstration is a
group of one. Every per-token column has the length of the sample's token ids. The loss mask travels with the sample
and is set by whoever sampled it; it is never inferred from pad ids. Arrays are numpy, so that the records need
neither torch nor ray. Invariants are checked at construction: a record that exists is well formed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlhf.metrics import Metrics

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]

FinishReason = Literal["stop", "length", "given"]
Origin = Literal["policy", "dataset"]

# Names of columns. One word for one thing: see CONTRIBUTING.md.
REWARD = "reward"  # score of a sample: a number, or None for "cannot score"
RANK = "rank"  # score of a sample: 0 is preferred to 1
REF_LOGPROBS = "ref_logprobs"  # token column: log-probabilities under the frozen reference
OLD_LOGPROBS = "old_logprobs"  # token column: under the learner's weights at the start of the step
BEHAVIOR_LOGPROBS = "behavior_logprobs"  # token column: under the weights and the sampler that produced the sample
ADVANTAGES = "advantages"  # token column of a train batch
VALUES = "values"  # token column: what the critic expected before the token, at the start of the step
RETURNS = "returns"  # token column of a train batch: what the critic learns to expect
LOSS_WEIGHTS = "loss_weights"  # token column of a train batch: what each token's loss counts in the sum


@dataclass(frozen=True, slots=True)
class Sampling:
    """How samples are drawn. Stored with each sample, because its log-probabilities mean nothing without it."""

    temperature: float
    top_p: float
    top_k: int  # 0: all tokens
    max_new_tokens: int

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.max_new_tokens < 1:
            raise ValueError(f"sampling settings out of range: {self}")


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One issue of one row of the data.

    `id` is unique within a run and counts up over epochs; `row` is the row of the data set. `content` is what the
    user's row held (a string or a list of role/content messages), `text` what it became after the chat template,
    `token_ids` (P,) what the policy sees. `columns` are the row's other columns, untouched."""

    id: int
    row: int
    epoch: int
    content: str | list[dict[str, Any]]
    text: str
    token_ids: Ids
    columns: Mapping[str, Any]

    def __post_init__(self) -> None:
        _check_ids(f"prompt {self.id}", self.token_ids)
        if len(self.token_ids) == 0:
            raise ValueError(f"prompt {self.id} has no tokens")


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One completion, with what its sampler knows about it.

    token_ids (T,), the EOS included when it was emitted; loss_mask (T,), true where the policy is trained;
    behavior_logprobs (T,) float32 and versions (T,) int32, the policy version that sampled each token: both None for
    data that no policy of this run sampled, which therefore never ages. `text` is what judges read. By column
    name: `scores`, a number (or None: "cannot score"), and `tokens`, a (T,) array."""

    index: int
    token_ids: Ids
    loss_mask: Mask
    text: str
    finish_reason: FinishReason
    behavior_logprobs: Floats | None
    versions: Ids | None
    sampling: Sampling | None
    seed: int | None
    scores: Mapping[str, float | None]
    tokens: Mapping[str, Floats]

    def __post_init__(self) -> None:
        where = f"sample {self.index}"
        _check_ids(where, self.token_ids)
        length = len(self.token_ids)
        if self.loss_mask.dtype != np.bool_ or self.loss_mask.shape != (length,):
            raise ValueError(f"{where}: loss_mask must be bool of shape ({length},), not {_describe(self.loss_mask)}")
        if (self.behavior_logprobs is None) != (self.versions is None):
            raise ValueError(f"{where}: behavior_logprobs and versions come together or not at all")
        if self.versions is not None and (self.versions.dtype != np.int32 or self.versions.shape != (length,)):
            raise ValueError(f"{where}: versions must be int32 of shape ({length},), not {_describe(self.versions)}")
        columns = dict(self.tokens)
        if self.behavior_logprobs is not None:
            columns[BEHAVIOR_LOGPROBS] = self.behavior_logprobs
        for name, column in columns.items():
            if column.dtype != np.float32 or column.shape != (length,):
                raise ValueError(f"{where}: {name} must be float32 of shape ({length},), not {_describe(column)}")
            if not np.isfinite(column).all():
                raise ValueError(f"{where}: {name} is not finite at token {int(np.argmin(np.isfinite(column)))}")
        for name, score in self.scores.items():
            if score is not None and not np.isfinite(score):
                raise ValueError(f"{where}: {name} is {score}; a judge that cannot score says None")

    @property
    def policy_version(self) -> int | None:
        """The oldest version that sampled a token of it; None for data that never ages."""
        if self.versions is None or len(self.versions) == 0:
            return None
        return int(self.versions.min())


@dataclass(frozen=True, slots=True)
class Columns:
    """What a judge or the learner says about one group: by column name a score, or an array, for each sample."""

    prompt_id: int
    scores: Mapping[str, Sequence[float | None]]
    tokens: Mapping[str, Sequence[Floats]]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.scores) | frozenset(self.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """A prompt with its samples, in the order of their indices."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    origin: Origin

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError(f"group of prompt {self.prompt.id} has no samples")
        if [sample.index for sample in self.samples] != list(range(len(self.samples))):
            raise ValueError(f"group of prompt {self.prompt.id}: sample indices must count up from 0")

    @property
    def policy_version(self) -> int | None:
        """The oldest version among its samples; None when no sample ages."""
        versions = [sample.policy_version for sample in self.samples if sample.policy_version is not None]
        return min(versions, default=None)

    def with_columns(self, columns: Columns) -> "Group":
        """The same group with these columns filled in (those of the same name are replaced)."""
        if columns.prompt_id != self.prompt.id:
            raise ValueError(f"columns of prompt {columns.prompt_id} do not belong to prompt {self.prompt.id}")
        for name, column in [*columns.scores.items(), *columns.tokens.items()]:
            if len(column) != len(self.samples):
                raise ValueError(
                    f"prompt {self.prompt.id}: {name} has {len(column)} entries for {len(self.samples)} samples"
                )
        samples = tuple(
            replace(
                sample,
                scores={**sample.scores, **{name: column[i] for name, column in columns.scores.items()}},
                tokens={**sample.tokens, **{name: column[i] for name, column in columns.tokens.items()}},
            )
            for i, sample in enumerate(self.samples)
        )
        return replace(self, samples=samples)


def fill_in(groups: Sequence[Group], columns: Sequence[Columns]) -> list[Group]:
    """The groups, in their order, with every column set of its prompt filled in."""
    filled = {group.prompt.id: group for group in groups}
    for column in columns:
        filled[column.prompt_id] = filled[column.prompt_id].with_columns(column)
    return [filled[group.prompt.id] for group in groups]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One sequence to train on.

    `unit` names what must stay together (the two rows of a preference pair): rows of one unit are never split over
    micro-batches, minibatches or ranks. `tokens` are (T,) columns for the loss, T the length of completion_ids.
    """

    unit: int
    prompt_ids: Ids
    completion_ids: Ids
    loss_mask: Mask
    temperature: float
    tokens: Mapping[str, Floats]

    def __post_init__(self) -> None:
        length = len(self.completion_ids)
        if len(self.prompt_ids) == 0:
            raise ValueError(f"unit {self.unit}: a row needs a prompt, or its first token has no prediction")
        if self.loss_mask.shape != (length,):
            raise ValueError(
                f"unit {self.unit}: loss_mask has shape {self.loss_mask.shape}, completion {length} tokens"
            )
        for name, column in self.tokens.items():
            if column.shape != (length,):
                raise ValueError(f"unit {self.unit}: {name} has shape {column.shape}, completion {length} tokens")


Normalizer = Literal["units", "rows", "tokens"]


@dataclass(frozen=True, slots=True, eq=False)
class TrainBatch:
    """What one step trains on, with credit already assigned.

    `normalizer` says what the learner divides the summed loss by, once, over a whole minibatch on all ranks: the
    number of units, of rows, or of tokens with a true loss mask. Rows are ordered by unit; all rows have the same
    token columns. `metrics` are what `prepare` measured."""

    rows: tuple[Row, ...]
    normalizer: Normalizer
    metrics: Metrics

    def __post_init__(self) -> None:
        units = [row.unit for row in self.rows]
        if units != sorted(units):
            raise ValueError("rows of a train batch must be ordered by unit")
        names = {frozenset(row.tokens) for row in self.rows}
        if len(names) > 1:
            raise ValueError(f"rows of a train batch differ in their columns: {sorted(map(sorted, names))}")


@dataclass(frozen=True, slots=True, eq=False)
class MixedBatch(TrainBatch):
    """What the policy sampled, and beside it rows of data: a batch with a loss, a count and minibatches of its own."""

    beside: TrainBatch


def _check_ids(where: str, ids: Ids) -> None:
    if ids.dtype != np.int32 or ids.ndim != 1:
        raise ValueError(f"{where}: token ids must be a flat int32 array, not {_describe(ids)}")
    if len(ids) and int(ids.min()) < 0:
        raise ValueError(f"{where}: token id {int(ids.min())} is negative")


def _describe(array: NDArray[Any]) -> str:
    return f"{array.dtype} {array.shape}"
