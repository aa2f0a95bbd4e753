"""Finished runs as a comparison reads them."""

import json
from pathlib import Path

import numpy as np

from kat_ray.analysis.compare import config_of, parse_arm
from kat_ray.config.load import load_config, save_config

BASE = load_config("demo", ["run.steps=3", "termination.budget=null"])
SUMMARY = {
    "rollouts_started": 10, "kept_tokens": 300, "generated_tokens": 400, "scored_tokens": 390,
    "trained_tokens": 290, "overshoot_tokens": 20, "prompt_tokens": 100, "wall_seconds": 12.0,
    "parameters": {"student": 1000, "teacher": 2000}, "versions": {"torch": "1"}, "git_commit": "a",
    "eval_before": {"avg_at_k": 0.1, "pass_at_k": 0.2, "mean_length": 9.0},
}  # fmt: skip


def changed(config, section, **fields):
    return config.model_copy(update={section: getattr(config, section).model_copy(update=fields)})


def finish(config, right, along=None, **summary):
    """What a run leaves, as far as a comparison reads it.

    With `along`, which has right answers by step, it was evaluated along the way, and its tokens grew evenly.
    """
    folder = Path(config.run.dir) / config.run.name
    folder.mkdir(parents=True, exist_ok=True)
    k = config.evaluation.k
    evaluation = {"avg_at_k": float(np.mean(right)) / k, "pass_at_k": float(np.mean(np.array(right) > 0)), "k": k}
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"eval_after": evaluation} | summary))
    lines = [{"k": k, "right": [0] * len(right)}, {"k": k, "right": right}]
    if along is not None:
        verdicts = {0: [0] * len(right), **along, config.run.steps: right}
        lines = [line_of(step, k, row, config.run.steps, SUMMARY | summary) for step, row in verdicts.items()]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = [{"step": 0, "eval/avg_at_k": 0.1}]
    steps += [{"step": i + 1, "time/step": 1.5, "learner/loss": 0.5} for i in range(config.run.steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    save_config(config, folder / "config.yaml")
    return folder


def line_of(step, k, right, steps, summary):
    """A line of evaluations.jsonl."""
    names = [f"{name}_tokens" for name in ("prompt", "generated", "kept", "scored", "trained")]
    return {"step": step, "k": k, "right": right} | {name: summary[name] * step // steps for name in names}


def finish_rule(tmp_path, rule, seed, right, base=BASE, **summary):
    return finish(config_of(base, parse_arm(rule), seed, tmp_path), right, **summary)
