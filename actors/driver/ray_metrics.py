"""A run's metrics as Ray gauges, which the cluster's Prometheus collects.

Called by the driver. A gauge keeps its last value: what a step does not report (an evaluation, the threshold of an
inactive rule) stays as it was. Ray alone would drop it (2.60: a value is exported once each time that it is set,
and forgotten two export intervals later), and with it the time of the last step once steps take longer, or none
ends any more: a thread sets all of them again. Left out: histograms, whose sums Ray computes from bucket midpoints.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.metrics import Gauge

from kat_ray.observability.metric_catalog import metric_of
from kat_ray.observability.prometheus import LABELS, RUN_METRICS, gauge_name
from kat_ray.observability.trackers import Tracker

_EVERY = (
    5.0  # seconds between two times that all are set; Ray's export interval is 10 s unless it is told otherwise
)


class RayMetrics(Tracker):
    """Gauges of one run; `role` says whose process sets them."""

    def __init__(self, run: str, steps: int, role: str = "driver") -> None:
        """`steps` is how many the run is to have."""
        self._tags = {"run": run, "role": role}
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[str, float] = {}
        self._lock = threading.Lock()
        self._restarts = 0.0
        now = time.time()
        for name, value in (
            ("run/steps", steps),
            ("run/step", 0),
            ("run/step_time", now),
            ("run/checkpoint_time", now),
            ("run/restarts", 0),
        ):
            self._set(name, value)
        # By a weak reference: the gauges of a run that has ended are not kept.
        threading.Thread(target=_keep_set, args=(weakref.ref(self),), name="gauges", daemon=True).start()

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        """After a step: `done` steps are finished, the last one with these metrics."""
        for name, value in metrics.items():
            self._set(name, value)
        self._restarts += metrics.get("pool/restarts", 0.0)
        self._set("run/restarts", self._restarts)
        self._set("run/step", done)
        self._set("run/step_time", time.time())

    def evaluation(self, done: int, record: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """After an evaluation, with its metrics."""
        for name, value in metrics.items():
            self._set(name, value)

    def checkpoint(self, done: int, path: object) -> None:
        """A checkpoint is complete."""
        self._set("run/checkpoint_time", time.time())

    def set_again(self) -> None:
        """Set every gauge to the value that it has."""
        with self._lock:
            for name, value in self._values.items():
                self._gauges[name].set(value, tags=self._tags)

    def _set(self, name: str, value: float) -> None:
        with self._lock:
            gauge = self._gauges.get(name)
            if gauge is None:
                metric = metric_of(name) or RUN_METRICS[name]
                gauge = Gauge(gauge_name(name), description=f"{metric.help} [{metric.unit}]", tag_keys=LABELS)
                self._gauges[name] = gauge
            self._values[name] = float(value)
            gauge.set(float(value), tags=self._tags)


def _keep_set(metrics: weakref.ref[RayMetrics]) -> None:
    while True:
        time.sleep(_EVERY)
        own = metrics()
        if own is None or not ray.is_initialized():
            return
        own.set_again()
        del own
