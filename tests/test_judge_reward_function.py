"""The reward-function judge with real worker processes. Not covered: Ray (the judge actor's tests), macOS."""

import dataclasses
import datetime
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rlhf.config import RewardConfig
from rlhf.errors import BadInput, JudgeFailed
from rlhf.judges.reward_function import RewardFunctionJudge, check_reward_function

REWARDS = '''
import math, os, re, signal, subprocess, sys
from pathlib import Path

PROBE = Path(__file__).parent

def length(prompts, completions):
    return [float(len(c)) for c in completions]

def some(prompts, completions):
    return [0.0, None, 1.0][: len(completions)]

def flags(prompts, completions):
    return (c.endswith("1") for c in completions)

def numpy_flags(prompts, completions):
    import numpy
    return numpy.array([c.endswith("1") for c in completions])

def raises(prompts, completions):
    return [{"a": 1}[completions[0]]]

def hangs(prompts, completions):
    (PROBE / "pid").write_text(str(os.getpid()))
    while True:
        pass

def hangs_in_c(prompts, completions):
    """Holds the interpreter lock: no thread and no signal handler of Python's runs."""
    (PROBE / "pid").write_text(str(os.getpid()))
    re.match(r"(a+)+$", "a" * 64 + "b")

def too_few(prompts, completions):
    return [1.0] * (len(completions) - 1)

def word(prompts, completions):
    return [1.0, "good", 2.0][: len(completions)]

def nan(prompts, completions):
    return [1.0, math.nan, 2.0][: len(completions)]

def nothing(prompts, completions):
    pass

def unordered(prompts, completions):
    return {1.0, 2.0, 3.0}

def endless(prompts, completions):
    while True:
        yield 1.0

def changes_its_lists(prompts, completions):
    completions.clear()
    return []

def huge(prompts, completions):
    return [1.0, 2.0, -1e30]

def huge_whole(prompts, completions):
    return [1.0, 10**400, 1.0]

def interrupts(prompts, completions):
    raise KeyboardInterrupt("by itself")

def half_a_character(prompts, completions):
    raise ValueError("\\ud83d")

def closes(prompts, completions):
    os.closerange(3, 64)
    Path(PROBE / "pid").write_text(str(os.getpid()))
    while True:
        pass

async def later(prompts, completions):
    return [1.0] * len(completions)

def one_argument(prompts):
    return []

def asks(prompts, completions, answer, *, kind, completion_ids, weight=1.0):
    return [1.0] * len(completions)

def talks(prompts, completions):
    print("printed by the function")
    os.write(1, b"\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x02{}")
    os.system("echo printed by a child")
    return [1.0] * len(completions)

def dies(prompts, completions):
    os.kill(os.getpid(), signal.SIGKILL)

def exits(prompts, completions):
    os._exit(3)

def leaves(prompts, completions):
    sys.exit(4)

def sees(prompts, completions, completion_ids, answer, when):
    ids = [list(i) for i in completion_ids]
    assert prompts == ["say a"] * 2 and completions == ["answer 0", "answer 1"], (prompts, completions)
    assert ids == [[10, 11], [10]] and answer == [{"x": (1, 2)}] * 2, (ids, answer)
    assert [w.year for w in when] == [2026, 2026], when
    return [1.0, 2.0]

def sees_all(prompts, completions, **columns):
    assert sorted(columns) == ["answer", "completion_ids", "when"], sorted(columns)
    return [1.0, 2.0]

def changes_what_it_gets(prompts, completions, answer):
    for p, a in zip(prompts, answer):
        p.append({"role": "assistant", "content": "x"})
        a["x"].append(1)
    return [float(10 * len(p) + len(a["x"])) for p, a in zip(prompts, answer)]

def leaves_a_child(prompts, completions):
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    (PROBE / "pid").write_text(f"{os.getpid()} {child.pid}")
    return [1.0] * len(completions)

once = PROBE / "once"

def dies_once(prompts, completions):
    if not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return [5.0] * len(completions)

NUMBER = 3
'''


