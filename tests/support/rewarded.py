"""Runs that learn from rewards, on the fake cluster, as directories that commands read."""

import json

from kat_ray.config.load import save_config
from kat_ray.records.traces import write_traces
from tests.support.scenarios import LAYOUTS

RULE = {
    "rule": "kat", "window": 3, "consecutive": 2, "exempt": 1, "min_samples": 4, "min_steps": 1, "eta": 0.5,
    "probe_share": 0.4,
}  # fmt: skip


def with_rewards(**rl):
    """The small run with rewards, six groups of four a step, many cuts, and these settings of the objective."""
    rollout = {**LAYOUTS["rewards"]["rollout"], "prompts_per_step": 6, "rollouts_per_prompt": 4}
    return {"objective": {"rl": {"weight": 1.0, **rl}}, "rollout": rollout, "termination": RULE}


def written(run, path):
    """What a `Run` that has ended left, as a run directory."""
    (path / "traces").mkdir(parents=True)
    for step, rows in run.records.traces.items():
        write_traces(path / "traces", step, rows)
    lines = [json.dumps(metrics | {"step": done}) for done, metrics in run.records.metrics]
    (path / "metrics.jsonl").write_text("\n".join(lines))
    save_config(run.config, path / "config.yaml")
    return path
