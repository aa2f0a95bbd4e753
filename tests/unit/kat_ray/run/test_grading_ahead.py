"""Rollouts graded before they are asked for: what is used of it, and what is graded again."""

import threading
from contextlib import closing

import pytest

from kat_ray.errors import RewardError
from kat_ray.rewards.limits import Fault, GradingLimits, Outcome, Reply, Verdicts
from kat_ray.rewards.scoring import Scored
from kat_ray.run import probes
from kat_ray.run.grading_ahead import Ended, Found, GradingAhead
from kat_ray.run.probes import RolloutGrader
from kat_ray.types.records import Reward

ROLLOUTS = {i: Ended("p", [i, 7 * i], str(i)) for i in range(6)}


def part(*ids):
    return {i: ROLLOUTS[i] for i in ids}


def nothing():
    pass


class Grade:
    """Notes what it is asked; waits in each call until it may go on."""

    def __init__(self):
        self.asked, self.may_go_on, self.begun = [], threading.Event(), threading.Event()

    def __call__(self, rollouts, check):
        self.asked.append(sorted(rollouts))
        self.begun.set()
        while not self.may_go_on.wait(0.01):
            check()
        return {i: Found(Outcome.RIGHT, 1.0, {"f": Reply(float(sum(r.token_ids)))}) for i, r in rollouts.items()}


def test_what_ended_as_it_was_graded_is_not_graded_again():
    grade = Grade()
    with closing(GradingAhead(grade)) as ahead:
        ahead.begin(part(0, 1))
        grade.begun.wait()
        ahead.begin(part(2))  # waits for its turn, which does not come
        grade.may_go_on.set()
        changed = part(1) | {0: Ended("p", [0, 1], "0"), 3: ROLLOUTS[3]}
        assert ahead.take(changed | part(2), nothing) == {1: Found(Outcome.RIGHT, 1.0, {"f": Reply(8.0)})}
        assert grade.asked == [[0, 1]]
        assert ahead.take(part(0, 1), nothing) == {}, "nothing is remembered"


def test_what_was_not_reached_is_asked_for_again():
    late = {
        0: Found(Outcome.NOT_REACHED), 1: Found(None, None, {"f": Reply(fault=Fault.NOT_REACHED)}),
        2: Found(Outcome.RAN_OUT, None, {"f": Reply(fault=Fault.TIME)}), 3: Found(None),
    }  # fmt: skip
    with closing(GradingAhead(lambda *_: late)) as ahead:
        ahead.begin(part(0, 1, 2, 3))
        assert set(ahead.take(part(0, 1, 2, 3), nothing)) == {2, 3}


def test_an_error_comes_out_where_it_can_be_dealt_with():
    def fails(rollouts, check):
        raise RewardError("cannot be loaded")

    with closing(GradingAhead(fails)) as ahead:
        for number in range(3):
            ahead.begin(part(number))
        with pytest.raises(RewardError, match="cannot be loaded"):
            ahead.take(part(0), nothing)
        assert ahead.take({}, nothing) == {}


def test_what_ends_the_run_ends_what_is_being_graded():
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with closing(GradingAhead(Grade())) as ahead:  # it would wait for ever
        ahead.begin(part(0))
        with pytest.raises(Stop):
            ahead.take(part(0), stop)
        ahead.begin(part(1))  # and closing ends this one


class Scorer:
    """Rewards by the last token, which replies are of; asked in any thread."""

    def __init__(self):
        self.asked = []

    def ask(self, answers, check=nothing, spent=0.0):
        self.asked += answers
        return {i: {"last": Reply(float(a.token_ids[-1]))} for i, a in answers.items()}

    def score(self, answers, check=nothing, replies=None, seconds=0.0):
        assert list(replies) == list(answers)
        return Scored({i: Reward(replies[i]["last"].value) for i in answers}, {})

    def close(self):
        pass


def test_ids_are_those_that_were_sampled_whatever_their_text_is_tokenised_to():
    """Elsewhere text was tokenised again between turns, and other ids were learnt than had been sampled."""
    scorer, sampled = Scorer(), {0: ("p", [7, 7]), 1: ("p", [14]), 2: ("p", [3, 4, 7])}
    with closing(RolloutGrader({"p": "4"}, lambda ids: "answer 4", "integer", scorer=scorer)) as grader:
        grader.begin(sampled)
        graded = grader.grade(sampled | {1: ("p", [7, 7])})  # of the same text, and other ids: it is graded again
    assert graded.correct == {0: True, 1: True, 2: True}
    assert {i: r.value for i, r in graded.rewards.items()} == {0: 7.0, 1: 7.0, 2: 7.0}
    assert sorted(scorer.asked) == [0, 1, 1, 2]


@pytest.mark.parametrize("order", [(), ([5], [2, 0]), ([0, 1, 2, 3, 4, 5],), ([3], [3], [4])])
def test_a_step_is_graded_the_same_whatever_was_begun(order):
    """And each rollout once, unless it ended otherwise; the fifth was begun with other tokens, and one was cut."""
    rollouts = {i: ("p" if i % 2 else "q", [i, i + 1]) for i in range(6)}
    final = {i: rollouts[i] for i in (0, 1, 2, 3, 5)}
    early = rollouts | {5: ("p", [5, 9])}
    scorer = Scorer()
    with closing(RolloutGrader({"p": "4"}, lambda ids: str(ids[-1]), "integer", scorer=scorer)) as grader:
        for ids in order:
            grader.begin({i: early[i] for i in ids})
        graded = grader.grade(final)
    assert {i: r.value for i, r in graded.rewards.items()} == {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0, 5: 6.0}
    assert list(graded.rewards) == list(final) and graded.correct == {1: False, 3: True, 5: False}
    begun = {i for ids in order for i in ids}
    if len(order) == 1:
        assert sorted(scorer.asked) == [0, 1, 2, 3, 4, 5, 5]
    assert set(scorer.asked) >= set(final) and scorer.asked.count(5) >= 1 and {4} - begun <= {4} - {*scorer.asked}


class Clock:
    """Moves by what is graded alone; `begun` once a step looks at it."""

    def __init__(self):
        self.now, self.begun = 0.0, threading.Event()

    def monotonic(self):
        self.begun.set()
        return self.now


@pytest.mark.parametrize(("waits", "left"), [(True, (55.0, 7.0)), (False, (60.0, 0.0))])
def test_what_a_step_waits_for_is_taken_off_the_time_of_those_who_took_it(monkeypatch, waits, left):
    """Five seconds of the verifier, then seven of the functions, of a batch that a step finds running, or done."""
    clock, given, spent = Clock(), [], []

    def verify(texts, golds, verifier, pool, within, check):
        if waits:
            assert clock.begun.wait(60)
        given.append(within)
        clock.now += 5
        return Verdicts.of([True] * len(texts))

    class Slow(Scorer):
        def ask(self, answers, check=nothing, seconds=0.0):
            spent.append(seconds)
            clock.now += 7
            return super().ask(answers)

    monkeypatch.setattr(probes, "time", clock)
    monkeypatch.setattr(probes, "grade", verify)
    limits = GradingLimits(total_seconds=60.0)
    with closing(RolloutGrader({"p": "4"}, str, "integer", limits, Slow())) as grader:
        grader.begin({0: ("p", [1])})
        if not waits:
            grader._ahead._running.result(60)
        assert grader.grade({0: ("p", [1]), 1: ("p", [2])}).correct == {0: True, 1: True}
    assert (given, spent) == ([60.0, left[0]], [0.0, left[1]])
