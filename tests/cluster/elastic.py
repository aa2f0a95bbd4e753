"""Runs whose pools grow and shrink."""

from tests.cluster.disturb import lines_of
from tests.deploy.ray_process import until
from tests.support.runs import stub_config

# Two seconds a step of one sampler: on a slow machine too sampling is what everything waits for, and a run outlasts
# the start of a replica.
RATE = 100.0
STEPS = 60
PATIENCE = 300  # seconds that any change may take before a test fails


def elastic_config(files, tmp_path, steps=STEPS, **sections):
    sampler, scorer = sections.pop("sampler", {}), sections.pop("scorer", {})
    return stub_config(
        files, tmp_path, steps=steps,
        run={"steps": steps, "checkpoint_every": 0, "tensorboard": False},
        rollout={"prompts_per_step": 4, "top_k_logprobs": 16, "max_tokens": 24,
                 "staleness": sections.pop("staleness", 0)},
        sampler={"replicas": 1, "num_cpus": 0.5} | sampler, scorer={"replicas": 1, "num_cpus": 0.5} | scorer,
        pools={"grow_after": 1, "shrink_after": 1}, **sections,
    )  # fmt: skip


def column(metrics, name):
    return [m[f"pools/{name}"] for m in metrics]


def wait_for(tmp_path, seen, what):
    """Until the steps that a run has done show it."""
    until(lambda: seen(lines_of(tmp_path / "run" / "metrics.jsonl")), PATIENCE, what)
