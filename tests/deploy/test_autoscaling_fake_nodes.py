"""The shipped groups as fake nodes of Ray's autoscaler: no Kubernetes, not even a stub."""

import pytest
import ray

from tests.deploy.autoscaled import SMALL, actors, lose_node, rendered, run_config, where
from tests.deploy.on_fake_nodes import fake_nodes
from tests.deploy.ray_nodes import workers

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("own_ray")]


def test_fake_nodes_come_and_go_with_the_work(tmp_path):
    with fake_nodes(rendered("interactive", *SMALL)) as cluster:
        config = run_config(tmp_path)
        placement = cluster.placed(config, "sampler")
        cluster.settled(sampler=2)
        scoring = cluster.placed(config, "scorer")
        cluster.settled(sampler=2, scorer=1)
        (scorer,) = actors(scoring, "scorer")
        first = where([scorer])

        _, more = placement.request("sampler")
        lost = lose_node(scorer)
        cluster.until(lambda: lost not in {n["NodeID"] for n in workers()}, "the node is lost")
        cluster.settled(sampler=2, scorer=1)
        assert where([scorer]) != first
        assert ray.wait([more], timeout=0) == ([], [more]), "a third sampler where there may be two"

        placement.remove()
        cluster.settled(scorer=1)
        scoring.remove()
        cluster.settled()
