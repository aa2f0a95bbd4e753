"""Reward functions in child processes: what hangs, dies, forks or eats, and what is left of it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kat_ray.rewards.child import GradingChild
from kat_ray.rewards.grader_pool import GraderPool
from kat_ray.rewards.left_behind import MOST_LEFT
from kat_ray.rewards.limits import Call, Fault, GradingLimits, Reply
from kat_ray.rewards.scoring import _silent
from tests.unit.kat_ray.rewards.functions import GOOD, TASKS, answers, scorer, values

NASTY = r"""
import os, sys, time

def score(completions, **kwargs):
    (what,) = completions
    if what == "hangs":
        time.sleep(1000)
    if what == "spins":
        while True: pass
    if what == "prints":
        for _ in range(200):
            print('[1, "value", 9.0]' * 2000)
            os.write(1, b'[1, "value", 9.0]\n' * 500)
        sys.stderr.write("x" * 5_000_000)
    if what == "reads":
        return [float(len(sys.stdin.read()))]
    if what == "eats":
        return [len(bytearray(4 << 30))]
    if what == "dies":
        os._exit(3)
    if what == "kills":
        os.kill(os.getpid(), 9)
    if what == "forks" or what == "forks and hangs":
        if (child := os.fork()) == 0:
            time.sleep(1000)
        with open(__file__ + ".pids", "a") as pids: print(child, file=pids)
        if what == "forks and hangs": time.sleep(1000)
    if what == "returns twice":
        os.fork()
    if what == "who":
        return [float(os.getpid())]
    return [0.25]
"""
NASTIEST = {
    "hangs": "took longer than reward.seconds = 2",
    "spins": "took longer than reward.seconds = 2",
    "prints": None,
    "forks": None,
    "returns twice": None,
    "eats": "took more memory than reward.memory_gib = 1",
    "dies": "ended its process (exit code 3)",
    "kills": "ended its process (signal 9)",
    "forks and hangs": "took longer than reward.seconds = 2",
}


def is_alive(pid):
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(what, seconds=60.0):
    until = time.monotonic() + seconds
    while not what() and time.monotonic() < until:
        time.sleep(0.01)
    assert what()


def test_what_hangs_dies_forks_prints_or_eats_costs_its_own_reward_alone(file):
    """And nothing of it is left running. A good answer follows each bad one."""
    name = file(NASTY)
    texts = [text for nasty in NASTIEST for text in (nasty, "good")]
    with scorer({name: 1.0}, seconds=2.0) as made:
        scored = made.score(answers(*texts, "reads"))
    for text, reward in zip(texts, scored.rewards.values(), strict=False):
        said = NASTIEST.get(text)
        assert (reward.value, reward.error) == ((0.25, "") if said is None else (None, f"score: {said}")), text
    assert scored.rewards[len(texts)].value == 0.0, "there is nothing to read"
    assert (scored.metrics["reward/errors"], scored.metrics["reward/timeouts"]) == (3, 3)
    assert scored.metrics["reward/part/score"] < 0.25
    pids = list(map(int, Path(name.removesuffix(":score") + ".pids").read_text().split()))
    assert len(pids) == 2
    wait_until(lambda: not any(map(is_alive, pids)))


def test_nothing_is_left_running_of_a_driver_that_was_killed(file):
    """A function may hang with what it forked, and no one is left to end it; an alarm would not reach all of it."""
    name = file(NASTY)
    code = (
        "import sys\n"
        "from kat_ray.rewards.child import GradingChild\n"
        "from kat_ray.rewards.limits import Call, GradingLimits\n"
        "from kat_ray.rewards.task import Task\n"
        "child = GradingChild(GradingLimits(seconds=900.0), [sys.argv[1]])\n"
        "assert child.start(60.0)\n"
        "print(child._child.pid, flush=True)\n"
        "child.ask(Call(sys.argv[1], Task('p', 'p').arguments('forks and hangs', ())), 900.0)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.PIPE, text=True) as driver:
        grader = int(driver.stdout.readline())
        pids = Path(name.removesuffix(":score") + ".pids")
        wait_until(lambda: pids.exists() and pids.read_text().endswith("\n"))
        driver.kill()
    wait_until(lambda: not any(map(is_alive, [grader, int(pids.read_text())])))


def test_a_function_that_waits_for_all_its_children_waits_for_none_of_ours(file):
    code = "import os\n\ndef score(completions, **kwargs): return [float(os.wait()[0])]\n"
    with scorer({file(code): 1.0}, seconds=20.0) as made:
        assert (
            made.score(answers("a")).rewards[0].error == "score: ChildProcessError: [Errno 10] No child processes"
        )


def test_a_process_that_a_function_forked_answers_nothing(file):
    with scorer({file(NASTY): 1.0}) as made:
        rewards = made.score(answers("who", "returns twice", *["who"] * 30)).rewards
        assert {r.value for i, r in rewards.items() if i != 1} == {float(made._pool._children[0]._child.pid)}


def test_answers_that_are_not_reached_in_a_step_are_late_and_the_next_step_is_graded(file):
    with scorer({file(NASTY): 1.0}, processes=2, total_seconds=1.5) as made:
        scored = made.score(answers(*["hangs"] * 6))
        assert values(scored) == [None] * 6 and scored.metrics["reward/timeouts"] == 6
        assert "not done within reward.step_seconds = 1.5" in scored.rewards[0].error
        assert scored.rewards[5].error == "score: not reached within reward.step_seconds = 1.5"
        made._pool.start(1)
        assert values(made.score(answers("good"))) == [0.25]


def test_what_ends_a_run_ends_its_grading_long_before_the_step_s_time(file):
    """With the processes in the middle of a call, or still importing what grades."""

    def check():
        raise KeyboardInterrupt

    slow = "import time; time.sleep(1000)\n" + GOOD
    for code, start in ((NASTY, True), (slow, False)):
        with scorer({file(code): 1.0}, processes=2, seconds=900.0, total_seconds=900.0) as made:
            if start:
                made._pool.start(2)
            children = list(made._pool._of(2))
            with pytest.raises(KeyboardInterrupt):
                made.score(answers("hangs", "" if start else "hangs"), check)
            assert not any(child._child is not None for child in children), "nobody works on"
            if start:  # the run may go on, from an older step: one of the two had nothing to do when it was killed
                assert values(made.score(answers("", ""))) == [0.25, 0.25]


def test_all_processes_import_before_a_step_s_time_begins(file):
    """The first answers may be few: those of the first rollouts that have ended."""
    with scorer({file(GOOD): 1.0}, processes=2) as made:
        made.score(answers("a"))
        assert [child._ready for child in made._pool._of(2)] == [True, True]


def test_hashes_are_the_same_in_every_child(file):
    """So that a set or a dictionary's hash is no reason why a run that goes on has other rewards."""
    name = file("def score(completions): return [hash(completions[0]) % 1000003]\n")
    found = []
    for _ in range(2):
        with scorer({name: 1.0}) as made:
            found += values(made.score(answers("abc")))
    assert found[0] == found[1]


