"""A local Ray for the cluster tests."""

import pytest
import ray


@pytest.fixture(scope="session")
def ray_local():
    """A Ray of 8 logical CPUs on loopback, shared by the tests of a session."""
    ray.init(
        address="local", num_cpus=8, include_dashboard=False, object_store_memory=300 * 2**20, log_to_driver=False,
        logging_level="warning", namespace="kat-ray", _node_ip_address="127.0.0.1",
    )  # fmt: skip
    yield
    ray.shutdown()
