"""What interleavings do to a run: each is built on a fake cluster, on purpose, and its result is that of any other.

`tests.support.scenarios` says what must be the same: rows kept, cuts, calibration, weights. Runs that are told to
end: `test_control_plane_ends`; pools that change: `test_control_plane_pools`.
"""

from types import SimpleNamespace

import pytest

from actors.sampler.settings import SamplerSettings
from actors.sampler.student_sampler import StudentSampler
from kat_ray.errors import UserError
from kat_ray.types.records import GenerateRequest, RolloutSpec
from tests.support.quick_engines import make_engine
from tests.support.scenarios import ALONE, LAYOUTS, ROLES, Run, check, check_schedule, config_of, finish, small

# --- what all others are compared with ---------------------------------------------------------------------------


def test_an_undisturbed_run_depends_on_no_interleaving():
    for seed in range(1, 6):
        finish(Run(seed))


@pytest.mark.parametrize("changes", [{}, small("plain")], ids=["plain", "small"])
def test_the_plain_run_has_rollouts_of_every_kind(changes):
    ended = Run(0, changes).go().run.summary["rollouts_ended"]
    assert min(ended[reason] for reason in ("trapped", "eos", "max_tokens")) >= 3


@pytest.mark.parametrize("layout", sorted({*LAYOUTS} - {ALONE}))
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


def test_a_learners_death_is_counted():
    run = Run()
    run.cluster.when("learner:0", "learn", lambda: run.cluster.kill("learner:0"), nth=1)
    result = finish(run, "kill:learner:0")
    assert [m["pool/restarts"] for _, m in result.run.metrics] == [1, 0, 0]


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


def test_a_step_that_always_kills_the_learner_ends_the_run():
    """The step before it, taken again each time, is no progress that would forgive the deaths."""
    run = Run(0, {"run": {"steps": 6, "checkpoint_every": 2}, "cluster": {"max_restarts": 2}})
    taken = []
    for nth in range(1, 13):  # steps 1 and 2, then 3 and 4 again and again: each second one of these is its last
        run.cluster.when("learner:0", "learn", lambda nth=nth: taken.append(nth), nth=nth)
        if nth >= 4 and nth % 2 == 0:
            run.cluster.when("learner:0", "learn", lambda: run.cluster.kill("learner:0"), nth=nth)
    result = run.go()
    check(result)
    assert isinstance(result.error, UserError) and "lost 3 times in one step (cluster.max_restarts = 2)" in str(
        result.error
    )
    assert taken == [*range(1, 9)]


# --- faults ------------------------------------------------------------------------------------------------------


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