@pytest.fixture
def rewards(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def judge_with(rewards):
    judges = []

    def build(name, isolate=True, timeout_s=60.0):
        judge = RewardFunctionJudge(RewardConfig(function=f"{rewards}:{name}", isolate=isolate, timeout_s=timeout_s))
        judges.append(judge)
        judge.setup()
        return judge

    yield build
    for judge in judges:
        judge.close()


def alive(pid: int) -> bool:
    """Whether a process runs: one that is only waiting to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def group_of(make_group):
    return lambda n: make_group(7, [None] * n, [n - i for i in range(n)], {}, {})


@pytest.mark.parametrize("isolate", [True, False])
def test_scores_come_back_in_order_and_fill_the_reward(judge_with, group_of, isolate):
    """A judge's columns fit its group."""
    group = group_of(2)
    columns = judge_with("length", isolate).judge(group)
    assert columns.scores == {"reward": [8.0, 8.0]} and columns.prompt_id == 7
    assert [s.scores["reward"] for s in group.with_columns(columns).samples] == [8.0, 8.0]


@pytest.mark.parametrize("isolate", [True, False])
def test_none_stays_none_and_zero_stays_zero(judge_with, group_of, isolate):
    """(0.0, None, 1.0), by identity: None is not 0 and 0.0 is not missing."""
    assert judge_with("some", isolate).judge(group_of(3)).scores["reward"] == [0.0, None, 1.0]


def test_truth_values_and_generators_are_numbers(judge_with, group_of):
    """`completion == answer` is a common reward."""
    for name in ("flags", "numpy_flags"):
        assert judge_with(name).judge(group_of(2)).scores["reward"] == [0.0, 1.0]


@pytest.mark.parametrize("isolate", [True, False])
def test_columns_arrive_untouched(judge_with, make_group, isolate):
    """A tuple within a dict and a date, which JSON would change; each once a sample; the token ids where they are
    asked for."""
    columns = {"answer": {"x": (1, 2)}, "when": datetime.date(2026, 11, 22)}
    group = make_group(7, [None, None], [2, 1], {}, columns)
    for name in ("sees", "sees_all"):
        assert judge_with(name, isolate).judge(group).scores["reward"] == [1.0, 2.0]
    assert judge_with("length", isolate).judge(group).scores["reward"] == [8.0, 8.0]


def test_a_column_that_hides_an_argument_is_refused(judge_with, make_group):
    """Named, with the remedy."""
    with pytest.raises(JudgeFailed, match=r"rename the data's columns \['completions'\]"):
        judge_with("length").judge(make_group(7, [None], [1], {}, {"completions": 1}))


@pytest.mark.parametrize("isolate", [True, False])
def test_an_error_carries_the_functions_traceback_and_the_samples(judge_with, group_of, rewards, isolate):
    """File, line, error, prompt and samples; none of our own frames; the worker goes on."""
    judge = judge_with("raises", isolate)
    for _ in range(2):
        with pytest.raises(JudgeFailed) as failure:
            judge.judge(group_of(2))
        message = str(failure.value)
        assert "KeyError: 'answer 0'" in message and f'File "{rewards}", line' in message
        assert "prompt 7 (row 7): 'say a'" in message and "sample 1: 'answer 1'" in message
        assert "worker.py" not in message and "reward_function.py" not in message


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("too_few", "returned 2 values for 3 completions"),
        ("word", "value for sample 1 is 'good' of type str"),
        ("nan", "value for sample 1 is nan"),
        ("nothing", "returned a NoneType, expected a list of 3 numbers or None"),
        ("unordered", "returned a set, expected a list of 3"),
        ("endless", "returned more than 3 values for 3 completions"),
        ("changes_its_lists", "returned 0 values for 3 completions"),
        ("huge", "value for sample 2 is -1e.30, too large to learn from"),
        ("huge_whole", "value for sample 1 is inf"),
    ],
)
def test_wrong_answers_are_named(judge_with, group_of, name, said, isolate):
    """Never padded, cut, or turned into a number."""
    with pytest.raises(JudgeFailed, match=said):
        judge_with(name, isolate).judge(group_of(3))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("interrupts", r"raised:\n[\s\S]*KeyboardInterrupt: by itself"),
        ("half_a_character", r"raised:\n[\s\S]*ValueError: \\ud83d"),
        ("closes", "closed the channel to its parent, and was killed"),
    ],
)
def test_what_only_a_process_of_its_own_survives_is_named(judge_with, group_of, name, said):
    """Ctrl-C's exception raised by the function itself, a text that no ledger takes, and a channel that it closed."""
    with pytest.raises(JudgeFailed, match=said) as failure:
        judge_with(name).judge(group_of(1))
    failure.value.reason.encode()


