"""Environment of all tests, and the fixtures that tests of several folders take."""

import os

from tests.support.environment import VARIABLES

os.environ.update(VARIABLES)

import pytest
import ray
import torch
from hypothesis import settings

from tests.deploy.ray_process import agent_port_of_its_own
from tests.order import place
from tests.support.models import make_model, write_job_files
from tests.support.quick_workers import quick_workers

quick_workers()
# A law holds however long an example takes on a machine that has other things to do.
settings.register_profile("kat-ray", settings.default, deadline=None)
settings.load_profile("kat-ray")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadgroup`: files that share one Ray, or start their own, stay together (tests/lanes.py)."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from tests.lanes import Lanes

    return Lanes(config, log)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: place(item.nodeid.split("::")[0]))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def own_ray():
    """No Ray of this process: the agent of a machine's first Ray holds the port on which jobs are taken."""
    ray.shutdown()


@pytest.fixture(scope="module")
def ray_local():
    """A Ray of 8 logical CPUs, shared by all tests that need one; `own_ray` ends it."""
    if not ray.is_initialized():
        with agent_port_of_its_own():
            ray.init(
                address="local", num_cpus=8, include_dashboard=False, object_store_memory=300 * 2**20,
                log_to_driver=False, logging_level="warning", namespace="kat-ray",
            )  # fmt: skip


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Directories of a random student and a random teacher, and the models."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: (str(root / name), make_model(root / name, seed=seed))
        for name, seed in (("student", 1), ("teacher", 2))
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random student and teacher with the demo's tokenizer, and prompts that both can read."""
    return write_job_files(tmp_path_factory.mktemp("job"))
