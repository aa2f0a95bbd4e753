"""The environment of each role's processes."""

import pytest

from actors.cluster.placement import environments
from kat_ray.cluster.threads import threads_of
from tests.support.configs import make_config

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def learner_env(gpus):
    config = make_config("a", "b", learner={"num_gpus": gpus})
    return environments(config, threads_of(config, 1))["learner"]


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_a_learner_with_a_gpu_grows_its_segments():
    assert learner_env(1)["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert not set(NAMES) & learner_env(0).keys()


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_says_of_the_allocator_stays(name, monkeypatch):
    """Workers of a local Ray inherit it; set here as well it would be overruled."""
    monkeypatch.setenv(name, "max_split_size_mb:128")
    assert not set(NAMES) & learner_env(1).keys()
