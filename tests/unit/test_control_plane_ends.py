"""Runs that are told to end, or whose node is about to go, and what they come to when they are gone on with."""

import signal
import time

import pytest

from actors.cluster.signals import Preempted
from kat_ray.errors import UserError
from tests.support.scenarios import LAYOUTS, ROLES, Run, check, finish, small


def resumed(run, result):
    """What it comes to when it is gone on with."""
    return finish(Run(0, run.changes, start_from=result))


# --- told to end -------------------------------------------------------------------------------------------------

WAITS = [
    ("sampler", "ready"), ("scorer", "ready"), ("learner", "start"), ("sampler", "connect"),
    ("sampler", "generate"), ("scorer", "score"), ("monitor", "start_step"), ("monitor", "close_step"),
    ("monitor", "learn"), ("learner", "collect"), ("learner", "learn"), ("learner", "weights"),
    ("sampler", "load_weights"), ("learner", "snapshot"), ("learner", "written"),
]  # fmt: skip


@pytest.mark.parametrize(("actor", "method"), WAITS)
@pytest.mark.parametrize("nth", [1, 2])
def test_sigterm_in_each_wait(actor, method, nth):
    run = Run()
    told = []
    run.cluster.when(actor, method, lambda: told.append(time.monotonic()) or run.cluster.terminate(), nth=nth)
    result = run.go()
    check(result)
    if result.error is None:  # as it ended all the same
        assert (actor, method) in (("learner", "written"), ("learner", "snapshot")) or not told
        return
    assert isinstance(result.error, Preempted) and run.stop.signal == signal.SIGTERM
    assert result.cluster.scheduler.now - told[0] < 5.0  # seconds of the learner's work, no timeout
    resumed(run, result)


@pytest.mark.parametrize("nth", [3, 4])
def test_rewards_of_recent_probes_go_on_from_a_checkpoint(nth):
    """The next step is sampled ahead, and has counted its own probes, which the checkpoint must not hold."""
    changes = LAYOUTS["imputed cuts"] | {"run": {"checkpoint_every": 1, "steps": 6}}

    def given(result):
        return [metrics.get("probe/q", 0.0) for _, metrics in result.run.metrics]

    expected = given(Run(0, changes).go())
    assert len(expected) == 6 and len({*expected}) >= 3, "q must move for this to mean anything"
    run = Run(0, changes)
    run.cluster.when("learner:0", "learn", lambda: run.cluster.kill("learner:0"), nth=nth)
    assert given(finish(run, "kill:learner:0")) == expected
    run = Run(0, changes)
    run.cluster.when("learner", "learn", run.cluster.terminate, nth=nth)
    result = run.go()
    check(result)
    assert isinstance(result.error, Preempted)
    assert given(resumed(run, result)) == expected


@pytest.mark.parametrize("role", ROLES)
def test_a_budget_s_threshold_goes_on_whoever_dies_and_from_a_checkpoint(role):
    changes = small("sampled ahead") | {"run": {"checkpoint_every": 1, "steps": 6}}

    def given(result):
        cuts = [row.cut for _, rows in sorted(result.run.traces.items()) for row in rows]
        return cuts, [metrics.get("kat/threshold") for _, metrics in result.run.metrics]

    cuts, thresholds = expected = given(Run(0, changes).go())
    assert len({*thresholds}) >= 4 and sum(cut is not None for cut in cuts) > 3
    run = Run(0, changes)
    run.cluster.when("scorer", "score", lambda: run.cluster.kill(role), nth=14)
    assert given(finish(run, f"kill:{role}")) == expected
    run = Run(0, changes)
    run.cluster.when("scorer", "score", run.cluster.terminate, nth=14)
    result = run.go()
    assert isinstance(result.error, Preempted)
    assert given(resumed(run, result)) == expected


@pytest.mark.parametrize("role", ROLES)
def test_sigterm_while_an_actor_is_started_again(role):
    run = Run()
    run.cluster.when("scorer", "score", lambda: run.cluster.kill(role), nth=14)
    run.cluster.when("scorer", "score", lambda: run.cluster.after(0.3, run.cluster.terminate), nth=14)
    result = run.go()
    check(result)
    assert isinstance(result.error, Preempted)
    assert result.cluster.scheduler.now < 1030
    resumed(run, result)


def test_sigterm_and_then_the_learner_dies_over_the_last_checkpoint():
    run = Run(0, {"run": {"checkpoint_every": 0}})
    run.cluster.when("sampler:0", "generate", run.cluster.terminate, nth=2)
    run.cluster.when("learner:0", "snapshot", lambda: run.cluster.kill("learner:0"))
    result = run.go()
    check(result)
    assert isinstance(result.error, UserError) and "the learner died meanwhile" in str(result.error)
    resumed(run, result)


