"""Names of the metrics in Prometheus, and what the driver sets."""

import math
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest

from actors.driver import ray_metrics
from kat_ray.observability.metric_catalog import METRICS
from kat_ray.observability.prometheus import RUN_METRICS, exported_name, exported_names, gauge_name


def test_names():
    assert gauge_name("kl/mean") == "kat_kl_mean"
    assert exported_name("kl/mean") == "ray_kat_kl_mean"
    assert exported_name("policy_version") == "ray_kat_policy_version"


def test_no_two_metrics_share_a_name():
    names = [*METRICS, *RUN_METRICS]
    assert len({gauge_name(n) for n in names}) == len(names)
    assert all(n.isidentifier() and n.islower() for n in map(gauge_name, names))
    assert exported_name("eval/avg_at_k") in exported_names() and "ray_actors" in exported_names()


class FakeGauge:
    made: ClassVar[dict] = {}

    def __init__(self, name, description="", tag_keys=()):
        assert name not in self.made, "one gauge a metric: a second one would hide the first"
        self.made[name] = self
        self.description, self.tag_keys, self.values = description, tag_keys, []

    def set(self, value, tags):
        assert tuple(tags) == self.tag_keys
        self.values.append((value, tags))


@pytest.fixture
def gauges(monkeypatch):
    monkeypatch.setattr(FakeGauge, "made", {})
    monkeypatch.setattr(ray_metrics, "Gauge", FakeGauge)
    return lambda name: [v for v, _ in FakeGauge.made[gauge_name(name)].values]


def test_a_step_is_set(gauges, monkeypatch):
    monkeypatch.setattr(ray_metrics.time, "time", lambda: 100.0)
    metrics = ray_metrics.RayMetrics("demo", steps=20)
    assert gauges("run/steps") == [20] and gauges("run/step") == [0]
    assert gauges("run/step_time") == gauges("run/checkpoint_time") == [100.0]
    monkeypatch.setattr(ray_metrics.time, "time", lambda: 160.0)
    metrics.step(1, {"kl/mean": 0.25, "pool/restarts": 2})
    metrics.step(2, {"kl/mean": 0.125, "pool/restarts": 1})
    metrics.step(3, {"kl/mean": math.nan})
    assert gauges("kl/mean")[:2] == [0.25, 0.125] and math.isnan(gauges("kl/mean")[2])
    assert gauges("run/restarts") == [0, 2, 3, 3]
    assert gauges("run/step") == [0, 1, 2, 3] and gauges("run/step_time")[-1] == 160.0
    metrics.evaluation(3, {}, {"eval/avg_at_k": 0.5})
    assert gauges("eval/avg_at_k") == [0.5]
    assert gauges("run/checkpoint_time") == [100.0]
    metrics.checkpoint(3, Path("step-3"))
    assert gauges("run/checkpoint_time") == [100.0, 160.0]
    gauge = FakeGauge.made["kat_kl_mean"]
    assert gauge.values[0][1] == {"run": "demo", "role": "driver"}
    assert METRICS["kl/mean"].help in gauge.description and "[nats]" in gauge.description


def test_what_was_set_once_is_set_again_as_it_was(gauges, monkeypatch):
    set_again = threading.Event()
    monkeypatch.setattr(ray_metrics, "_EVERY", 0.01)
    monkeypatch.setattr(ray_metrics.ray, "is_initialized", lambda: not set_again.is_set())
    metrics = ray_metrics.RayMetrics("demo", steps=20)
    metrics.evaluation(3, {}, {"eval/avg_at_k": 0.5})
    metrics.evaluation(3, {}, {"eval/avg_at_k": 0.75})
    deadline = time.monotonic() + 30
    while len(gauges("eval/avg_at_k")) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    set_again.set()  # which ends the thread
    assert gauges("eval/avg_at_k")[0] == 0.5 and gauges("eval/avg_at_k")[-2:] == [0.75, 0.75]
    assert set(gauges("run/steps")) == {20} and len(gauges("run/steps")) > 1
