"""Nodes that come and go in the middle of a run whose pools grow and shrink."""

import pytest

from tests.cluster.elastic import RATE, STEPS, column, elastic_config, wait_for
from tests.cluster.local_cluster import local_cluster
from tests.cluster.paced import train_beside
from tests.support.runs import check_books

pytestmark = pytest.mark.nightly


def test_nodes_come_and_go_in_the_middle_of_a_run(own_ray, files, tmp_path, monkeypatch):
    """A sampler joins on a node that comes; the node is lost in the middle of a step; the run does without it."""
    monkeypatch.setenv("RAY_ADDRESS", "")
    with local_cluster() as cluster:
        cluster.start_head(3)
        config = elastic_config(
            files, tmp_path, steps=2 * STEPS, learner={"world_size": 1, "num_cpus": 0.5},
            sampler={"num_cpus": 1, "max_replicas": 2, "resources": {"seat": 1}},
            cluster={"address": cluster.address, "replacement_timeout": 12, "hang_timeout": 60},
        )  # fmt: skip
        cluster.start_node("first", 1, resources={"seat": 1})

        def wait_for_last(name, value, what):
            wait_for(tmp_path, lambda steps: column(steps[-1:], name) == [value], what)

        def come_and_go():
            wait_for_last("sampler_pending", 1, "a sampler is asked for")
            cluster.start_node("late", 1, resources={"seat": 1})
            wait_for_last("sampler_replicas", 2, "it joins on the new node")
            cluster.kill("late")
            wait_for_last("sampler_replicas", 1, "the run does without it")

        path = train_beside(config, come_and_go, RATE)
        check_books(config, path)
        assert "the run goes on without it" in (path / "run.log").read_text()
