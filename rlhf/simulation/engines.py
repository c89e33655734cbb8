"""Rollout engines and judges that take virtual time and compute nothing: the `Workers` of a simulated team.

What an engine costs is a few numbers (`EngineCost`), what it answers is made by the caller. They keep the order of the
real pool: an engine works on its tasks one after the other, and takes new weights when the task that it holds is
finished. Whether the learner waits for that is the caller's choice: the real pool makes it wait.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlhf.experience import Prompt
from rlhf.interfaces import Handle, Published, Replacements, Request, Result, Task
from rlhf.weights import Receipt

ENGINE = "rollout-"
JUDGE = "judge-0"
NONE_REPLACED = Replacements(0, 0, 0)

# The samples' lengths in tokens of a prompt's group, by the prompt's id: the same whenever it is asked for.
Lengths = Callable[[int], Sequence[int]]
Answer = Callable[[Prompt, Sequence[int], int], Handle]  # a group of these lengths, stamped with a version


@dataclass(frozen=True, slots=True)
class EngineCost:
    """Seconds of one rollout engine.

        one decoding step       step_s + sequence_s x (sequences in it)
        a sequence's prompt     prompt_token_s x (tokens of the prompt)

    max_sequences decode at the same time. continuous: a finished sequence makes room for the next one at once (vLLM);
    otherwise groups follow each other, and each step of a group has all its sequences (transformers). load_s, taking a
    published version.
    """

    step_s: float
    sequence_s: float
    prompt_token_s: float
    max_sequences: int
    continuous: bool
    load_s: float


class _Coming(NamedTuple):
    at_s: float
    number: int  # of equal times the first posted comes first
    owner: str
    result: Result | None  # None: somebody is free again


class Timeline:
    """Virtual time in seconds, and the results that it brings. Time passes only when nobody has anything to collect."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._coming: list[_Coming] = []
        self._arrived: dict[str, deque[Result]] = {}
        self._numbers = itertools.count()

    def post(self, at_s: float, owner: str, result: Result | None) -> None:
        heapq.heappush(self._coming, _Coming(at_s, next(self._numbers), owner, result))

    def pass_until(self, at_s: float) -> None:
        """Lets time pass; what comes until then has arrived."""
        self.now_s = max(self.now_s, at_s)
        while self._coming and self._coming[0].at_s <= self.now_s:
            due = heapq.heappop(self._coming)
            if due.result is not None:
                self._arrived.setdefault(due.owner, deque()).append(due.result)

    def pass_for(self, seconds: float) -> None:
        self.pass_until(self.now_s + seconds)

    def collect(self, owner: str) -> list[Result]:
        """What has arrived for the owner; where nothing has for anybody, time jumps to whatever comes first."""
        if self._coming and not any(self._arrived.values()):
            self.pass_until(self._coming[0].at_s)
        found = self._arrived.pop(owner, deque())
        return list(found)


class SimulatedEngines:
    """Some engines of one cost; `busy_s` is how long they have sampled, all together.

    learner_waits: a version is loaded when every engine holds it; otherwise when those do that have nothing to do, and
    each of the others loads when its task is finished.
    """

    def __init__(
        self,
        timeline: Timeline,
        count: int,
        cost: EngineCost,
        lengths: Lengths,
        answer: Answer,
        *,
        learner_waits: bool,
    ) -> None:
        self._timeline, self._cost, self._lengths, self._answer = timeline, cost, lengths, answer
        self._free_at_s = [0.0] * count
        self._learner_waits = learner_waits
        self._loads_next: set[int] = set()  # engines that load when their task is finished
        self._version = -1
        self.busy_s = 0.0

    def submit(self, task: Task, worker: str | None) -> None:
        request: Request = task.payload
        engine = min(range(len(self._free_at_s)), key=lambda number: (self._free_at_s[number], number))
        if worker is not None:
            engine = int(worker.removeprefix(ENGINE))
        lengths = [self._lengths(prompt.id) for prompt in request.prompts]
        took = finish_times(self._cost, lengths, [len(prompt.token_ids) for prompt in request.prompts])
        start_s, before_s = max(self._free_at_s[engine], self._timeline.now_s), 0.0
        for took_s, prompt, own in sorted(zip(took, request.prompts, lengths, strict=True), key=lambda one: one[0]):
            group = self._answer(prompt, own, self._version)
            result = Result(task.number, (prompt.id,), group, None, f"{ENGINE}{engine}", took_s - before_s)
            self._timeline.post(start_s + took_s, "rollouts", result)
            before_s = took_s
        self._free_at_s[engine] = start_s + max(took)
        self._loads_next.discard(engine)
        self.busy_s += max(took)

    def collect(self, timeout_s: float) -> list[Result]:
        return self._timeline.collect("rollouts")

    def free(self) -> list[str]:
        now_s = self._timeline.now_s
        return [f"{ENGINE}{number}" for number, at_s in enumerate(self._free_at_s) if at_s <= now_s]

    def size(self) -> int:
        return len(self._free_at_s)

    def replaced(self) -> Replacements:
        return NONE_REPLACED

    def holding(self) -> list[str]:
        busy = [number for number, at_s in enumerate(self._free_at_s) if at_s > self._timeline.now_s]
        return [f"{ENGINE}{number} until second {self._free_at_s[number]:.1f}" for number in busy]

    def load(self, published: Published) -> list[Receipt]:
        """Time passes until the engines that the learner waits for hold the version."""
        if self._learner_waits:
            self._timeline.pass_until(max(*self._free_at_s, self._timeline.now_s) + self._cost.load_s)
        else:
            self._load_in_turn()
        self._version = published.version
        engines = range(len(self._free_at_s))
        return [Receipt(f"{ENGINE}{n}", published.version, published.fingerprint, 0.0, 0.0) for n in engines]

    def fetch(self, handle: Handle) -> Any:
        return handle

    def _load_in_turn(self) -> None:
        now_s = self._timeline.now_s
        busy = {engine for engine, at_s in enumerate(self._free_at_s) if at_s > now_s}
        for engine in busy - self._loads_next:
            self._free_at_s[engine] += self._cost.load_s
            self._timeline.post(self._free_at_s[engine], "rollouts", None)
        self._loads_next |= busy
        if len(busy) < len(self._free_at_s):
            self._timeline.pass_until(now_s + self._cost.load_s)


