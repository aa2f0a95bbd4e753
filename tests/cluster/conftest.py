"""A local Ray for the cluster tests."""

import pytest
import ray

from tests.deploy.ray_process import agent_port_of_its_own


@pytest.fixture(scope="module")
def ray_local():
    """A Ray of 8 logical CPUs, shared by all tests that need one; `alone` ends it."""
    if not ray.is_initialized():
        with agent_port_of_its_own():
            ray.init(
                address="local", num_cpus=8, include_dashboard=False, object_store_memory=300 * 2**20,
                log_to_driver=False, logging_level="warning", namespace="kat-ray",
            )  # fmt: skip
