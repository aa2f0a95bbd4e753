"""What roles ask for, and on which nodes they find it."""

import pytest

from kat_ray.cluster.roles import Node, cpus_asked, place, roles_of
from tests.support.configs import ALONE, make_config


def gpu_node(name, role=None, gpus=1, **more):
    return Node(name, {"CPU": 8, "GPU": gpus, **more}, {"kat.ray/role": role} if role else {})


def test_a_role_asks_for_what_its_section_says():
    config = make_config(
        "a", "b", sampler={"num_cpus": 2, "num_gpus": 1, "resources": {"fast": 0.5}, "labels": {"zone": "x"}}
    )
    roles = roles_of(config)
    assert [*roles] == ["learner", "sampler", "scorer", "monitor"]
    assert roles["sampler"].bundle == {"CPU": 2, "GPU": 1, "fast": 0.5}
    assert roles["sampler"].labels == {"zone": "x"}
    assert roles["monitor"].bundle == {"CPU": 0.1} and not roles["monitor"].labels


def test_by_role_each_is_bound_to_its_nodes_and_the_monitor_to_the_head():
    roles = roles_of(make_config("a", "b", cluster={"by_role": True}, learner={"num_gpus": 1}))
    assert roles["learner"].bundle == {"CPU": 1, "GPU": 1, "learner": 1}
    assert {name: role.labels["kat.ray/role"] for name, role in roles.items()} == {
        "learner": "learner", "sampler": "sampler", "scorer": "scorer", "monitor": "head",
    }  # fmt: skip
    assert roles["monitor"].bundle == {"head": 0.01}, "a head has no CPU to give"


def test_an_own_label_is_not_overruled():
    roles = roles_of(make_config("a", "b", cluster={"by_role": True}, scorer={"labels": {"kat.ray/role": "big"}}))
    assert roles["scorer"].labels == {"kat.ray/role": "big"}


@pytest.mark.parametrize(
    "section, elastic",
    [({}, False), ({"replicas": 2}, False), ({"replicas": 2, "max_replicas": 3}, True),
     ({"replicas": 2, "min_replicas": 1}, True), ({"replicas": 2, "min_replicas": 2, "max_replicas": 2}, False)],
)  # fmt: skip
def test_a_pool_with_room_is_elastic(section, elastic):
    assert roles_of(make_config("a", "b", sampler=section))["sampler"].elastic is elastic


def test_a_local_ray_has_room_for_pools_at_their_largest():
    config = make_config("a", "b", sampler={"replicas": 1, "max_replicas": 3}, scorer={"num_cpus": 0.5})
    assert cpus_asked(roles_of(config)) == 5  # 1 learner, 3 samplers, half a scorer, a tenth


@pytest.mark.parametrize(
    "section, words",
    [({"num_cpus": 0}, "num_gpus or resources"), ({"replicas": 3, "max_replicas": 2}, "within"),
     ({"replicas": 1, "min_replicas": 2}, "within"), ({"resources": {"x": 0}}, "greater than 0"),
     ({"tensor_parallel_size": 2, "num_gpus": 1}, "needs num_gpus = 2, not 1")],
)  # fmt: skip
def test_what_a_pool_cannot_be(section, words):
    with pytest.raises(ValueError, match=words):
        make_config("a", "b", sampler=section)


@pytest.mark.parametrize(
    "section, words",
    [({"tensor_parallel_size": 2, "num_gpus": 1}, "needs num_gpus = 2, not 1"),
     ({"tensor_parallel_size": 2, "num_gpus": 2, "backend": "transformers"}, "needs backend = 'vllm'"),
     ({"cache_block": 0}, "greater than or equal to 1")],
)  # fmt: skip
def test_what_scorers_cannot_be(section, words):
    with pytest.raises(ValueError, match=words):
        make_config("a", "b", scorer=section)


def test_a_teacher_on_two_gpus_is_one_bundle():
    roles = roles_of(make_config("a", "b", scorer={"tensor_parallel_size": 2, "num_gpus": 2, "replicas": 3}))
    assert (roles["scorer"].bundle, roles["scorer"].replicas) == ({"CPU": 1.0, "GPU": 2.0}, 3)


def test_the_monitors_rollouts_need_a_sampler_each_at_any_size():
    with pytest.raises(ValueError, match="the fewest samplers"):
        make_config("a", "b", sampler={"replicas": 4, "min_replicas": 1}, monitor={"shards": 2})


def test_a_deterministic_run_has_pools_of_a_fixed_size():
    with pytest.raises(ValueError, match="fixed number of scorers"):
        make_config("a", "b", run={"deterministic": True}, scorer={"max_replicas": 2})


def places(nodes, **sections):
    config = make_config("a", "b", **sections)
    return {p.role.name: p for p in place([*roles_of(config).values()], nodes)}


def test_roles_go_where_their_labels_are():
    nodes = [gpu_node("l", "learner", learner=1), gpu_node("s", "sampler", sampler=1),
             gpu_node("t", "scorer", scorer=1), Node("h", {"head": 1}, {"kat.ray/role": "head"})]  # fmt: skip
    gpus = {"num_gpus": 1}
    found = places(nodes, cluster={"by_role": True}, learner=gpus, sampler=gpus, scorer=gpus)
    assert {name: dict(p.nodes) for name, p in found.items()} == {
        "learner": {"l": 1}, "sampler": {"s": 1}, "scorer": {"t": 1}, "monitor": {"h": 1},
    }  # fmt: skip
    assert not any(p.lacking for p in found.values())


def test_a_role_without_a_node_is_named():
    found = places([gpu_node("s", "sampler", sampler=1)], cluster={"by_role": True})
    assert found["scorer"].lacking == "no node is labelled kat.ray/role=scorer"
    assert not found["sampler"].lacking


def test_what_does_not_fit_says_what_there_is():
    found = places([gpu_node("a", gpus=2), gpu_node("b", gpus=1)], sampler={"replicas": 3, "num_gpus": 2})
    assert found["sampler"].placed == 1
    assert found["sampler"].lacking == "2 of 3 find no room; most that one node has left: 1 GPU"


def test_the_largest_is_placed_first_and_fullest_nodes_are_filled_first():
    nodes = [gpu_node("big", gpus=4), gpu_node("small", gpus=1)]
    found = places(nodes, learner={"num_gpus": 4}, sampler={"num_gpus": 1})
    assert found["learner"].nodes == {"big": 1} and found["sampler"].nodes == {"small": 1}


def test_where_nobody_asks_a_teacher_there_are_neither_scorers_nor_monitors_to_be_placed():
    assert [*roles_of(make_config("a", "b", **ALONE, scorer={"num_gpus": 8}))] == ["learner", "sampler"]
    for asks in ({"objective": {"opd": {"weight": 0.1}}}, {"termination": {"rule": "random"}}):
        config = make_config("a", "b", **{**ALONE, **asks})
        assert [*roles_of(config)] == ["learner", "sampler", "scorer", "monitor"]
