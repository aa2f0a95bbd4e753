"""What interleavings do to a run: each is built on a fake cluster, on purpose, and its result is that of any other.

`tests.support.scenarios` says what must be the same: rows kept, cuts, calibration, weights.
"""

import signal
import time
from types import SimpleNamespace

import pytest

from actors.cluster.signals import Preempted
from actors.sampler.settings import SamplerSettings
from actors.sampler.student_sampler import StudentSampler
from kat_ray.errors import UserError
from kat_ray.types.records import GenerateRequest, RolloutSpec
from tests.support.scenarios import (
    LAYOUTS,
    Run,
    check,
    check_schedule,
    compare,
    config_of,
    make_engine,
    small,
    undisturbed,
)

ROLES = ("sampler:1", "scorer:0", "monitor:0", "learner:0")
ELASTIC = LAYOUTS["elastic"]


def finish(run, *done):
    """Its result, which is that of a run that nothing was done to; `done` was."""
    result = run.go()
    check(result)
    assert result.error is None, result.error
    assert result.finished
    happened = [line.split(":", 1)[1] for line in result.cluster.log]
    assert set(done) <= set(happened), f"{done} were to happen, {happened} did"
    compare(result, undisturbed(run.changes))
    return result


def resumed(run, result):
    """What it comes to when it is gone on with."""
    again = Run(0, run.changes, start_from=result)
    return finish(again)


# --- what all others are compared with ---------------------------------------------------------------------------


def test_an_undisturbed_run_depends_on_no_interleaving():
    for seed in range(1, 6):
        finish(Run(seed))


@pytest.mark.parametrize("changes", [{}, small("plain")], ids=["plain", "small"])
def test_the_plain_run_has_rollouts_of_every_kind(changes):
    ended = Run(0, changes).go().run.summary["rollouts_ended"]
    assert min(ended[reason] for reason in ("trapped", "eos", "max_tokens")) >= 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_death_of_each_role_in_each_layout(layout):
    for role in ("sampler:0", "scorer:0", "monitor:0", "learner:0"):
        run = Run(1, LAYOUTS[layout])
        run.cluster.when("scorer", "score", lambda role=role, run=run: run.cluster.kill(role), nth=14)
        finish(run, f"kill:{role}")


# --- one failure -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("nth", [1, 6, 12, 20])
def test_a_death_while_chunks_are_scored(role, nth):
    run = Run()
    run.cluster.when("scorer", "score", lambda: run.cluster.kill(role), nth=nth)
    finish(run, f"kill:{role}")


@pytest.mark.parametrize("at", ["begin", "end"])
@pytest.mark.parametrize(
    ("role", "method"),
    [
        ("sampler:0", "ready"), ("sampler:0", "connect"), ("sampler:0", "generate"), ("sampler:0", "load_weights"),
        ("scorer:0", "ready"), ("scorer:0", "score"),
        ("monitor:0", "start_step"), ("monitor:0", "admit"), ("monitor:0", "observe"), ("monitor:0", "close_step"),
        ("monitor:0", "learn"),
        ("learner:0", "address"), ("learner:0", "start"), ("learner:0", "weights"), ("learner:0", "collect"),
        ("learner:0", "learn"), ("learner:0", "snapshot"), ("learner:0", "written"),
    ],
)  # fmt: skip
def test_a_death_in_each_call(role, method, at):
    """Before it is done, and when it is done and nobody knows it."""
    for seed in (0, 1, 2):
        run = Run(seed)
        run.cluster.when(role, method, lambda run=run: run.cluster.kill(role), at=at)
        finish(run, f"kill:{role}")


@pytest.mark.parametrize("seconds", [0.15, 0.2, 0.22, 0.25, 0.28, 0.3])
def test_a_lost_sampler_whose_first_chunk_is_late(seconds):
    """It reaches the scorer after that was told to forget its rollouts, while these are under way again."""
    run = Run(0, {"scorer": {"replicas": 1}})
    run.cluster.one_node = True  # or the chunk would be lost with its owner
    run.cluster.when("sampler:0", "generate", lambda: run.cluster.delay("scorer:0", "score", seconds))
    run.cluster.when("scorer:0", "score", lambda: run.cluster.kill("sampler:0"), at="send")
    finish(run, "kill:sampler:0")


def test_a_decision_that_comes_after_the_next_chunk_was_sent():
    """A chunk is on its way when one of its rollouts is cut, and then its scorer dies: another one scores it, and
    has to let go of what was cut.
    """
    run = Run()

    def lose() -> float:
        run.cluster.after(0.2, lambda: run.cluster.kill("scorer:1"))
        return 0.5

    run.cluster.delay("monitor", "observe", 0.06, nth=27, at="answer")  # cuts three rollouts of step 2
    run.cluster.when("scorer:1", "score", lose, nth=15, at="send")  # brings more of them
    finish(run, "kill:scorer:1")


