"""Names under which a run's metrics appear in Prometheus, and the few that only exist there.

Ray exports a gauge `kat_x` as `ray_kat_x`, with its own labels beside ours (`run`, `role`): among them WorkerId,
which changes when a process is replaced. Queries therefore aggregate `by (run, role)`.
"""

from __future__ import annotations

import re

from kat_ray.observability.metric_catalog import METRICS, Metric

LABELS = ("run", "role")

# State of the run beside its steps' metrics: alerts need times and totals. Not in metrics.jsonl.
RUN_METRICS = {
    m.name: m
    for m in (
        Metric("run/step", "steps", "steps that are finished"),
        Metric("run/steps", "steps", "steps that the run is to have"),
        Metric("run/step_time", "s", "Unix time at which the last step finished; before the first, of the start"),
        Metric(
            "run/checkpoint_time",
            "s",
            "Unix time of the newest checkpoint; before the first, of the start",
        ),
        Metric("run/restarts", "deaths", "actors that died since this driver started: the sum of pool/restarts"),
    )
}

# Ray's own that the dashboard and the alerts use.
RAY_METRICS = frozenset(
    {
        "ray_actors",
        "ray_node_cpu_utilization",
        "ray_node_gpus_utilization",
        "ray_node_gram_used",
        "ray_node_gram_available",
        "ray_node_mem_total",
        "ray_node_mem_used",
        "ray_object_store_available_memory",
        "ray_object_store_used_memory",
        "ray_spill_manager_objects_bytes",
    }
)


def gauge_name(metric: str) -> str:
    """`kl/mean` -> `kat_kl_mean`: the name that is given to Ray."""
    return "kat_" + re.sub(r"\W", "_", metric, flags=re.ASCII)


def exported_name(metric: str) -> str:
    """`kl/mean` -> `ray_kat_kl_mean`: the name in Prometheus."""
    return "ray_" + gauge_name(metric)


def exported_names() -> frozenset[str]:
    """Every name that a query may use."""
    return frozenset(map(exported_name, [*METRICS, *RUN_METRICS])) | RAY_METRICS