class SimulatedJudge:
    """One judge that takes the same time for each group and says the same of it."""

    def __init__(self, timeline: Timeline, group_s: float, columns: Callable[[Handle], Handle]) -> None:
        self._timeline, self._group_s, self._columns = timeline, group_s, columns
        self._free_at_s = 0.0

    def submit(self, task: Task, worker: str | None) -> None:
        self._free_at_s = max(self._free_at_s, self._timeline.now_s) + self._group_s
        value = self._columns(task.payload)
        result = Result(task.number, task.prompt_ids, value, None, JUDGE, self._group_s)
        self._timeline.post(self._free_at_s, "judge", result)

    def collect(self, timeout_s: float) -> list[Result]:
        return self._timeline.collect("judge")

    def free(self) -> list[str]:
        return [JUDGE] if self._free_at_s <= self._timeline.now_s else []

    def size(self) -> int:
        return 1

    def replaced(self) -> Replacements:
        return NONE_REPLACED

    def holding(self) -> list[str]:
        return [] if self.free() else [f"{JUDGE} until second {self._free_at_s:.1f}"]

    def load(self, published: Published) -> list[Receipt]:
        return []

    def fetch(self, handle: Handle) -> Any:
        return handle


def finish_times(cost: EngineCost, lengths: Sequence[Sequence[int]], prompt_tokens: Sequence[int]) -> list[float]:
    """When each group of one task is finished, in seconds after the task was begun.

    lengths, the tokens of each sample of each group; prompt_tokens, those of each group's prompt.
    """
    return _side_by_side(cost, lengths, prompt_tokens) if cost.continuous else _in_turn(cost, lengths, prompt_tokens)


def _side_by_side(cost: EngineCost, lengths: Sequence[Sequence[int]], prompt_tokens: Sequence[int]) -> list[float]:
    waiting = deque((group, length) for group, own in enumerate(lengths) for length in own)
    left, finished_s = [len(own) for own in lengths], [0.0] * len(lengths)
    running: list[tuple[int, int]] = []  # the step at which a sequence ends, and its group
    step, now_s = 0, 0.0
    while waiting or running:
        while waiting and len(running) < cost.max_sequences:
            group, length = waiting.popleft()
            now_s += cost.prompt_token_s * prompt_tokens[group]
            heapq.heappush(running, (step + length, group))
        end = running[0][0]
        now_s += (end - step) * (cost.step_s + cost.sequence_s * len(running))
        step = end
        while running and running[0][0] == step:
            _, group = heapq.heappop(running)
            left[group] -= 1
            if left[group] == 0:
                finished_s[group] = now_s
    return finished_s


def _in_turn(cost: EngineCost, lengths: Sequence[Sequence[int]], prompt_tokens: Sequence[int]) -> list[float]:
    spent = [
        cost.prompt_token_s * tokens + max(own) * (cost.step_s + cost.sequence_s * len(own))
        for own, tokens in zip(lengths, prompt_tokens, strict=True)
    ]
    return list(itertools.accumulate(spent))
