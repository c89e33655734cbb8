"""The roles that the loop and the source put together, and what each of them promises.

A `Handle` is whatever the team passes around: the value itself in one process, an object reference on Ray. The loop
and the source never look inside. Plain classes (Generator, Judge) do the work; Workers run one or many of them, here
or elsewhere. Imports neither torch nor ray."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlhf.errors import RunFailed
from rlhf.experience import Columns, Group, Prompt, Sampling
from rlhf.metrics import Metrics

if TYPE_CHECKING:
    from rlhf.weights import Receipt, Weights

Handle = Any


@dataclass(frozen=True, slots=True)
class Published:
    """A version of the policy that engines can pull: what it is, and a handle to its `Weights`."""

    version: int
    fingerprint: str
    size_bytes: int
    weights: Handle

    def check(self, receipt: "Receipt") -> None:
        """Raises RunFailed when an engine took something else than this."""
        if (receipt.version, receipt.fingerprint) != (self.version, self.fingerprint):
            raise RunFailed(
                f"{receipt.engine} holds version {receipt.version} ({receipt.fingerprint}), published was "
                f"{self.version} ({self.fingerprint})"
            )


@dataclass(frozen=True, slots=True)
class Request:
    """What a rollout engine is asked for. `purpose` ("sample" or "evaluate") is part of each sample's seed address."""

    prompts: tuple[Prompt, ...]
    sampling: Sampling
    samples_per_prompt: int
    purpose: str


class Generator(Protocol):
    """Samples groups with its own copy of the policy. Does not judge and does not know the algorithm."""

    def setup(self) -> None:
        """The heavy part of construction; fails loudly, to the caller."""

    def load(self, weights: "Weights") -> "Receipt":
        """Takes a published version, verifies it (digests, names, probe) and stamps it on every later sample."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int, purpose: str
    ) -> Iterator[Group]:
        """Yields each group as soon as all its samples are finished.

        Seeds come from (run seed, purpose, prompt id, sample index); purpose is "sample" or "evaluate".
        """

    def close(self) -> None:
        """Gives back memory and ends every process that `setup` started."""


class Judge(Protocol):
    """Fills columns of a group. One judge, one or a few columns; says None where it cannot score."""

    def setup(self) -> None: ...

    def judge(self, group: Group) -> Columns: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Task:
    """Work for one worker: the prompts it concerns, and what to work on (prompts to answer, or a group to judge)."""

    number: int
    prompt_ids: tuple[int, ...]
    payload: Handle


@dataclass(frozen=True, slots=True)
class Result:
    """One finished group or column set of a task, or the error that ended the task for all its unfinished prompts.

    `seconds` is how long the worker spent on it. Without prompts it is a mark: the worker has advanced, nothing is
    finished. WorkerLost as error: the worker is gone and replaced, the prompts are free for another one.
    """

    task: int
    prompt_ids: tuple[int, ...]
    value: Handle
    error: Exception | None
    worker: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Replacements:
    """Workers that were replaced: `died` by themselves, `hung` and were ended, `left` with their node."""

    died: int
    hung: int
    left: int


class Workers(Protocol):
    """Some workers of one role, which may die, be replaced, join and leave. Never blocks longer than asked."""

    def submit(self, task: Task, worker: str | None) -> None:
        """Hands a task to one of `free`, or, with None, to whoever is free first."""

    def collect(self, timeout_s: float) -> list[Result]:
        """What has finished since the last call; waits up to timeout_s for the first. Each prompt of a task comes back
        once, finished or with the error that ended it."""

    def free(self) -> list[str]:
        """The workers that can start a task now: they hold the published weights, nothing to do, and are not
        leaving."""

    def size(self) -> int:
        """How many workers can work, busy or not. With 0 the workers watch their own deadline."""

    def holding(self) -> list[str]:
        """Who holds which prompts, at which version and for how long, one line a busy worker."""

    def load(self, published: Published) -> list["Receipt"]:
        """All workers take a published version, those that join later before they get work; raises WeightMismatch when
        one of them cannot verify it."""

    def replaced(self) -> "Replacements":
        """How many workers were replaced so far, by cause."""

    def fetch(self, handle: Handle) -> Any:
        """The value behind a handle, for the few callers that must look inside (evaluation)."""


class Learner(Protocol):
    """The owner of the policy and, where there is one, of its critic. `annotate`, `prepare`, `update` are called once a
    step, in this order."""

    @property
    def version(self) -> int:
        """Updates so far."""

    def annotate(self, groups: Handle) -> Handle:
        """The groups with the columns that only the learner can fill: old log-probs, LoRA's reference log-probs, a
        critic's values."""

    def prepare(self, groups: Handle) -> Handle:
        """The algorithm's `prepare`: credit assignment, a TrainBatch."""

    def update(self, batch: Handle) -> Metrics:
        """Epochs x minibatches; each optimizer step divides the summed loss once by its global count."""

    def evaluate(self, groups: Handle) -> Metrics:
        """The loss's own measures of groups with all their columns, under the current weights; changes nothing."""

    def publish(self) -> Published: ...

    def save(self, folder: Path) -> None:
        """Writes `policy/` (loads with from_pretrained), with LoRA `adapter/`, and `trainer/` (everything else) into an
        existing empty folder."""

    def load(self, folder: Path | None) -> None:
        """Goes on from a checkpoint; with None, from the start of the run. Ranks that died are started anew before."""

    def notice(self) -> bool:
        """Whether the run is to save and to call `move`: a machine of the learner's has announced its end, or there is
        another one now for a learner that found none before."""

    def move(self, folder: Path) -> bool:
        """Goes on from the checkpoint of now on machines that stay. False, and nothing has changed, where there are
        none to move to."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Where the prompts are. issued = pending + leased + complete + trained + dropped when nothing is lost or
    duplicated.

    `generated` are the leased prompts whose samples are stored and wait for judges.
    """

    issued: int
    pending: int
    leased: int
    generated: int
    complete: int
    trained: int
    dropped: int
    lost: int
    duplicated: int


