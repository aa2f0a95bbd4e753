"""Ray's own KubeRay autoscaler on the shipped RayCluster; its nodes are real, Kubernetes and the operator stubs.

Nodes have exactly the resources and labels of the manifest; GPUs are numbers to Ray. Nothing is changed in what the
chart renders: what two cores cannot bear is lowered by its values. Work asks as a run does
(actors/cluster/placement.py).
"""

from collections import Counter

import pytest
import ray

from kat_ray.cluster.roles import ROLE_LABEL
from tests.deploy.autoscaled import REPLICAS, SMALL, actors, lose_node, rendered, run_config, where
from tests.deploy.on_kuberay import kuberay
from tests.deploy.ray_nodes import resources, workers

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("own_ray", "openssl")]


@pytest.fixture(scope="module")
def cluster():
    """The profile `interactive`, whose smallest cluster is the head alone."""
    with kuberay(rendered("interactive", *SMALL)) as it:
        yield it


@pytest.fixture
def placed(cluster, tmp_path):
    """Reserves roles of a run, and gives them back with the test."""
    placements = []

    def reserve(*roles):
        placements.append(cluster.placed(run_config(tmp_path), *roles))
        return placements[-1]

    yield reserve
    for placement in placements:
        placement.remove()


def test_a_role_grows_alone_and_as_far_as_it_may(cluster, placed):
    cluster.settled()
    placement = placed("sampler")
    cluster.settled(sampler=2)
    samplers = actors(placement, "sampler")
    before = where(samplers)
    assert len({node for node, _ in before}) == 2
    _, more = placement.request("sampler")  # as a pool does that grows
    cluster.looked_again()
    assert ray.wait([more], timeout=0) == ([], [more])
    assert where(samplers) == before
    cluster.settled(sampler=2)
    placement.release(placement.places("sampler")[0])  # as one that shrinks
    cluster.until(lambda: ray.wait([more], timeout=0)[0], "the third has the place of the first")


def test_a_run_finds_its_nodes_from_nothing(cluster, placed):
    cluster.settled()
    placement = placed("learner", "sampler", "scorer", "monitor")
    cluster.settled(**REPLICAS)
    nodes = {node["NodeID"]: node for node in workers()}
    for role in REPLICAS:
        assert {nodes[node]["Labels"][ROLE_LABEL] for node, _ in where(actors(placement, role))} == {role}
    for node in nodes.values():
        group = cluster.groups[node["Labels"][ROLE_LABEL]]
        assert group["labels"].items() <= node["Labels"].items()
        has = {k: v for k, v in node["Resources"].items() if k in resources(group) or k in REPLICAS}
        assert has == resources(group)


def test_a_lost_node_is_replaced_while_the_others_go_on(cluster, placed):
    placement = placed("sampler", "scorer")
    samplers, scorers = actors(placement, "sampler"), actors(placement, "scorer")
    cluster.settled(sampler=2, scorer=1)
    first, second = where(samplers)
    scorer = where(scorers)
    lost = lose_node(samplers[0])

    def replaced():
        assert where(scorers) == scorer
        alive = {n["NodeID"] for n in workers() if n["Labels"][ROLE_LABEL] == "sampler"}
        return len(alive) == 2 and lost not in alive

    cluster.until(replaced, "the node is replaced")
    again, other = where(samplers)
    assert lost == first[0] != again[0] and other == second and where(scorers) == scorer
    assert cluster.asked() == Counter(sampler=2, scorer=1)


def test_idle_nodes_are_given_back(cluster, placed):
    placement = placed("sampler", "scorer")
    where(actors(placement, "sampler"))  # until they are there, one that has idled since before may be taken away
    cluster.settled(sampler=2, scorer=1)
    cluster.until(lambda: len(cluster.pods("sampler")) == 2, "no pod is on its way out")
    idle, before = set(cluster.pods("sampler")), cluster.deleted()
    for place in placement.places("sampler"):
        placement.release(place)
    cluster.settled(scorer=1)
    given_back = cluster.deleted() - before
    assert idle <= given_back and not given_back & {*cluster.pods("scorer")}
    placement.remove()
    cluster.settled()
