"""Errors after which a process cannot go on, raised in real actors of a run: it recovers as from their deaths."""

import os
from functools import partial
from pathlib import Path

import pytest
import ray
import torch
from torch.distributed import DistBackendError

from actors.cluster.placement import environments
from actors.cluster.replica import remote_class
from actors.cluster.samplers import Engines
from actors.driver import train as job
from actors.testing.stub_engine import StubEngine
from actors.testing.stub_learner import StubLearner
from actors.testing.stub_teacher import StubTeacher
from kat_ray.cluster.threads import threads_of
from kat_ray.errors import UserError
from tests.support.configs import make_config
from tests.support.runs import QUICK, SINGLE, check_books, stub_config

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_local")]

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."


def once(file, error):
    """Raise the error the first time that anybody comes here."""
    if not Path(file).exists():
        Path(file).touch()
        raise error


class FailingEngine(StubEngine):
    folder, calls = None, 0

    def step(self):
        self.calls += 1
        if self.calls == 20:
            once(self.folder / "sampler", torch.OutOfMemoryError(OUT_OF_MEMORY))
        return super().step()


class FailingTeacher(StubTeacher):
    folder, calls = None, 0

    def score(self, chunk, topk_ids, own_top=0):
        self.calls += 1
        if self.calls == 12:
            once(
                self.folder / "scorer", RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel")
            )
        return super().score(chunk, topk_ids)


class FailingLearner(StubLearner):
    def __init__(self, rank, settings):
        super().__init__(rank, settings)
        self._folder = Path(settings.student_dir).parent

    def learn(self, global_weight, policy_version):
        if policy_version > 2:
            error = DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3690")
            once(self._folder / "learner", error)
        return super().learn(global_weight, policy_version)


def failing_engine(folder, settings):
    engine = FailingEngine(settings.rollout.top_k_logprobs, vocabulary=16)
    engine.folder = folder
    return engine


def failing_teacher(folder, settings):
    teacher = FailingTeacher(settings.rollout.max_tokens)
    teacher.folder = folder
    return teacher


def always_failing_engine(settings):
    engine = StubEngine(settings.rollout.top_k_logprobs, vocabulary=16)

    def step():
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    engine.step = step
    return engine


def test_a_run_recovers_from_errors_that_end_a_process(files, tmp_path):
    """One of each role, in different steps."""
    engines = Engines(partial(failing_engine, tmp_path), partial(failing_teacher, tmp_path), FailingLearner)
    config = stub_config(files, tmp_path, steps=5, **SINGLE)
    path = job.train(config, engines=engines)
    assert (tmp_path / "sampler").exists() and (tmp_path / "scorer").exists() and (files / "learner").exists()
    check_books(config, path)
    text = (path / "run.log").read_text()
    assert "sampler:0 was lost" in text and f"OutOfMemoryError: {OUT_OF_MEMORY}" in text
    assert "learner:0 was lost" in text and "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690" in text


@pytest.mark.nightly
def test_an_error_that_comes_again_ends_the_run_with_its_first_line(files, tmp_path):
    limits = {"cluster": {"max_restarts": 1, "hang_timeout": 10, "start_timeout": 180}}
    config = stub_config(files, tmp_path, steps=2, **SINGLE | limits)
    with pytest.raises(UserError, match=r"sampler:0 was lost 2 times in one step .*last: .*CUDA out of memory"):
        job.train(config, engines=Engines(always_failing_engine, QUICK.scorer, QUICK.learner))


class Shown:
    """Says which GPUs its process is shown."""

    def visible(self):
        return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_an_actor_without_gpus_is_shown_none():
    """Though the machine, here its environment, shows some to everybody; a role with GPUs has those of Ray."""
    env = {"CUDA_VISIBLE_DEVICES": "0,1"}  # what an actor without our own setting would inherit
    config = make_config("a", "b", sampler={"num_gpus": 1})
    found = environments(config, threads_of(config, 1))
    roles = {role: found[role] for role in ("sampler", "scorer")}
    actors = [
        remote_class(Shown).options(num_cpus=0, runtime_env={"env_vars": env | roles[r]}).remote() for r in roles
    ]
    found = dict(zip(roles, ray.get([a.visible.remote() for a in actors], timeout=400), strict=True))
    assert found == {"sampler": "0,1", "scorer": ""}
    for actor in actors:
        ray.kill(actor)
