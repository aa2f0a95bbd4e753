"""Pools of samplers and scorers that shrink and grow, on the fake cluster."""

from tests.support.scenarios import LAYOUTS, Run, finish

ELASTIC = LAYOUTS["elastic"]


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
