"""A cluster looked at before it is joined; with a real one: tests/cluster/behind_token/test_bad_cluster.py."""

import sys

import pytest
import ray

from actors.cluster.preflight import check_cluster, check_versions
from kat_ray.errors import UserError
from tests.support.configs import make_config

HERE = {"ray_version": ray.__version__, "python_version": ".".join(map(str, sys.version_info[:3]))}


def test_equal_versions_meet_and_a_cluster_may_not_have_said_its_own():
    check_versions("x", HERE)
    check_versions("x", {})


@pytest.mark.parametrize("other", [{"ray_version": "2.9.1"}, {"python_version": "3.9.1"}])
def test_both_versions_and_what_to_do_are_named(other):
    with pytest.raises(UserError) as error:
        check_versions("cluster.address = 'h:1'", HERE | other)
    theirs = HERE | other
    assert str(error.value).startswith(
        f"cluster.address = 'h:1': the cluster runs Ray {theirs['ray_version']} under Python "
        f"{theirs['python_version']}, here is Ray {HERE['ray_version']} under Python {HERE['python_version']}"
    )
    assert f"install ray=={theirs['ray_version']} under Python {theirs['python_version']}" in str(error.value)


@pytest.mark.parametrize("address", ["http://head:8265", "head:8265"])
def test_a_dashboard_is_not_joined(address):
    with pytest.raises(UserError, match=r"cluster\.address = '.*': a dashboard takes jobs"):
        check_cluster(make_config("a", "b", cluster={"address": address}))


def test_a_local_ray_is_not_looked_for(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_cluster(make_config("a", "b"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UserError, match=r"RAY_ADDRESS = '127.0.0.1:9': no Ray cluster answers there"):
        check_cluster(make_config("a", "b"))
