"""Pools that grow and shrink while a run goes on, on what its stages are measured to take."""

import pytest

from tests.cluster.elastic import RATE, column, elastic_config, wait_for
from tests.cluster.paced import train_beside
from tests.support.runs import check_books, records_of

pytestmark = pytest.mark.integration


@pytest.mark.nightly  # in virtual time: the layout `elastic` of test_control_plane_schedules
def test_the_stage_that_is_waited_for_grows_and_the_idle_one_shrinks(ray_local, files, tmp_path):
    """Sampling ahead: a replica that goes has made records that are learnt a step later."""
    config = elastic_config(
        files, tmp_path, staleness=1, sampler={"max_replicas": 3}, scorer={"replicas": 3, "min_replicas": 1}
    )

    def changed(steps):
        return 2 in column(steps, "sampler_replicas") and 1 in column(steps, "scorer_replicas")

    path = train_beside(config, lambda: wait_for(tmp_path, changed, "two samplers, and one scorer"), RATE)
    check_books(config, path)
    _, _, metrics = records_of(path)
    samplers, scorers = column(metrics, "sampler_replicas"), column(metrics, "scorer_replicas")
    assert samplers[0] == 1, samplers
    shrinking = scorers[: scorers.index(1) + 1]
    assert shrinking[0] == 3 and shrinking == sorted(shrinking, reverse=True), scorers
    for m in metrics:
        if m["pools/sampler_change"] == 1:
            assert m["pools/waiting_share"] >= 0.3 and m["pools/sampler_busy_share"] >= 0.8
    said = (path / "run.log").read_text()
    assert "pools: one sampler more than 1: the learner waited" in said and "pools: one scorer less: " in said


@pytest.mark.nightly  # in virtual time: test_control_plane_pools
def test_a_replica_that_finds_no_place_holds_nobody_up(ray_local, files, tmp_path):
    """Two samplers fit on the eight CPUs, the third never comes."""
    config = elastic_config(files, tmp_path, sampler={"num_cpus": 3, "max_replicas": 3})

    def without_the_third(steps):
        sizes = zip(column(steps, "sampler_replicas"), column(steps, "sampler_pending"), strict=True)
        return list(sizes)[-5:] == [(2, 1)] * 5

    path = train_beside(
        config, lambda: wait_for(tmp_path, without_the_third, "five steps beside one that is asked for"), RATE
    )
    check_books(config, path)
    _, _, metrics = records_of(path)
    assert max(column(metrics, "sampler_replicas")) == 2
