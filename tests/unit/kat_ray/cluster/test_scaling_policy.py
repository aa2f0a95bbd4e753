"""When samplers and scorers become more or fewer."""

import pytest

from kat_ray.cluster.scaling_policy import ScalingPolicy, StageTimes, scaling_metrics
from kat_ray.config.cluster import PoolsConfig
from kat_ray.observability.metric_catalog import check_names

BOUNDS = {"sampler": (1, 3), "scorer": (1, 2)}


def times(waiting, sampler, scorer):
    return StageTimes(waiting, {"sampler": sampler, "scorer": scorer})


def planner(bounds=BOUNDS, **settings):
    return ScalingPolicy(PoolsConfig(**settings), bounds)


def test_the_stage_that_the_others_wait_for_grows_after_so_many_steps():
    p, sizes = planner(grow_after=3), {"sampler": 1, "scorer": 1}
    busy_samplers = times(0.8, sampler=0.95, scorer=0.6)
    assert [p.observe(busy_samplers, sizes) for _ in range(2)] == [None, None]
    change = p.observe(busy_samplers, sizes)
    assert (change.role, change.by) == ("sampler", 1)
    assert (
        change.reason
        == "the learner waited 80% of the step for rollouts, and samplers were at work 95% of that time"
    )
    assert p.observe(busy_samplers, sizes) is None, "evidence is counted anew after a change"


def test_scorers_grow_where_they_are_the_busier():
    p = planner(grow_after=1)
    change = p.observe(times(0.8, sampler=0.81, scorer=0.9), {"sampler": 1, "scorer": 1})
    assert (change.role, change.by) == ("scorer", 1)


def test_one_step_that_says_otherwise_starts_the_count_again():
    p, sizes = planner(grow_after=2), {"sampler": 1, "scorer": 1}
    busy, calm = times(0.8, 0.95, 0.6), times(0.8, 0.7, 0.6)
    assert [p.observe(t, sizes) for t in (busy, calm, busy)] == [None, None, None]
    assert p.observe(busy, sizes) is not None


@pytest.mark.parametrize(
    "seen, sizes",
    [
        (times(0.2, 0.95, 0.9), {"sampler": 1, "scorer": 1}),  # the learner is the slow one
        (times(0.8, 0.75, 0.75), {"sampler": 1, "scorer": 1}),  # neither is busy: something else is slow
        (times(0.8, 0.95, 0.9), {"sampler": 3, "scorer": 2}),  # the busier has its most
    ],
)
def test_no_pool_grows_without_evidence_or_beyond_its_most(seen, sizes):
    p = planner(grow_after=1, shrink_after=99)
    assert [p.observe(seen, sizes) for _ in range(5)] == [None] * 5


def test_a_pool_shrinks_where_what_is_left_would_still_idle():
    p = planner(shrink_after=2)
    idle = times(0.8, sampler=0.9, scorer=0.2)  # one scorer less: 0.4
    assert p.observe(idle, {"sampler": 3, "scorer": 2}) is None
    change = p.observe(idle, {"sampler": 3, "scorer": 2})
    assert (change.role, change.by) == ("scorer", -1)
    assert "2 scorers were at work 20%" in change.reason


def test_a_pool_that_would_be_too_busy_with_one_less_stays():
    p = planner(shrink_after=1, grow_after=99)
    assert p.observe(times(0.8, sampler=0.9, scorer=0.3), {"sampler": 3, "scorer": 2}) is None  # 0.3 x 2 = 0.6


def test_pools_shrink_where_the_learner_hardly_waits_but_not_below_their_fewest():
    p = planner(shrink_after=1)
    calm = times(0.05, sampler=0.9, scorer=0.8)
    assert p.observe(calm, {"sampler": 2, "scorer": 1}).role == "sampler"  # 0.05 x 2 < 0.15
    assert p.observe(calm, {"sampler": 1, "scorer": 1}) is None


def test_a_fixed_pool_never_changes():
    p = planner({"sampler": (2, 2), "scorer": (1, 4)}, grow_after=1, shrink_after=1)
    assert p.observe(times(0.9, 1.0, 0.9), {"sampler": 2, "scorer": 1}) is None
    assert p.observe(times(0.9, 0.1, 0.9), {"sampler": 2, "scorer": 4}) is None


def test_grow_and_shrink_do_not_chase_each_other():
    """A load that makes a pool grow does not make the larger pool shrink."""
    p = planner({"sampler": (1, 8), "scorer": (1, 1)}, grow_after=1, shrink_after=1)
    size, work = 1, 3.2  # replicas' worth of sampling in each second of it
    seen = []
    for _ in range(20):
        busy = min(1.0, work / size)
        change = p.observe(times(0.8, busy, 0.3), {"sampler": size, "scorer": 1})
        size += change.by if change is not None else 0
        seen.append(size)
    assert seen[-8:] == [seen[-1]] * 8 and 4 <= seen[-1] <= 6


def test_stage_times_are_shares_of_the_sampling_time():
    seen = StageTimes.of(step=10.0, waited=6.0, sampling=8.0, busy={"sampler": 4.0, "scorer": 9.0})
    assert seen == times(0.6, 0.5, 1.0)
    figures = scaling_metrics({"sampler": 1, "scorer": 0}, seen, None)
    check_names(figures)
    assert figures["pools/sampler_pending"] == 1 and figures["pools/scorer_change"] == 0
