"""What follows the death of the trainer, of all, and of both again and again, and the notice of a machine's end:
`launch.run` over a real ledger and real checkpoints, with stand-ins for models. Real processes and signals:
tests/test_recovery.py; real nodes: tests/test_cluster_nodes.py."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.buffer.schema import FILE_NAME
from rlhf.buffer.store import ExperienceBuffer
from rlhf.cli import launch
from rlhf.cluster import Cluster
from rlhf.config import RunConfig
from rlhf.errors import ActorDied, RunFailed, TrainerDied
from rlhf.experience import REWARD, Group, Prompt
from rlhf.loop import Team
from rlhf.metrics import Metrics
from rlhf.observers import Several, read_jsonl
from rlhf.sources import JudgeDesk, PolicySource
from rlhf.team import Order, assemble
from rlhf.testing import CountingLearner, LengthJudge, MadeUpGenerator
from rlhf.workers import LocalWorkers, answers, judgement


class Supply:
    """Prompts of one kind; none held out unless a test says so."""

    fingerprint = "made up"
    dropped: dict[str, int] = {}  # noqa: RUF012  a stand-in, never changed
    longest = 2
    heldout: tuple[Prompt, ...] = ()

    def prompt(self, prompt_id: int) -> Prompt:
        return Prompt(prompt_id, prompt_id, 0, "p", "p", np.array([1, 2], dtype=np.int32), {})

    def heldout_prompts(self) -> list[Prompt]:
        return list(self.heldout)

    def describe(self) -> str:
        return "made up"


class Notice:
    """A machine's end is announced when so many updates are done, after `before` more questions; `room`, whether there
    is another machine, for each time that the learner asks. Without one it is due again once `found_at` updates are
    done."""

    def __init__(self, at: int, room: list[bool], found_at: int) -> None:
        self.at, self.room, self.found_at, self.before = at, room, found_at, 0

    def is_due(self, version: int) -> bool:
        if not self.room or version < self.at:
            return False
        self.before -= 1
        return self.before < 0

    def finds_room(self) -> bool:
        self.at = self.found_at
        return self.room.pop(0)


class MortalLearner(CountingLearner):
    """Raises what `deaths` holds next for the update or the load that it is at; a dead one must be loaded first."""

    def __init__(self, deaths: dict[str, list[Exception]], notice: Notice) -> None:
        super().__init__()
        self._deaths, self._dead, self._notice = deaths, False, notice
        self.loads: list[Path | None] = []

    def update(self, batch: list[Group]) -> Metrics:
        assert not self._dead
        self._die_at(f"update {self.version}")
        return super().update(batch)

    def load(self, folder: Path | None) -> None:
        if self.loads:
            self._die_at("load again")
        self._dead = False
        self.loads.append(folder)
        super().load(folder)

    def notice(self) -> bool:
        return self._notice.is_due(self.version)

    def move(self, folder: Path) -> bool:
        if not self._notice.finds_room():
            return False
        self.load(folder)
        return True

    def _die_at(self, place: str) -> None:
        if self._deaths.get(place):
            self._dead = True
            raise self._deaths[place].pop(0)


class Notes(Several):
    """Keeps what is said and the metrics of each step."""

    def __init__(self) -> None:
        super().__init__([])
        self.said: list[str] = []
        self.rows: list[dict[str, float]] = []

    def note(self, message: str) -> None:
        self.said.append(message)

    def step(self, step: int, metrics: Any) -> None:
        self.rows.append(dict(metrics))


class Stage:
    """Runs `launch.run` with teams of stand-ins; knows every learner and every prompt that was answered."""

    def __init__(self, run_dir: Path, config: RunConfig, deaths: dict[str, list[Exception]]) -> None:
        self.run_dir, self.config, self.deaths = run_dir, config, deaths
        self.notes, self.learners, self.answered = Notes(), list[MortalLearner](), list[int]()
        self.notice, self.supply = Notice(0, [], 0), Supply()

    @contextmanager
    def team(self, order: Order, job: object) -> Iterator[tuple[Team, PolicySource]]:
        generator = MadeUpGenerator(7)
        generator.answered = self.answered
        buffer = ExperienceBuffer(order.run_dir / FILE_NAME, frozenset({REWARD}), None, 3)
        buffer.open()
        self.learners.append(MortalLearner(self.deaths, self.notice))
        desk = LocalWorkers("reward", partial(judgement, LengthJudge()), None)
        rollouts = LocalWorkers("rollout-0", partial(answers, generator), generator.load)
        yield assemble(
            order, self.learners[-1], buffer, rollouts, [JudgeDesk("reward", frozenset({REWARD}), True, desk)]
        )
        buffer.close()

    def run(self) -> str:
        return launch.run(self.config, Cluster(), self.run_dir, self.supply, in_process=True, observer=self.notes)

    def trained(self) -> list[list[int]]:
        return [step for learner in self.learners for step in learner.trained]


@pytest.fixture
def stage(tmp_path: Path, tiny_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stage]:
    def build(deaths: dict[str, list[Exception]]) -> Stage:
        loop = {"num_steps": 7, "groups_per_step": 2, "checkpoint_every": 3, "max_restarts": 2, "max_staleness": 1}
        made = Stage(tmp_path, tiny_run({}, {}, loop, {}), deaths)
        monkeypatch.setattr(launch, "_team", made.team)
        return made

    return build


def steps_of(numbers: Sequence[int]) -> list[list[int]]:
    return [[2 * number, 2 * number + 1] for number in numbers]


def test_the_trainer_alone_goes_back_and_replays_without_generating(stage: Callable[..., Stage]) -> None:
    """Dies at step 5, two steps behind its checkpoint, and then goes on in the same team."""
    run = stage({"update 5": [TrainerDied("rank 1 died")]})
    assert run.run() == "done"
    (learner,) = run.learners
    assert learner.loads == [None, run.run_dir / "checkpoints/step-000003"]
    assert run.trained() == steps_of([0, 1, 2, 3, 4, 3, 4, 5, 6])
    assert run.answered == list(range(14))  # each prompt once: nothing was generated for steps 3 and 4 again
    assert [row["faults/trainer_restarts"] for row in run.notes.rows] == [0] * 5 + [1] * 4
    assert run.notes.rows[-1]["faults/restarts"] == 0
    assert any("The trainer alone is built again" in line for line in run.notes.said)


def test_before_the_first_checkpoint_the_trainer_begins_anew(stage: Callable[..., Stage]) -> None:
    run = stage({"update 2": [TrainerDied("rank 0 died")]})
    assert run.run() == "done"
    assert run.learners[0].loads == [None, None]
    assert run.trained() == steps_of([0, 1, 0, 1, 2, 3, 4, 5, 6]) and run.answered == list(range(14))


def test_a_death_while_the_trainer_is_built_again_takes_the_whole_team(stage: Callable[..., Stage]) -> None:
    run = stage({"update 4": [TrainerDied("rank 1 died")], "load again": [TrainerDied("rank 0 died")]})
    assert run.run() == "done"
    assert len(run.learners) == 2 and run.trained() == steps_of([0, 1, 2, 3, 3, 4, 5, 6])
    assert run.answered == list(range(14))
    last = run.notes.rows[-1]
    assert (last["faults/trainer_restarts"], last["faults/restarts"]) == (1, 1)


def test_the_death_of_another_actor_takes_the_whole_team(stage: Callable[..., Stage]) -> None:
    run = stage({"update 4": [ActorDied("an actor died")]})
    assert run.run() == "done"
    assert len(run.learners) == 2 and run.notes.rows[-1]["faults/restarts"] == 1


def test_deaths_in_a_row_without_a_new_step_end_the_run(stage: Callable[..., Stage]) -> None:
    """Replayed steps are no progress; a new step is."""
    run = stage({"update 4": [TrainerDied("rank 1 died")] * 2 + [ActorDied("all died")]})
    with pytest.raises(RunFailed, match="3 times in a row without a new step"):
        run.run()
    assert run.answered == list(range(12))
    apart = stage({f"update {number}": [TrainerDied("rank 1 died")] for number in (1, 3, 4, 6)})
    apart.run_dir = run.run_dir / "apart"
    apart.run_dir.mkdir()
    assert apart.run() == "done" and apart.notes.rows[-1]["faults/trainer_restarts"] == 4


def test_a_notice_saves_at_the_next_safe_point_and_moves_without_training_or_generating_again(
    stage: Callable[..., Stage],
) -> None:
    """After two updates, one before a checkpoint is due, while the next step waits for its groups."""
    run = stage({})
    run.notice = Notice(2, [True], 0)
    run.notice.before = 1  # the loop's question; the next one is the wait's
    assert run.run() == "done"
    (learner,) = run.learners
    assert learner.loads == [None, run.run_dir / "checkpoints/step-000002"]
    assert run.trained() == steps_of(range(7)) and run.answered == list(range(14))
    moves = [(row["faults/trainer_moves"], row["faults/trainer_restarts"]) for row in run.notes.rows]
    assert moves == [(0, 0)] * 2 + [(1, 0)] * 5
    assert any("the trainer has moved to nodes that stay, and goes on at step 2" in line for line in run.notes.said)


def test_without_another_place_a_notice_saves_and_the_run_goes_on(stage: Callable[..., Stage]) -> None:
    """No place at 1; one at 5, where it moves. Without any the rank dies with its machine, and the checkpoint of the
    notice is where it goes back to."""
    run = stage({})
    run.notice = Notice(1, [False, True], 5)
    assert run.run() == "done"
    folder = run.run_dir / "checkpoints"
    assert run.learners[0].loads == [None, folder / "step-000005"] and run.trained() == steps_of(range(7))
    doomed = stage({"update 2": [TrainerDied("the node of rank 0 is gone")]})
    doomed.run_dir = run.run_dir / "doomed"
    doomed.run_dir.mkdir()
    doomed.notice = Notice(1, [False], 0)
    assert doomed.run() == "done"
    assert doomed.learners[0].loads == [None, doomed.run_dir / "checkpoints/step-000001"]
    assert doomed.trained() == steps_of([0, 1, 1, 2, 3, 4, 5, 6]) and doomed.answered == list(range(14))
    assert doomed.notes.rows[-1]["faults/trainer_moves"] == 0


def test_deaths_while_it_moves_are_deaths(stage: Callable[..., Stage]) -> None:
    run = stage({"load again": [TrainerDied("rank 0 died")]})
    run.notice = Notice(4, [True], 0)
    assert run.run() == "done"
    assert run.trained() == steps_of(range(7)) and run.answered == list(range(14))
    last = run.notes.rows[-1]
    assert (last["faults/trainer_moves"], last["faults/trainer_restarts"], last["faults/restarts"]) == (0, 1, 0)


@pytest.mark.parametrize("at", [0, 7])
def test_a_notice_during_an_evaluation_loses_none(stage: Callable[..., Stage], at: int) -> None:
    """Before the first step and after the last one: the run does not end without its last evaluation."""
    run = stage({})
    run.notice, run.supply.heldout = Notice(at, [True], 0), (run.supply.prompt(-1),)
    assert run.run() == "done"
    assert [row["step"] for row in read_jsonl(run.run_dir / "evaluations.jsonl")] == [0, 7]
    assert run.trained() == steps_of(range(7))
    assert run.learners[0].loads == [None, run.run_dir / f"checkpoints/step-{at:06d}"]
