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


def test_a_replica_that_cannot_load_ends_no_run():
    """On a real Ray: tests/cluster/test_recovery_again.py, in the nightly tier."""
    changes = {**ELASTIC, "run": {"steps": 8}, "sampler": {"replicas": 1, "max_replicas": 2}}
    run, made = Run(0, changes), []
    whole = run.engine

    def one_good_engine(settings):
        made.append(settings)
        if len(made) > 1:
            raise MemoryError("no room for a second engine")
        return whole(settings)

    run.engine = one_good_engine
    result = finish(run)
    assert {m["pools/sampler_replicas"] for _, m in result.run.metrics} == {1}
    said = [note for note in result.notes if note.startswith("pools: a new sampler could not start (")]
    assert len(said) == len(made) - 1 > 0 and all("no room for a second engine" in note for note in said)