def test_prints_do_not_enter_the_answers(judge_with, group_of, capfd):
    """Prints, raw writes that look like a message, and a child's output all go to stderr."""
    judge = judge_with("talks")
    assert judge.judge(group_of(2)).scores["reward"] == [1.0, 1.0]
    assert judge.judge(group_of(3)).scores["reward"] == [1.0, 1.0, 1.0]
    judge.close()
    output = capfd.readouterr()
    assert output.out == "" and "printed by a child" in output.err


@pytest.mark.parametrize("name", ["hangs", "hangs_in_c"])
def test_a_hanging_function_is_killed_and_replaced(judge_with, group_of, rewards, name):
    """The error says limit and prompt, the process is gone, the next call has a new one. Not covered: how punctual
    the limit is."""
    judge = judge_with(name, timeout_s=0.5)
    pids = set()
    for _ in range(2):
        with pytest.raises(JudgeFailed, match=r"did not answer within 0.5 s \(reward.timeout_s\)[\s\S]*prompt 7"):
            judge.judge(group_of(1))
        pids.add(int((rewards.parent / "pid").read_text()))
    assert len(pids) == 2 and not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("isolate", [True, False])
def test_a_function_that_calls_exit_has_raised(judge_with, group_of, isolate):
    """SystemExit is an error of the function, and does not end this process."""
    with pytest.raises(JudgeFailed, match=r"raised:[\s\S]*SystemExit: 4"):
        judge_with("leaves", isolate).judge(group_of(1))


@pytest.mark.parametrize(("name", "said"), [("dies", r"signal 9 \(SIGKILL\)"), ("exits", "exit code 3")])
def test_a_dying_worker_is_named_by_what_ended_it(judge_with, group_of, name, said):
    """Not a broken pipe, not a reward."""
    with pytest.raises(JudgeFailed, match=f"ended its process with {said}[\\s\\S]*prompt 7"):
        judge_with(name).judge(group_of(1))


def test_a_worker_that_died_is_replaced(judge_with, group_of):
    """The first call fails, the second, of a new process, succeeds."""
    judge = judge_with("dies_once")
    with pytest.raises(JudgeFailed, match=r"signal 11 \(SIGSEGV\)"):
        judge.judge(group_of(1))
    assert judge.judge(group_of(1)).scores["reward"] == [5.0]


def test_a_worker_killed_between_calls_is_replaced_after_a_clear_error(judge_with, group_of):
    """From outside, as an out-of-memory killer does."""
    judge = judge_with("length")
    judge.judge(group_of(1))
    os.kill(judge._worker.pid, signal.SIGKILL)
    with pytest.raises(JudgeFailed, match=r"signal 9 \(SIGKILL\)"):
        judge.judge(group_of(1))
    assert judge.judge(group_of(1)).scores["reward"] == [8.0]


def test_close_leaves_no_process(judge_with, group_of, rewards):
    """Neither the worker nor what the function started. Closing again is harmless."""
    judge = judge_with("leaves_a_child")
    judge.judge(group_of(1))
    judge.close()
    judge.close()
    pids = [int(pid) for pid in (rewards.parent / "pid").read_text().split()]
    wait_until_gone(pids)


@pytest.mark.parametrize("name", ["hangs", "hangs_in_c"])
def test_the_worker_dies_with_its_parent(rewards, name):
    """The parent is killed with -9 while the function hangs, in Python and inside C; control: it was alive before."""
    program = textwrap.dedent(f"""
        import threading
        from rlhf.judges.worker_process import WorkerProcess
        worker = WorkerProcess({f"{rewards}:{name}"!r})
        assert worker.wait_ready(60.0) is None
        worker.call((["p"], ["c"], [[1]], {{}}), 600.0)
    """)
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait_for(lambda: (rewards.parent / "pid").exists() and (rewards.parent / "pid").read_text())
        worker = int((rewards.parent / "pid").read_text())
        assert alive(worker)
    finally:
        parent.kill()
        parent.wait()
    wait_until_gone([worker])


def wait_until_gone(pids):
    wait_for(lambda: not any(alive(pid) for pid in pids))


