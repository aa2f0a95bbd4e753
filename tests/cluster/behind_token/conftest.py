"""One cluster behind a token for all tests of this folder: they look at it and submit jobs, and end no node."""

import os
import sys
from pathlib import Path

import pytest
import ray

from tests.cluster.local_cluster import local_cluster

# An image's `python`: killed at once, without the package, or without what it needs, as long as a file says so;
# else it trains with stubs.
PYTHON = """#!/bin/sh
[ -e killed ] && kill -9 $$
[ -e foreign ] && exec "{python}" -S "$@"
[ -e "{bare}" ] && exec "{python}" -I -S "$@"
[ "$2" = kat_ray.cli ] && shift 2 && set -- -m tests.cluster.stub_train "$@"
exec "{python}" "$@"
"""


@pytest.fixture(scope="package")
def programs(tmp_path_factory):
    """The folder with the `python` of the cluster's jobs."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "python").write_text(PYTHON.format(bare=folder / "bare", python=sys.executable))
    (folder / "python").chmod(0o755)
    return folder


@pytest.fixture(scope="package")
def cluster(programs):
    """A head with a dashboard, and a node for each role that has to compute."""
    ray.shutdown()  # as `own_ray`, which is for a module
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    with local_cluster("5c" * 32, PATH=path) as made:
        made.start_head(0, resources={"head": 1}, labels={"kat.ray/role": "head"}, dashboard=True)
        for role in ("learner", "sampler", "scorer"):
            made.start_node(role, 2, resources={role: 1}, labels={"kat.ray/role": role})
        yield made


@pytest.fixture
def bare_python(programs):
    """Jobs run in an image that lacks the package."""
    (programs / "bare").touch()
    yield
    (programs / "bare").unlink()
