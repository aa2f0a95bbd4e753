"""Pools that grow and shrink while a run goes on, on what its stages are measured to take."""

import json
import threading
from pathlib import Path

import pytest

from actors import run as job
from actors.bench.stub_teacher import stub_teacher
from actors.bench.stubs import StubEngine
from actors.sampler_pool import Engines
from tests.cluster.local_cluster import local_cluster
from tests.cluster.test_recovery import check_books, records_of, stub_config
from tests.cluster.test_run import files  # noqa: F401 (a fixture)
from tests.deploy.ray_process import until

pytestmark = pytest.mark.slow


def slow_engine(config, model, model_dir, max_model_len):
    """Sampling is what everything waits for."""
    return StubEngine(config.rollout.top_k_logprobs, vocabulary=16, rate=600.0)


class UntilSeen(StubEngine):
    """As slow, until the test has seen what it waits for and says so with a file: the rest of the run is idle."""

    def __init__(self, config):
        super().__init__(config.rollout.top_k_logprobs, vocabulary=16, rate=600.0)
        self._seen = Path(config.run.dir) / "seen"

    def step(self):
        if self._rate is not None and self._seen.exists():
            self.set_rate(None)
        return super().step()


def engine_until_seen(config, model, model_dir, max_model_len):
    return UntilSeen(config)


def elastic_config(files, tmp_path, steps, **sections):  # noqa: F811
    sampler, scorer = sections.pop("sampler", {}), sections.pop("scorer", {})
    return stub_config(
        files, tmp_path, steps=steps,
        run={"steps": steps, "checkpoint_every": 0, "tensorboard": False},
        rollout={"top_k_logprobs": 16, "max_tokens": 24, "staleness": sections.pop("staleness", 0)},
        sampler={"replicas": 1, "num_cpus": 0.5} | sampler, scorer={"replicas": 1, "num_cpus": 0.5} | scorer,
        pools={"grow_after": 1, "shrink_after": 1}, **sections,
    )  # fmt: skip


def column(metrics, name):
    return [m[name] for m in metrics if name in m]


def test_the_stage_that_is_waited_for_grows_and_the_idle_one_shrinks(ray_local, files, tmp_path):  # noqa: F811
    """Sampling ahead: a replica that goes has made records that are learnt a step later."""
    config = elastic_config(
        files, tmp_path, 40, staleness=1,
        sampler={"max_replicas": 3}, scorer={"replicas": 3, "min_replicas": 1},
    )  # fmt: skip
    path = job.train(config, engines=Engines(slow_engine, stub_teacher))
    check_books(config, path)
    _, _, metrics = records_of(path)
    samplers, scorers = column(metrics, "pools/sampler_replicas"), column(metrics, "pools/scorer_replicas")
    assert samplers[0] == 1 and max(samplers) >= 2, samplers
    assert scorers[0] == 3 and scorers[-1] == 1, scorers
    for m in metrics:
        if m["pools/sampler_change"] == 1:
            assert m["pools/waiting_share"] >= 0.3 and m["pools/sampler_busy_share"] >= 0.8
    said = (path / "run.log").read_text()
    assert "pools: one sampler more than 1: the learner waited" in said and "pools: one scorer less: " in said


def test_a_replica_that_finds_no_place_holds_nobody_up(ray_local, files, tmp_path):  # noqa: F811
    """Two samplers fit on the eight CPUs, the third never comes."""
    config = elastic_config(files, tmp_path, 40, sampler={"num_cpus": 3, "max_replicas": 3})
    path = job.train(config, engines=Engines(slow_engine, stub_teacher))
    check_books(config, path)
    _, _, metrics = records_of(path)
    assert max(column(metrics, "pools/sampler_replicas")) == 2
    assert metrics[-1]["pools/sampler_pending"] == 1, "asked for, to the end"


def test_nodes_come_and_go_in_the_middle_of_a_run(alone, files, tmp_path, monkeypatch):  # noqa: F811
    """A sampler joins on a node that comes; the node is lost in the middle of a step; the run does without it."""
    monkeypatch.setenv("RAY_ADDRESS", "")
    with local_cluster() as cluster:
        cluster.start_head(3)
        config = elastic_config(
            files, tmp_path, 130, learner={"world_size": 1, "num_cpus": 0.5},
            sampler={"num_cpus": 1, "max_replicas": 2, "resources": {"seat": 1}},
            cluster={"address": cluster.address, "replacement_timeout": 12, "hang_timeout": 60},
        )  # fmt: skip
        cluster.start_node("first", 1, resources={"seat": 1})
        metrics_file = tmp_path / "run" / "metrics.jsonl"
        trouble = []

        def last(name):
            lines = metrics_file.read_text().splitlines() if metrics_file.is_file() else []
            return json.loads(lines[-1]).get(name) if lines else None

        def come_and_go():
            try:
                until(lambda: last("pools/sampler_pending") == 1, 90, "a sampler is asked for")
                cluster.start_node("late", 1, resources={"seat": 1})
                until(lambda: last("pools/sampler_replicas") == 2, 90, "it joins on the new node")
                cluster.kill("late")
                until(lambda: last("pools/sampler_replicas") == 1, 120, "the run does without it")
                (tmp_path / "seen").touch()
            except Exception as error:
                trouble.append(error)

        watcher = threading.Thread(target=come_and_go, daemon=True)
        watcher.start()
        path = job.train(config, engines=Engines(engine_until_seen, stub_teacher))
        watcher.join(1)
        assert not trouble and not watcher.is_alive(), trouble
        check_books(config, path)
        assert "is done without" in (path / "run.log").read_text()
