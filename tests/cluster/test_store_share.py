"""Back-pressure by the object store: above `cluster.store_share` no step is sampled ahead."""

import gc

import numpy as np
import pytest
import ray

from actors.cluster import object_store
from actors.cluster.samplers import Engines
from actors.driver import train as job
from actors.driver import training_run as job_module
from actors.testing.stub_engine import fast_stub_engine
from actors.testing.stub_learner import StubLearner
from actors.testing.stub_teacher import stub_teacher
from tests.deploy.ray_process import until
from tests.support.runs import SINGLE, check_books, stub_config

pytestmark = pytest.mark.integration


def test_sampling_ahead_waits_until_the_store_has_room(ray_local, files, tmp_path, monkeypatch):
    """Something else fills half of a real store until the second step is recorded; then it has room."""
    monkeypatch.setattr(object_store, "_EVERY", 0.0)  # steps are short here: look in each of them
    config = stub_config(
        files, tmp_path, 5, rollout={"top_k_logprobs": 16, "staleness": 1}, cluster={"store_share": 0.4},
        run={"steps": 5, "tensorboard": False}, **SINGLE,
    )  # fmt: skip
    ballast = [ray.put(np.ones(150 * 2**20, np.uint8))]  # of 300 MiB
    record = job_module.StepRecorder.record

    def releasing(recorder, step, *rest):
        if step == 1:
            ballast.clear()
            gc.collect()
            until(lambda: object_store.store_usage().used_share < 0.3, 30, "the store has room again")
        return record(recorder, step, *rest)

    monkeypatch.setattr(job_module.StepRecorder, "record", releasing)
    path = job.train(config, engines=Engines(fast_stub_engine, stub_teacher, StubLearner))
    _, _, metrics = check_books(config, path)
    full = [m["store/used_share"] > 0.4 for m in metrics]
    assert full == [True, True, False, False, False]
    # A step's look decides on the next one: the third is still sampled from the newest weights.
    assert [m["rollout/staleness"] for m in metrics] == [0, 0, 0, 1, 1]
    assert [m["policy_version"] for m in metrics] == [0, 1, 2, 2, 3]
    assert (path / "run.log").read_text().count("cluster.store_share = 0.4") == 1