def test_sigterm_with_a_frozen_learner_ends_when_the_grace_is_over():
    run = Run(0, {"cluster": {"hang_timeout": 100.0}})
    run.cluster.when("learner:0", "learn", lambda: run.cluster.freeze("learner:0"), nth=2)
    run.cluster.when("learner:0", "learn", run.cluster.terminate, nth=2)
    result = run.go()
    check(result)
    assert isinstance(result.error, UserError) and "run.grace_seconds" in str(result.error)
    resumed(run, result)


def test_sigterm_while_a_frozen_scorer_is_told_of_a_lost_sampler():
    run = Run()
    told = []
    run.cluster.when("scorer:1", "score", lambda: run.cluster.freeze("scorer:1"), nth=5)
    run.cluster.when("scorer:1", "score", lambda: run.cluster.kill("sampler:0"), nth=5)
    run.cluster.when("scorer:0", "abandon", lambda: told.append(time.monotonic()) or run.cluster.terminate())
    result = run.go()
    check(result)
    assert isinstance(result.error, Preempted)
    assert result.cluster.scheduler.now - told[0] < 5.0


# --- gone on with ------------------------------------------------------------------------------------------------


def told_to_end(changes=None):
    """A run that was told to end in its second step of three, with a checkpoint of each; and its result."""
    run = Run(0, {"run": {"checkpoint_every": 1}, **(changes or {})})
    run.cluster.when("learner:0", "learn", run.cluster.terminate, nth=2)
    result = run.go()
    assert isinstance(result.error, Preempted) and sorted(result.checkpoints.written) == [1, 2]
    return run, result


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_that_the_ranks_find_damaged_is_passed_over(ranks):
    run, result = told_to_end({"learner": {"world_size": ranks}})
    again = Run(0, run.changes, start_from=result)
    again.world.damaged.add("/nowhere/run/checkpoints/step-2")
    finish(again)
    assert {"weights are damaged", "going on from step 1 instead of 2"} <= set(again.notes)


def test_no_checkpoint_is_whole():
    run, result = told_to_end()
    again = Run(0, run.changes, start_from=result)
    again.world.damaged |= {f"/nowhere/run/checkpoints/step-{n}" for n in (1, 2)}
    finish(again)
    assert "going on from step 0 instead of 2" in again.notes


def test_a_learner_that_dies_while_it_verifies():
    run, result = told_to_end()
    again = Run(0, run.changes, start_from=result)
    again.cluster.when("learner:0", "find_damage", lambda: again.cluster.kill("learner:0"))
    finish(again, "kill:learner:0")


# --- a node that is about to go ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["plain", "two of each", "sampled ahead"])
@pytest.mark.parametrize(("role", "method", "nth"), [("sampler", "generate", 3), ("learner:0", "learn", 2)])
def test_what_was_learnt_is_saved_before_its_node_goes(layout, role, method, nth):
    """While the next step is sampled, or at the end of the one that is learnt. Then the node goes."""
    changes = {**LAYOUTS[layout], "run": {"checkpoint_every": 0}}
    run = Run(0, changes)
    run.cluster.when(role, method, lambda: run.cluster.drain("learner:0"), nth=nth)
    run.cluster.when("learner:0", "collect", lambda: run.cluster.lose("learner:0"), nth=3)
    finish(run, "drain:learner:0", "lose:learner:0")
    assert "node learner: with the learner is going away: each step is saved from now on" in run.notes
    assert "going on from step 2" in run.notes


def test_without_notice_it_is_lost():
    run = Run(0, {"run": {"checkpoint_every": 0}})
    run.cluster.when("learner:0", "collect", lambda: run.cluster.lose("learner:0"), nth=3)
    finish(run, "lose:learner:0")
    assert "going on from step 0" in run.notes


def test_a_learner_that_dies_while_it_is_saved():
    run = Run(0, {"run": {"checkpoint_every": 0}})
    run.cluster.when("sampler", "generate", lambda: run.cluster.drain("learner:0"), nth=3)
    run.cluster.when("learner:0", "snapshot", lambda: run.cluster.lose("learner:0"))
    finish(run, "drain:learner:0", "lose:learner:0")


def test_a_node_without_a_learner_may_go():
    run = Run(0, {"run": {"checkpoint_every": 0}})
    run.cluster.when("sampler", "generate", lambda: run.cluster.drain("sampler:1"), nth=3)
    finish(run, "drain:sampler:1")
    assert not any("is going away" in note for note in run.notes)