@pytest.mark.parametrize("role", ROLES)
def test_a_frozen_actor_is_found_and_replaced(role):
    run = Run()
    run.cluster.when("scorer", "score", lambda: run.cluster.freeze(role), nth=14)
    plain = Run().go().cluster.scheduler.now
    result = finish(run, f"freeze:{role}", f"ray.kill:{role}")
    hang = run.config.cluster.hang_timeout
    assert hang < result.cluster.scheduler.now - plain < 3 * hang


def test_a_learner_that_freezes_while_it_learns():
    run = Run()
    run.cluster.when("learner:0", "learn", lambda: run.cluster.freeze("learner:0"), nth=2)
    finish(run, "freeze:learner:0", "ray.kill:learner:0")


def test_a_learner_rank_that_dies_while_the_other_waits_for_it():
    run = Run(0, {"learner": {"world_size": 2}})
    run.cluster.when("learner:1", "learn", lambda: run.cluster.kill("learner:1"), nth=2)
    finish(run, "kill:learner:1")


@pytest.mark.parametrize("role", ["scorer:0", "sampler:1"])
def test_a_node_that_is_lost_with_its_records(role):
    run = Run()
    run.cluster.when("scorer", "score", lambda: run.cluster.lose(role), nth=14)
    finish(run, f"lose:{role}")


def test_records_that_are_lost_when_all_rollouts_have_ended():
    for method in ("close_step", "learn"):
        run = Run()
        run.cluster.when("monitor", method, lambda run=run: run.cluster.lose("scorer:0"), nth=2)
        finish(run, "lose:scorer:0")


def test_the_next_step_is_sampled_while_the_batch_is_on_its_way_to_the_learner():
    """With staleness 1 the samplers hold the weights for it."""
    run = Run(0, LAYOUTS["sampled ahead"])
    collected, started = [], []
    run.cluster.delay("learner:0", "collect", 30.0, nth=1)
    run.cluster.when("learner:0", "learn", lambda: collected.append(run.cluster.scheduler.now))
    for sampler in ("sampler:0", "sampler:1"):
        run.cluster.when(sampler, "generate", lambda: started.append(run.cluster.scheduler.now), nth=2)
    finish(run)
    assert max(started) < collected[0] - 20.0


@pytest.mark.parametrize("nth", [1, 2])
def test_records_that_are_lost_while_the_next_step_is_sampled(nth):
    run = Run(0, LAYOUTS["sampled ahead"])
    run.cluster.when("learner:0", "collect", lambda: run.cluster.lose("scorer:0"), nth=nth, at="send")
    finish(run, "lose:scorer:0")


def test_weights_that_are_lost_while_they_are_published():
    run = Run()
    run.cluster.when("sampler:0", "load_weights", lambda: run.cluster.lose("learner:0"), nth=2, at="send")
    finish(run, "lose:learner:0")


# --- two failures ------------------------------------------------------------------------------------------------


def test_a_scorer_and_the_monitor_at_once():
    for nth in range(1, 22, 3):
        run = Run()
        kill = run.cluster.kill
        run.cluster.when("scorer", "score", lambda kill=kill: [kill("scorer:0"), kill("monitor:0")], nth=nth)
        finish(run, "kill:scorer:0", "kill:monitor:0")


def test_both_scorers_at_once():
    run = Run()
    run.cluster.when("scorer", "score", lambda: [run.cluster.kill(f"scorer:{i}") for i in (0, 1)], nth=9)
    finish(run, "kill:scorer:0", "kill:scorer:1")


def test_both_samplers_at_once():
    run = Run()
    run.cluster.when("scorer", "score", lambda: [run.cluster.kill(f"sampler:{i}") for i in (0, 1)], nth=9)
    finish(run, "kill:sampler:0", "kill:sampler:1")


def test_a_learner_that_dies_while_it_restores():
    run = Run(0, {"run": {"checkpoint_every": 1}})
    run.cluster.when("learner:0", "learn", lambda: run.cluster.kill("learner:0"), nth=3)
    run.cluster.when("learner:0", "restore", lambda: run.cluster.kill("learner:0"))
    result = finish(run, "kill:learner:0")
    assert len([line for line in result.cluster.log if line.endswith(":kill:learner:0")]) == 2


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


def test_a_sampler_that_dies_again_while_it_takes_its_weights():
    run = Run()
    run.cluster.when("sampler:0", "generate", lambda: run.cluster.kill("sampler:0"), nth=2)
    run.cluster.when("sampler:0", "connect", lambda: run.cluster.kill("sampler:0"), nth=2)
    run.cluster.when("sampler:0", "load_weights", lambda: run.cluster.kill("sampler:0"), nth=2)
    result = finish(run, "kill:sampler:0")
    assert len([line for line in result.cluster.log if line.endswith(":kill:sampler:0")]) == 3


def test_a_monitor_that_dies_while_it_is_told_all_again():
    run = Run()
    run.cluster.when("monitor", "observe", lambda: run.cluster.kill("monitor:0"), nth=9)
    run.cluster.when("monitor", "observe", lambda: run.cluster.kill("monitor:0"), nth=14)
    finish(run, "kill:monitor:0")


