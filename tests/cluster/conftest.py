"""A local Ray for the cluster tests."""

import pytest
import ray


@pytest.fixture(scope="session")
def ray_local():
    """A Ray of 8 logical CPUs, shared by the tests of a session."""
    ray.init(
        address="local", num_cpus=8, include_dashboard=False, object_store_memory=300 * 2**20, log_to_driver=False,
        logging_level="warning", namespace="kat-ray",
    )  # fmt: skip
    yield
    ray.shutdown()
