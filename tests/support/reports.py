"""Directories of runs as a report reads them."""

import json

import numpy as np

from kat_ray.config.load import load_config, save_config
from kat_ray.records.traces import TokenFeatures, TraceRow, write_traces
from kat_ray.types.records import StopReason

# W = 4, C = 2, threshold 0.5: cut at 3 (see test_termination), and token 8 lifts z(9) to 0.5 again.
STAGES = [1.0] * 4 + [0.0] * 4 + [2.0] * 3
RULE = ["termination.budget=null", "termination.window=4", "termination.consecutive=2", "termination.exempt=0"]
APPLIED = ["window=4", "consecutive=2", "exempt=0", "min_samples=4", "min_steps=1", "eta=0.2"]
OWN = [*RULE, "termination.min_samples=1", "termination.buffer=8", "termination.min_steps=0"]


def features(d, top=5):
    n = len(d)
    column = np.linspace(0, 1, n).astype(np.float32)
    return TokenFeatures(np.full(n, top, np.int32), column, column, 2 * column, column, column)


def row(rollout_id, d, step=0, **changes):
    d = np.array(d, np.float32)
    values = dict(
        rollout_id=rollout_id, prompt_id=f"train:{rollout_id + 1}", step=step, policy_version=step,
        token_ids=np.arange(len(d), dtype=np.int32) % 150 + 2, d=d, stop_reason=StopReason.EOS, cut=None,
        confirmed=None, threshold=0.5, probe=True, minimum=0.0, would_cut=None, correct=True, features=features(d),
    )  # fmt: skip
    return TraceRow(**(values | changes))


def write_run(path, rows_by_step, rule=OWN):
    """A run directory as a report reads it."""
    (path / "traces").mkdir(parents=True)
    save_config(load_config("demo", [*rule, f"run.steps={len(rows_by_step)}"]), path / "config.yaml")
    lines = [{"step": 0, "eval/avg_at_k": 0.1, "eval/pass_at_k": 0.3, "eval/mean_length": 9.0}]
    for step, rows in enumerate(rows_by_step):
        write_traces(path / "traces", step, rows)
        lines.append(
            {
                "step": step + 1, "kl/mean": 0.5 / (step + 1), "learner/loss": 0.4, "kat/threshold": 0.5,
                "rollout/generated_tokens": 30.0, "rollout/kept_tokens": 20.0, "rollout/eos_share": 0.75,
                "rollout/max_tokens_share": 0.0, "rollout/trapped_share": 0.25, "probe/would_cut_share": 0.5,
            }
        )  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = {"avg_at_k": 0.5, "pass_at_k": 0.75, "k": 3}
    (path / "evaluations.jsonl").write_text(
        json.dumps(evaluation | {"avg_at_k": 0.25}) + "\n" + json.dumps(evaluation)
    )
    return path


def small_run(tmp_path, **changes):
    cut = dict(probe=False, stop_reason=StopReason.TRAPPED, cut=3, confirmed=8, correct=None)
    rows = [row(0, STAGES, would_cut=3, **changes), row(1, [1.0] * 12, correct=False, **changes)]
    rows += [row(2, STAGES[:8], **cut, **changes), row(3, [1.0] * 5, threshold=None, **changes)]
    return write_run(tmp_path / "run", [rows])
