"""A Python function as a judge: f(prompts, completions, **columns) -> list[float | None], called with one group at a
time.

prompts are the prompt's content (a string, or its list of messages) once for each sample; completions the samples'
texts, strings for conversations too; columns the row's other columns, untouched, each once for each sample. None
means "cannot score" and stays None: nothing here turns a failure, a time-out or a missing value into a number.
"""

from typing import Any, NamedTuple

from rlhf.chaos.points import point
from rlhf.config import RewardSource
from rlhf.errors import BadInput, JudgeFailed
from rlhf.experience import REWARD, Columns, Group
from rlhf.judges.patience import refuse_unscored
from rlhf.judges.worker import FunctionNotFound, RewardFunction, WrongAnswer, call, error_text, load_function
from rlhf.judges.worker_process import WorkerGone, WorkerProcess

# How long a function's module may take to import before its first call (it may load a model).
IMPORT_TIMEOUT_S = 300.0
# How long the check before a run waits for that import: bad input is reported within ten seconds.
CHECK_TIMEOUT_S = 6.0
SHOWN_CHARACTERS = 80
RESERVED = frozenset({"prompts", "completions", "completion_ids"})


class Asked(NamedTuple):
    """What a reward function's signature says of the columns: those that it cannot be called without, and the names of
    the arguments for prompts and completions, which no column may have."""

    needs: frozenset[str]
    by_place: frozenset[str]


def check_reward_function(function: str, key: str) -> Asked:
    """What it asks of the columns. Raises BadInput, with the key, when it cannot be imported or called as a reward
    function; takes at most about six seconds.

    The import happens in a process of its own, which is ended again: nothing that the function needs is loaded here. An
    import that takes longer is not judged: `RewardFunctionJudge.setup` waits for it.
    """
    worker = WorkerProcess(function)
    try:
        missing = worker.wait_ready(CHECK_TIMEOUT_S)
    except TimeoutError:
        return Asked(frozenset(), frozenset())
    except WorkerGone as gone:
        raise BadInput(f"{key}: importing {function!r} ended the process with {gone.status}") from gone
    finally:
        worker.kill()
    if missing is not None:
        raise BadInput(f"{key}: {missing}")
    return Asked(worker.needs, worker.by_place)


class RewardFunctionJudge:
    """Fills `reward`. With `isolate` in a worker process with a time limit, else in this one, for a debugger.

    Raises JudgeFailed, naming the prompt and showing the samples, when the function raises (with its traceback),
    hangs, ends its process, or does not return one finite number or None for each sample. A worker that hung or died
    is replaced at the next call. One call at a time.
    """

    def __init__(self, config: RewardSource) -> None:
        if config.function is None:
            raise ValueError("reward.function is not set: the run file names a reward model")
        self._config, self._name = config, config.function
        self._function: RewardFunction | None = None
        self._worker: WorkerProcess | None = None

    def setup(self) -> None:
        """Imports the function, or starts the worker and waits until it has. Raises BadInput when that fails."""
        if self._config.isolate:
            self._worker = self._start()
            return
        try:
            self._function = load_function(self._name)
        except FunctionNotFound as error:
            raise BadInput(f"reward.function: {error}") from error

    def judge(self, group: Group) -> Columns:
        """The reward of each sample of the group."""
        taken = RESERVED & set(group.prompt.columns)
        if taken:
            raise JudgeFailed(
                f"rename the data's columns {sorted(taken)}: the reward function's arguments are called so", again=False
            )
        count = len(group.samples)
        request = (
            [group.prompt.content] * count,
            [sample.text for sample in group.samples],
            [sample.token_ids.tolist() for sample in group.samples],
            {name: [value] * count for name, value in group.prompt.columns.items()},
        )
        scores = self._isolated(group, request) if self._config.isolate else self._direct(group, request)
        point("reward: scored", group.prompt.id)
        columns = Columns(group.prompt.id, {REWARD: scores}, {})
        refuse_unscored(group, columns, f"reward function {self._name} returned None for each")
        return columns

    def close(self) -> None:
        """Ends the worker and everything that it started."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def _start(self) -> WorkerProcess:
        worker = WorkerProcess(self._name)
        missing: str | None
        try:
            missing = worker.wait_ready(IMPORT_TIMEOUT_S)
        except TimeoutError:
            missing = f"importing {self._name!r} took more than {IMPORT_TIMEOUT_S:g} s"
        except WorkerGone as gone:
            missing = f"importing {self._name!r} ended its process with {gone.status}"
        if missing is not None:
            worker.kill()
            raise BadInput(f"reward.function: {missing}")
        return worker

    def _isolated(self, group: Group, request: tuple[Any, ...]) -> list[float | None]:
        if self._worker is None:
            self._worker = self._start()
        limit_s = self._config.timeout_s
        try:
            answer = self._worker.call(request, limit_s)
        except TimeoutError as error:
            self.close()
            raise self._failed(
                group, f"did not answer within {limit_s:g} s (reward.timeout_s); its process was killed"
            ) from error
        except WorkerGone as gone:
            self.close()
            raise self._failed(group, f"ended its process with {gone.status}") from gone
        if "raised" in answer:
            raise self._failed(group, f"raised:\n{answer['raised']}")
        if "wrong" in answer:
            raise self._failed(group, f"gave a wrong answer: {answer['wrong']}")
        scores: list[float | None] = answer["scores"]
        return scores

    def _direct(self, group: Group, request: tuple[Any, ...]) -> list[float | None]:
        if self._function is None:
            raise JudgeFailed("the reward function was not imported: call setup before judge")
        try:
            return call(self._function, *request)
        except WrongAnswer as error:
            raise self._failed(group, f"gave a wrong answer: {error}") from error
        except (Exception, SystemExit) as error:
            raise self._failed(group, f"raised:\n{error_text(error, 2)}") from error

    def _failed(self, group: Group, what: str) -> JudgeFailed:
        samples = "\n".join(f"  sample {s.index}: {_shortened(s.text)!r}" for s in group.samples)
        return JudgeFailed(
            f"reward function {self._name} {what}\n"
            f"prompt {group.prompt.id} (row {group.prompt.row}): {_shortened(group.prompt.text)!r}\n{samples}",
            f"reward function {self._name} {_in_one_line(what)}",
        )


def _in_one_line(what: str) -> str:
    """Without the traceback, but with the error at its end."""
    lines = what.strip().splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0]} {_shortened(lines[-1])}"


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}… ({len(text)} characters)"
