"""What dies while a run starts, or while it recovers from what died before."""

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import ray

from actors.cluster.actor_groups import ActorGroup
from actors.cluster.replica import Replica, remote_class
from actors.cluster.run_actors import RunActors
from actors.cluster.samplers import Engines
from actors.cluster.signals import StopRequest
from actors.cluster.supervisor import Supervisor
from actors.cluster.waiting import get
from actors.driver import train as job
from actors.driver import training_run as job_module
from actors.driver.history import RunHistory
from actors.testing.stub_engine import StubEngine, fast_stub_engine
from actors.testing.stub_learner import StubLearner
from actors.testing.stub_teacher import stub_teacher
from kat_ray.cluster.heartbeat import Heartbeat
from kat_ray.config.cluster import ClusterConfig
from kat_ray.errors import Stopped, UserError
from tests.cluster.disturb import newest_of
from tests.support.runs import QUICK, SINGLE, check_books, records_of, stub_config

pytestmark = pytest.mark.integration


def before(monkeypatch, owner, name, act):
    """Have `act(n)` called before the n-th call of a method, from 0."""
    method, calls = getattr(owner, name), []

    def first(*args, **kwargs):
        calls.append(1)
        act(len(calls) - 1)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, first)
    return calls


@pytest.mark.nightly  # in virtual time: test_control_plane
def test_a_learner_that_dies_again_while_it_goes_back(ray_local, files, tmp_path, monkeypatch):
    """Once in a step, then before it takes the checkpoint, then before it publishes; sampling goes on ahead."""
    config = stub_config(
        files, tmp_path, steps=5, rollout={"top_k_logprobs": 16, "staleness": 1},
        run={"steps": 5, "checkpoint_every": 2}, **SINGLE,
    )  # fmt: skip
    killed = []

    def kill(what):
        killed.append(what)
        newest_of("learner").kill()

    before(monkeypatch, job_module.StepRecorder, "record", lambda n: kill("step") if n == 3 else None)
    before(monkeypatch, RunHistory, "_restore", lambda n: kill("restore") if n == 0 else None)
    before(monkeypatch, RunActors, "publish", lambda n: kill("publish") if killed == ["step", "restore"] else None)
    path = job.train(config, engines=QUICK)
    assert killed == ["step", "restore", "publish"]
    check_books(config, path)
    _, _, metrics = records_of(path)
    assert sum(m["pool/restarts"] for m in metrics) >= 3
    assert (path / "run.log").read_text().count("going on from step 2") == 1


@pytest.mark.nightly  # in virtual time: test_control_plane
def test_a_rank_that_dies_before_the_ranks_have_met(ray_local, files, tmp_path, monkeypatch):
    config = stub_config(files, tmp_path, steps=2, **SINGLE | {"learner": {"world_size": 2}})
    before(monkeypatch, RunActors, "wait_until_ready", lambda n: newest_of("learner").kill())
    path = job.train(config, engines=Engines(fast_stub_engine, stub_teacher))  # real ranks: the others wait for it
    check_books(config, path)
    assert "learner:0 was lost" in (path / "run.log").read_text()


class Fragile:
    """Cannot be made once the file is there."""

    def __init__(self, file):
        self._heartbeat = Heartbeat()
        if Path(file).exists():
            raise OSError("no room on the device")

    def health(self):
        return self._heartbeat.read()


def group_of(actor, stop):
    """A group of one sampler that is there already, and the sampler."""
    supervisor = Supervisor(ClusterConfig(start_timeout=1e6, hang_timeout=1e6), stop)
    group, replica = ActorGroup("sampler", supervisor, None, None), Replica("sampler", 0, actor, None)
    group.replicas = (replica,)
    return group, replica


def test_an_actor_that_cannot_be_made_again_says_why_at_once(ray_local, tmp_path):
    actor = remote_class(Fragile).options(max_restarts=-1, num_cpus=0).remote(str(tmp_path / "file"))
    group, replica = group_of(actor, StopRequest(60))
    group.supervisor.watch([replica])
    assert group.revive(replica), "one that can be made comes back"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"sampler:0 to come back: .*no room on the device"):
        group.revive(replica)


def test_who_waits_for_an_actor_hears_that_the_run_is_to_end(ray_local):
    stop = StopRequest(0.0)
    actor = remote_class(Fragile).options(resources={"nowhere": 1}).remote("/nothing")
    group, replica = group_of(actor, stop)
    stop._take(signal.SIGTERM, None)
    with pytest.raises(UserError, match=r"told to end, and 0 s later \(run.grace_seconds\)"):
        group.revive(replica)
    ray.kill(actor)


def waiting_engine(folder, settings):
    """Takes very long to load, and says when it has started to."""
    (folder / "loading").touch()
    time.sleep(1e6)


def test_told_to_end_while_models_are_loaded(ray_local, files, tmp_path):
    config = stub_config(files, tmp_path, steps=2, **SINGLE)

    def tell():
        while not (tmp_path / "loading").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    with pytest.raises(Stopped, match=r"go on with: kat-ray train --resume .*run") as stopped:
        job.train(config, engines=Engines(partial(waiting_engine, tmp_path), stub_teacher, StubLearner))
    teller.join()
    assert stopped.value.code == 128 + signal.SIGTERM


def one_good_engine(folder, settings):
    """Loads once; whoever comes later finds no room."""
    try:
        (folder / "taken").touch(exist_ok=False)
    except FileExistsError:
        raise MemoryError("no room for a second engine") from None
    return StubEngine(settings.rollout.top_k_logprobs, vocabulary=16, rate=600.0)  # all wait for it


@pytest.mark.nightly  # in virtual time: test_control_plane_pools
def test_a_replica_that_cannot_load_ends_no_run(ray_local, files, tmp_path):
    config = stub_config(
        files, tmp_path, steps=16, run={"steps": 16, "checkpoint_every": 0, "tensorboard": False},
        pools={"grow_after": 1}, **SINGLE | {"sampler": {"replicas": 1, "max_replicas": 2, "num_cpus": 0.5}},
    )  # fmt: skip
    path = job.train(config, engines=Engines(partial(one_good_engine, tmp_path), stub_teacher, StubLearner))
    check_books(config, path)
    _, _, metrics = records_of(path)
    assert {m["pools/sampler_replicas"] for m in metrics} == {1}
    said = (path / "run.log").read_text()
    assert "pools: a new sampler could not start (" in said and "no room for a second engine" in said


def test_a_learner_that_cannot_write_its_checkpoint_says_so(ray_local):
    @ray.remote
    def full():
        raise OSError(28, "No space left on device")

    words = "the checkpoint x: No space left on device; what was written before is intact"
    with pytest.raises(UserError, match=words):
        get([full.remote()], "the checkpoint x")
