"""How a lost actor is waited for, who hangs, and how many deaths a run bears: pure machines, times by hand."""

import pytest

from kat_ray.cluster.failure_policy import FailurePolicy
from kat_ray.cluster.hang_policy import HangPolicy
from kat_ray.cluster.heartbeat import HeartbeatReport
from kat_ray.cluster.revival import PAUSE, Revival, Step, Unavailable
from kat_ray.errors import UserError

OLD, NEW = HeartbeatReport(7, "", 0.0), HeartbeatReport(8, "", 0.0)


def revival(old_pid=7, start_timeout=100.0, hang_timeout=10.0):
    return Revival("sampler:0", old_pid, 0.0, start_timeout=start_timeout, hang_timeout=hang_timeout)


def test_another_process_that_answers_is_ready():
    machine = revival()
    assert machine.handle(0.0) is Step.PING
    assert machine.handle(0.1) is Step.WAIT
    assert machine.handle(0.5, Unavailable()) is Step.WAIT, "it is asked again after a pause"
    assert machine.handle(0.5 + PAUSE) is Step.PING
    assert machine.handle(3.0, NEW) is Step.READY and machine.pid == 8


def test_whoever_was_never_seen_is_ready_at_the_first_answer():
    machine = revival(old_pid=None)
    assert machine.handle(0.0) is Step.PING and machine.handle(1.0, OLD) is Step.READY


def test_an_old_process_that_lives_on_is_killed_once():
    machine = revival()
    assert machine.handle(0.0) is Step.PING
    assert machine.handle(1.0, OLD) is Step.KILL
    assert machine.handle(1.0 + PAUSE) is Step.PING
    assert machine.handle(2.0, OLD) is Step.WAIT, "its death takes a moment"
    assert machine.handle(2.0 + PAUSE) is Step.PING
    assert machine.handle(3.0, NEW) is Step.READY


def test_one_that_does_not_answer_is_killed_and_asked_again():
    machine = revival(hang_timeout=10.0)
    assert machine.handle(0.0) is Step.PING and machine.handle(9.9) is Step.WAIT
    assert machine.handle(10.0) is Step.KILL
    assert machine.handle(10.0 + PAUSE) is Step.PING


def test_one_that_is_dead_for_good_says_why_at_the_second_answer():
    machine = revival()
    gone = Unavailable(for_good=True, reason="no room on the device")
    machine.handle(0.0)
    assert machine.handle(1.0, gone) is Step.WAIT, "a call that was under way when it died may say so"
    assert machine.handle(1.0 + PAUSE) is Step.PING
    assert machine.handle(2.0, Unavailable()) is Step.WAIT
    assert machine.handle(2.0 + PAUSE) is Step.PING
    assert machine.handle(3.0, gone) is Step.WAIT, "not two in a row"
    machine.handle(3.0 + PAUSE)
    with pytest.raises(UserError, match="no room on the device"):
        machine.handle(4.0, gone)


def test_one_that_does_not_come_back_in_time_ends_the_run():
    machine = revival(start_timeout=5.0)
    machine.handle(0.0)
    with pytest.raises(UserError, match=r"sampler:0 did not come back within 5 s \(cluster.start_timeout\)"):
        machine.handle(5.1)


def policy():
    return HangPolicy(hang_timeout=20.0, start_timeout=100.0)


def test_rounds_are_a_quarter_of_the_timeout_apart():
    p = policy()
    assert [p.is_due(t) for t in (0.0, 4.9, 5.0, 9.0, 10.0)] == [True, False, True, False, True]


def test_no_answer_and_no_progress_are_hanging():
    p = policy()
    assert p.check("a", 0.0, None, answered=False) is None
    assert p.check("a", 20.0, None, answered=False) is None
    assert p.check("a", 21.0, None, answered=False) == "no answer for 21 s"
    stuck = HeartbeatReport(1, "score", 20.5)
    assert p.check("b", 0.0, stuck, answered=True) == "no progress for 20 s in 'score'"
    assert p.check("b", 0.0, HeartbeatReport(1, "score", 19.0), answered=True) is None


def test_one_that_is_being_started_has_the_start_timeout():
    p = policy()
    assert p.check("a", 0.0, None, answered=True) is None, "it is not there: Ray starts it"
    assert p.down_seconds("a", 30.0) == 30.0
    assert p.check("a", 30.0, None, answered=False) is None
    assert p.check("a", 129.0, None, answered=False) is None
    assert p.check("a", 131.0, None, answered=False) == "no answer for 101 s"
    p.is_ready("a")
    assert p.down_seconds("a", 200.0) == 0.0


def test_an_answer_ends_the_count():
    p = policy()
    p.check("a", 0.0, None, answered=False)
    p.check("a", 15.0, OLD, answered=True)
    assert p.check("a", 25.0, None, answered=False) is None, "asked anew"


def test_deaths_are_counted_by_actor_within_a_step():
    p = FailurePolicy(max_restarts=2)
    for _ in range(2):
        p.lost("sampler:0", "killed")
        p.lost("sampler:1", "killed")
    p.step_done()
    p.lost("sampler:0", "killed")
    p.lost("sampler:0", "killed")
    with pytest.raises(UserError, match=r"sampler:0 was lost 3 times in one step \(cluster.max_restarts = 2\)"):
        p.lost("sampler:0", "killed")
    assert p.restarts == {"sampler": 7}