def test_the_learner_and_a_sampler_with_the_step_sampled_ahead():
    run = Run(0, {"rollout": {"staleness": 1}})
    run.cluster.when("learner:0", "learn", lambda: run.cluster.kill("learner:0"), nth=2, at="end")
    run.cluster.when("sampler:0", "generate", lambda: run.cluster.kill("sampler:0"), nth=3)
    finish(run, "kill:learner:0", "kill:sampler:0")


# --- too many ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "method"), [("sampler", "generate"), ("scorer", "score"), ("monitor", "admit"), ("learner", "collect")]
)
def test_a_role_that_dies_too_often_in_one_step_ends_the_run(role, method):
    run = Run(0, {"cluster": {"max_restarts": 2}})
    for number in (0, 1):
        name = f"{role}:{number}"
        for nth in range(1, 20):
            run.cluster.when(name, method, lambda name=name: run.cluster.kill(name), nth=nth)
    result = run.go()
    check(result)
    assert isinstance(result.error, UserError) and "cluster.max_restarts = 2" in str(result.error)


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


# --- pools that change -------------------------------------------------------------------------------------------


def test_a_sampler_that_finds_no_place_is_done_without():
    run = Run(0, ELASTIC)
    run.cluster.when("scorer", "score", lambda: run.cluster.evict("sampler:2"), nth=4)
    result = finish(run, "lose:sampler:2", "ray.kill:sampler:2")
    assert result.run.metrics[-1][1]["pools/sampler_replicas"] <= 2


def test_a_scorer_that_finds_no_place_is_done_without():
    run = Run(0, ELASTIC)
    run.cluster.when("scorer", "score", lambda: run.cluster.evict("scorer:1"), nth=4)
    finish(run, "lose:scorer:1")


def test_a_sampler_that_finds_a_place_late_comes_back():
    run = Run(0, {**ELASTIC, "sampler": {"replicas": 2}})
    run.cluster.when("scorer", "score", lambda: run.cluster.evict("sampler:1"), nth=4)
    run.cluster.when("scorer", "score", lambda: run.cluster.after(20, lambda: run.cluster.make_room("sampler:1")))
    finish(run, "lose:sampler:1", "make_room:sampler:1")


# --- faults ------------------------------------------------------------------------------------------------------


def test_a_pool_that_shrinks_while_a_sampler_has_no_place():
    """The run could do without it, and between two steps `connect` waits for it, and ends the run."""
    run = Run(0, ELASTIC)
    run.cluster.when("sampler", "load_weights", lambda: run.cluster.evict("sampler:2"), nth=3, at="reply")
    finish(run, "lose:sampler:2")


def test_two_samplers_without_a_place_of_which_one_is_needless():
    """The condition of a loop drops the one, and waits there for the other, until the run ends."""
    run = Run(0, {**ELASTIC, "sampler": {"replicas": 3, "min_replicas": 1}})
    run.cluster.when("scorer", "score", lambda: run.cluster.evict("sampler:2"), nth=4)
    run.cluster.when(
        "sampler:1", "generate", lambda: run.cluster.after(6.0, lambda: run.cluster.evict("sampler:1"))
    )
    finish(run, "lose:sampler:2", "lose:sampler:1")


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


def test_a_ping_that_is_lost_with_its_node():
    """A scorer's results lie in its node's object store (RAY_max_direct_call_object_size), those of pings too.

    It was taken for a lost record, and the step was sampled twice at once.
    """
    for nth in (1, 2):
        run = Run(0, {"cluster": {"hang_timeout": 4.0}})
        run.cluster.pings_in_store = True
        run.cluster.delay("scorer:1", "score", 3.0, nth=5)  # there is time for a ping
        run.cluster.when("scorer:0", "health", lambda run=run: run.cluster.lose("scorer:0"), nth=nth, at="reply")
        finish(run, "lose:scorer:0")


def test_an_order_that_fails_while_it_is_added_leaves_the_engine_idle():
    config = config_of()
    settings = SamplerSettings.from_config(
        config, config.student, "student", stop_ids=(1,), vocabulary=64, max_model_len=64
    )
    engine = make_engine(True, settings)
    sampler = StudentSampler("sampler:0", settings, lambda _: engine)

    class NoMonitor:
        @property
        def admit(self):
            raise RuntimeError("no connection")

    sampler.connect({"default": [SimpleNamespace()]}, NoMonitor())
    spec = RolloutSpec(0, "p0", (20, 30, 40), 7, False, 8)
    with pytest.raises(RuntimeError, match="no connection"):
        sampler.generate(GenerateRequest(1, 0, 0, (spec,), {}))
    assert not engine.running


def test_a_schedule_says_what_it_does():
    result = check_schedule(3, [(400, "kill", "scorer:0"), (500, "freeze", "sampler:1")])
    assert result.cluster.log[:2] == ["400:kill:scorer:0", "500:freeze:sampler:1"]