def wait_for(condition):
    """Polls; the test's own time limit ends a wait for something that never comes."""
    while not condition():
        os.sched_yield()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("rewards.py:length", "there is no file rewards.py"),
        ("{file}:lenght", r"has no 'lenght'; what it has: .*length"),
        ("{file}:NUMBER", "'NUMBER' in .* is a int, expected a function"),
        ("{file}", "neither package.module:name nor path/to/file.py:name"),
        ("no_such_package.rewards:f", "there is no module no_such_package"),
        ("rlhf.no_such_part:f", "there is no module rlhf.no_such_part"),
        ("{broken}:f", r"importing .*broken.py failed:[\s\S]*ZeroDivisionError"),
        ("{leaves}:f", "ended the process with exit code 5"),
        ("{file}:later", "later is async, and is called as a plain function"),
        ("{file}:one_argument", r"one_argument takes \(prompts\), and is called as f\(prompts, completions"),
    ],
)
def test_bad_functions_are_refused_before_the_run(rewards, spec, said):
    """What was found, what is expected; by the check and by setup alike."""
    (broken := rewards.parent / "broken.py").write_text("1 / 0\n")
    (leaves := rewards.parent / "leaves.py").write_text("import os\nos._exit(5)\n")
    function = spec.format(file=rewards, broken=broken, leaves=leaves)
    with pytest.raises(BadInput, match=f"reward.function: .*{said}"):
        check_reward_function(function, "reward.function")
    if "leaves" not in spec:
        for isolate in (True, False):
            with pytest.raises(BadInput, match=said):
                RewardFunctionJudge(RewardConfig(function=function, isolate=isolate)).setup()


def test_an_import_that_interrupts_itself_is_named(tmp_path):
    """Only the worker's process may take KeyboardInterrupt for an error of the module: here it is somebody's Ctrl-C."""
    (tmp_path / "interrupts.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(BadInput, match=r"importing .*interrupts.py:f failed:[\s\S]*KeyboardInterrupt"):
        check_reward_function(f"{tmp_path / 'interrupts.py'}:f", "reward.function")


def test_the_check_names_the_columns_that_a_function_asks_for(rewards):
    """Arguments with a default, the token ids and **columns are not asked for."""
    assert check_reward_function(f"{rewards}:asks", "reward.function").needs == {"answer", "kind"}
    assert check_reward_function(f"{rewards}:sees_all", "reward.function").needs == frozenset()


def test_good_functions_pass_the_check_and_load_nothing_here(tmp_path, rewards):
    """By file (whose neighbours it may import) and by module; what the module imports stays out of this process."""
    (tmp_path / "neighbour_of_rewards.py").write_text("def f(prompts, completions):\n    return []\n")
    (tmp_path / "uses.py").write_text("from neighbour_of_rewards import f\n")
    check_reward_function(f"{rewards}:length", "reward.function")
    check_reward_function(f"{tmp_path / 'uses.py'}:f", "reward.function")
    check_reward_function("colorsys:rgb_to_hsv", "reward.function")
    assert "neighbour_of_rewards" not in sys.modules


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("completions, prompts", "its first two arguments are completions and prompts"),
        ("completions, answer=None, **kw", "its first two arguments are completions and answer"),
        ("texts, prompts", "its first two arguments are texts and prompts"),
        ("prompts, completion_ids, **kw", "its first two arguments are prompts and completion_ids"),
        ("prompts, completions, answer, /", "answer can be given by place alone"),
    ],
)
def test_a_function_for_another_call_is_refused(tmp_path, arguments, said):
    """It would score the prompts without a word; other names for the two are free."""
    (tmp_path / "free.py").write_text("def f(questions, texts, /, weight=1.0): return []")
    check_reward_function(f"{tmp_path / 'free.py'}:f", "reward.function")
    (tmp_path / "other.py").write_text(f"def f({arguments}): return [1.0] * len(completions)")
    with pytest.raises(BadInput, match=rf"reward.function: .*: {said}.*expected f\(prompts, completions"):
        check_reward_function(f"{tmp_path / 'other.py'}:f", "reward.function")


@pytest.mark.parametrize("isolate", [True, False])
def test_a_function_that_changes_what_it_gets_changes_nothing_else(judge_with, group_of, isolate):
    """Two messages after one append each, one value: 21 for every sample, and the run's own group as before."""
    plain = group_of(2)
    said = [{"role": "user", "content": "say a"}]
    group = dataclasses.replace(
        plain, prompt=dataclasses.replace(plain.prompt, content=said, columns={"answer": {"x": []}})
    )
    judge = judge_with("changes_what_it_gets", isolate)
    assert [judge.judge(group).scores["reward"] for _ in range(2)] == [[21.0, 21.0]] * 2
    assert group.prompt.content == [{"role": "user", "content": "say a"}]
    assert group.prompt.columns == {"answer": {"x": []}}