LEAVES = """
import os, time

def helper():
    if os.fork() == 0:
        time.sleep(1000)
        os._exit(0)

helper()  # what its import starts is the function's own

def leave(own_session):
    if (first := os.fork()) == 0:
        if own_session:
            os.setsid()  # and its parent is gone
            if os.fork():
                os._exit(0)
        with open(__file__ + ".pids", "a") as pids: print(os.getpid(), file=pids)
        time.sleep(1000)
        os._exit(0)
    if own_session:
        os.waitpid(first, 0)

def score(completions, **kwargs):
    leave(completions[0] == "daemon")
    return [1.0]

def dead(completions, **kwargs):
    if os.fork() == 0:
        os._exit(0)
    return [1.0]
"""


@pytest.mark.parametrize("what", ["child", "daemon"])
def test_processes_that_answers_leave_running_do_not_add_up(file, what):
    """Each has limits of its own, so that a function which leaves one for each answer would take all there is."""
    name = file(LEAVES)
    with scorer({name: 1.0}) as made:
        assert values(made.score(answers(*[what] * (MOST_LEFT + 14)))) == [1.0] * (MOST_LEFT + 14)
        pids = list(map(int, Path(name.removesuffix(":score") + ".pids").read_text().split()))
        wait_until(lambda: sum(map(is_alive, pids)) <= MOST_LEFT)
        assert all(map(is_alive, pids[:MOST_LEFT])), "a pool that a function keeps stays"
        grader = made._pool._children[0]._child.pid
        assert is_alive(grader)
    if what == "child":
        wait_until(lambda: not any(map(is_alive, pids)))
    for pid in filter(is_alive, pids):
        os.kill(pid, 9)


def test_dead_processes_that_nobody_waits_for_do_not_add_up(file):
    with scorer({file(LEAVES, "dead"): 1.0}) as made:
        assert values(made.score(answers(*["x"] * 60))) == [1.0] * 60
        grader = made._pool._children[0]._child.pid
        stats = [stat.read_text().rpartition(")")[2].split()[:2] for stat in Path("/proc").glob("[0-9]*/stat")]
        assert sum(state == "Z" and int(parent) == grader for state, parent in stats) <= MOST_LEFT + 1


def test_a_child_whose_parent_is_gone_ends(file):
    child = GradingChild(GradingLimits(), [file(GOOD)])
    try:
        assert child.start(60.0)
        process = child._child
        process.stdin.close()
        assert process.wait(timeout=60) == -9, "with all that is in its group"
    finally:
        child._child = None
        process.stdout.close()


def test_a_request_that_the_child_does_not_read_costs_its_time_alone(file):
    """More than a pipe holds, while the child is at work on something that came back."""
    code = "import os, signal\ndef score(completions):\n    return [1.0]\n"
    with GradingChild(GradingLimits(seconds=1.0), [file(code)]) as child:
        assert child.start(60.0)
        os.kill(child._child.pid, 19)  # SIGSTOP
        reply = child.ask(Call(file(code), TASKS["text"].arguments("x" * 5_000_000, ())))
        assert reply.fault is Fault.TIME
        assert child.ask(Call(file(code), TASKS["text"].arguments("x", ()))).value == 1.0


def test_what_is_not_reached_says_so_and_is_no_silence(file):
    """A child that is still starting: else its function would have nothing to say, and the others would count."""
    slow = file("import time\ntime.sleep(60)\ndef score(completions):\n    return [1.0]\n")
    with GradingChild(GradingLimits(1, 30.0, 0.5, fields="reward."), (slow,)) as child:
        reply = child.ask(Call(slow, TASKS["text"].arguments("four", ())), within=0.1)
    assert reply.fault is Fault.NOT_REACHED and reply.error == "not reached within reward.step_seconds = 0.5"
    found = [{slow: reply, "format": Reply(1.0)}] * 2
    assert _silent(["text", "text"], found) == {"text": frozenset()}


@pytest.mark.parametrize(
    ("graders", "children"),
    [("math", 2), ("environment", 2), ("problems", 2), ("f.py:f", 3), ("format", 3), ("f.py:f math", 2)],
)
def test_a_child_that_has_a_library_to_import_is_started_for_several_answers(graders, children):
    with GraderPool(GradingLimits(processes=3), graders.split()) as pool:
        assert len(pool._of(5)) == children
