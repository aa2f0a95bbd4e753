"""A run's metrics as Ray gauges, which the cluster's Prometheus collects.

Called by the driver. A gauge keeps its last value: what a step does not report (an evaluation, the threshold of an
inactive rule) stays as it was. Left out: histograms, whose sums Ray computes from bucket midpoints.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from ray.util.metrics import Gauge

from kat_ray.metrics import METRICS, check_names
from kat_ray.prometheus import LABELS, RUN_METRICS, gauge_name


class RayMetrics:
    """Gauges of one run; `role` says whose process sets them."""

    def __init__(self, run: str, steps: int, role: str = "driver") -> None:
        """`steps` is how many the run is to have."""
        self._tags = {"run": run, "role": role}
        self._gauges: dict[str, Gauge] = {}
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

    def step(self, done: int, values: Mapping[str, float | None]) -> None:
        """After a step: `done` steps are finished, the last one with these metrics (None: it had none)."""
        check_names(values)
        for name, value in values.items():
            if value is not None:
                self._set(name, value)
        self._restarts += values.get("pool/restarts") or 0
        self._set("run/restarts", self._restarts)
        self._set("run/step", done)
        self._set("run/step_time", time.time())

    def evaluation(self, values: Mapping[str, float]) -> None:
        """After an evaluation, with its metrics."""
        check_names(values)
        for name, value in values.items():
            self._set(name, value)

    def checkpoint(self) -> None:
        """A checkpoint is complete."""
        self._set("run/checkpoint_time", time.time())

    def _set(self, name: str, value: float) -> None:
        gauge = self._gauges.get(name)
        if gauge is None:
            metric = METRICS.get(name) or RUN_METRICS[name]
            gauge = Gauge(gauge_name(name), description=f"{metric.help} [{metric.unit}]", tag_keys=LABELS)
            self._gauges[name] = gauge
        gauge.set(float(value), tags=self._tags)