@dataclass(frozen=True, slots=True)
class Lease:
    """A prompt handed out for generation. The ticket grows with each lease, so that the answer to an old lease is told
    from that to a new one; attempts are the earlier leases of the prompt that a worker died or hung in."""

    prompt_id: int
    ticket: int
    attempts: int


class Buffer(Protocol):
    """The durable heart: every call is one transaction, idempotent, and durable when it returns.

    A prompt moves pending -> leased -> complete -> trained(step), or -> dropped(reason).
    """

    def lease(self, count: int, owner: str, request: int) -> list[Lease]:
        """Takes up to `count` prompts for generation: pending ones first, lowest first, then new ids counting up; one
        with failed attempts comes alone. The same request number again gets the same leases."""

    def add_group(self, prompt_id: int, ticket: int, group: Handle) -> bool:
        """Stores a generated group of a leased prompt. False, and nothing stored, when the lease has ended."""

    def add_columns(self, prompt_id: int, columns: Handle) -> bool:
        """Stores a judge's columns; the prompt is complete once all required columns are there."""

    def release(self, prompt_id: int, ticket: int, reason: str, *, counted: bool) -> bool:
        """A lease that came to nothing: pending again, or dropped after too many counted ones (returns False then)."""

    def drop(self, prompt_id: int, reason: str) -> None: ...

    def unjudged(self) -> Mapping[int, frozenset[str]]:
        """Stored groups that lack required columns, and which."""

    def group(self, prompt_id: int) -> Handle: ...

    def ready(self, oldest_version: int) -> int:
        """How many complete groups can be taken, after sweeping out those older than oldest_version (pending again)."""

    def take(self, step: int, count: int) -> Handle:
        """The groups of a step in the order of their ids: as assigned before, else the `count` lowest complete ones."""

    def assigned(self, step: int) -> bool:
        """Whether the step's groups were taken before, by this process or one that died."""

    def commit(self, step: int, groups: Handle, version: int, fingerprint: str, metrics: Mapping[str, float]) -> None:
        """Makes a step part of history: its prompts are trained, the learner's columns stored. Again: a no-op."""

    def rewind(self, step: int) -> None:
        """The committed steps from `step` on are trained again, with the groups that they had."""

    def counts(self) -> Counts: ...

    def in_flight(self) -> int:
        """Prompts that are leased or complete but not yet assigned to a step."""


class Source(Protocol):
    """Where a step's groups come from."""

    def take(self, step: int) -> Handle:
        """Durable, scored, whole groups, in the order of their ids; waits with a deadline and keeps the pool busy
        ahead."""

    def sync(self, published: Published) -> Metrics:
        """Engines pull and verify a version; a no-op for data sets."""
