"""The chaos file: what is refused, and that all that is drawn depends on the seed alone."""

import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.chaos import points
from rlhf.chaos.plan import ChaosPlan, chosen_role, gap_s
from rlhf.config_file import dump, load_chaos
from rlhf.errors import BadInput

AT_A_POINT = {"point": "update: done"}
AT_RANDOM = {"every_s": 20.0, "count": 400}


def load(folder: Path, *faults: dict[str, Any], **others: Any) -> ChaosPlan:
    path = folder / "chaos.yaml"
    path.write_text(yaml.safe_dump({"faults": list(faults), **others}))
    return load_chaos(path)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"kind": "kil", "when": AT_A_POINT}, "'kil'"),
        ({"kind": "kill", "when": AT_A_POINT, "signal": 9}, "signal"),
        ({"kind": "kill", "when": {"point": "update: don"}}, "update: don"),
        ({"kind": "kill", "when": {}}, "exactly one of"),
        ({"kind": "kill", "roles": ["driver"], "when": {"after_s": [1.0], "every_s": 2.0}}, "after_s, every_s"),
        ({"kind": "kill", "when": {"after_steps": [1]}}, "roles"),
        ({"kind": "kill", "roles": ["driver"], "when": AT_A_POINT}, "roles"),
        ({"kind": "kill", "roles": ["nurse"], "when": AT_RANDOM}, "roles"),
        ({"kind": "kill", "when": {**AT_A_POINT, "count": 3}}, "count"),
        ({"kind": "stop", "when": AT_A_POINT}, "for_s"),
        ({"kind": "delay", "for_s": 1.0, "when": AT_RANDOM}, "point"),
        ({"kind": "kill", "when": {"point": "message: worker's answer"}}, "only be dropped"),
        ({"kind": "drop", "when": AT_A_POINT}, "what can be dropped"),
        ({"kind": "fill_disk", "mib": 4096, "for_s": 1.0, "when": AT_RANDOM}, "mib"),
        ({"kind": "corrupt", "what": "weather", "when": AT_RANDOM}, "what"),
    ],
)
def test_what_cannot_work_is_refused_with_the_place(tmp_path: Path, fault: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput) as refused:
        load(tmp_path, fault)
    assert said in str(refused.value) and "chaos.yaml" in str(refused.value)


def test_a_plan_that_is_written_and_read_again_is_the_same(tmp_path: Path) -> None:
    """What the processes of a team read is what the run wrote, defaults included."""
    plan = load(
        tmp_path,
        {"kind": "kill", "when": AT_A_POINT},
        {"kind": "stop", "roles": ["rollout"], "for_s": 2.0, "when": {"after_steps": [1, 2]}},
        {"kind": "kill", "roles": ["driver", "buffer"], "when": {"every_s": 1.0}},
        {"kind": "drop", "when": {"point": "message: worker's answer"}},
        {"kind": "fill_disk", "for_s": 1.0, "when": {"after_s": [3.0]}},
        seed=5,
        trace=["take: durable"],
    )
    (tmp_path / "again.yaml").write_text(dump(plan))
    assert load_chaos(tmp_path / "again.yaml") == plan
    assert [fault.when.times for fault in plan.faults] == [1, 2, 1, 1, 1]


def test_what_is_drawn_depends_on_seed_and_place_alone(tmp_path: Path) -> None:
    roles = ["driver", "trainer", "rollout"]
    fault = {"kind": "kill", "roles": roles, "when": AT_RANDOM}
    plan, same, other = (load(tmp_path, fault, fault, seed=seed) for seed in (1, 1, 2))
    drawn = [(gap_s(plan, 0, n), chosen_role(plan, 0, n)) for n in range(400)]
    assert drawn == [(gap_s(same, 0, n), chosen_role(same, 0, n)) for n in range(400)]
    assert drawn[0] != (gap_s(plan, 1, 0), chosen_role(plan, 1, 0)) and drawn[0] != (gap_s(other, 0, 0), None)
    # The mean of 400 exponential gaps of mean 20 has a standard deviation of 1.
    assert abs(statistics.mean(gap for gap, _ in drawn) - 20.0) < 4.0
    assert min([role for _, role in drawn].count(role) for role in roles) > 90


def test_without_a_chaos_file_a_point_tells_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    points.point("update: done", 3)
    assert not points.is_dropped("message: worker's answer", 3)
    heard = []

    class Ear:
        def reached(self, moment: str, subject: int | None) -> None:
            heard.append((moment, subject))

        def loses(self, message: str, subject: int | None) -> bool:
            return True

    points.listen(Ear())
    try:
        points.point("update: done", 3)
        assert heard == [("update: done", 3)] and points.is_dropped("message: worker's answer")
    finally:
        points.listen(None)
