"""The pipeline from the inside: what a step fails to overlap, what publication and decisions take, its start.

Whole runs of kat-ray at 256 rollouts of up to 512 tokens on the tiny pair, with staleness 0 and 1 and with KAT; the
figures are sums over the measured steps of what each run recorded itself (kat_ray/observability/metric_catalog.py).
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.bench.decision_path import bytes_figure, decision_path_figure
from actors.bench.end_to_end import LONG
from actors.bench.figure import Figure
from actors.bench.pairs import make_pair
from actors.bench.sides import WARM_UP, SideError, run_child, run_kat_ray
from kat_ray.config import RolloutConfig

GROUP = "pipeline"
_DEFAULT = RolloutConfig()
_COARSE = [f"rollout.{f}={getattr(_DEFAULT, f)}" for f in ("chunk_tokens", "max_chunks_ahead")]
# Rule, staleness, overrides. The embedded configuration sends a chunk every 4 tokens, the default one every 16.
_RUNS: dict[str, tuple[str, int, list[str]]] = {
    "none": ("none", 0, []),
    "ahead": ("none", 1, []),
    "kat": ("kat", 0, _COARSE),
}


def figures(folder: Path) -> list[Figure]:
    """All figures of this part, below `folder`."""
    pair = make_pair(LONG.pair, folder / "pairs")
    steps: dict[str, list[dict[str, float]]] = {}
    for name, (rule, staleness, overrides) in _RUNS.items():
        where = folder / "pipeline" / name
        # With staleness 1 nothing is sampled while the last step is learnt: that step is not like the others.
        size = replace(LONG, steps=LONG.steps + staleness)
        run_kat_ray(size, pair, rule, where, overrides=[f"rollout.staleness={staleness}", *overrides])
        lines = (where / rule / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        recorded = [m for m in map(json.loads, lines) if "time/step" in m]
        steps[name] = recorded[WARM_UP : WARM_UP + LONG.steps]
    return [
        _idle(steps["ahead"], "staleness 1", 0.15, ""),
        _idle(steps["none"], "staleness 0", 0.15, _STRICT),
        Figure(
            GROUP, "tokens per second, staleness 1 / staleness 0", _rate(steps["ahead"]) / _rate(steps["none"]),
            detail={"staleness_0": _rate(steps["none"]), "staleness_1": _rate(steps["ahead"])},
        ),
        Figure(
            GROUP, "publication of the weights, share of step time", _share(steps["none"], "time/publish"),
            goal=0.05, sense="<=", detail={"seconds": [m["time/publish"] for m in steps["none"]]},
        ),
        _named(decision_path_figure(folder / "pipeline/kat/kat", WARM_UP), "a chunk every 16 tokens, rule kat"),
        _named(decision_path_figure(folder / "pipeline/none/none", WARM_UP), "every 4 tokens, rule none"),
        bytes_figure(),
        _startup(folder / "pipeline" / "startup"),
    ]  # fmt: skip


_STRICT = (
    "strictly on-policy: no rollout can be sampled while the weights it needs are learnt, so the busiest stage "
    "idles at least while the learner works; staleness 1 overlaps the two"
)


def _named(figure: Figure, words: str) -> Figure:
    return replace(figure, group=GROUP, name=f"{figure.name}, {words}")


def _idle(steps: list[dict[str, float]], mode: str, goal: float, note: str) -> Figure:
    stages = ("time/sampler_busy", "time/scorer_busy", "learner/seconds")
    shares = {name: _share(steps, name) for name in stages}
    return Figure(
        GROUP, f"idle share of the busiest stage in a step, {mode}", max(0.0, 1.0 - max(shares.values())),
        goal=goal, sense="<=", detail={"busy_share": shares}, note=note,
    )  # fmt: skip


def _share(steps: list[dict[str, float]], name: str) -> float:
    return sum(m[name] for m in steps) / sum(m["time/step"] for m in steps)


def _rate(steps: list[dict[str, float]]) -> float:
    return sum(m["rollout/generated_tokens"] for m in steps) / sum(m["time/step"] for m in steps)


def _startup(folder: Path) -> Figure:
    """Seconds from the command to the first step's end, with the embedded configuration as `make train` runs it."""
    import os
    import sys

    folder.mkdir(parents=True, exist_ok=True)
    overrides = [f"run.dir={folder}", "run.name=startup", "run.overwrite=true", "run.steps=1"]
    env: dict[str, Any] = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    started = time.time()
    name = "seconds from `make train` to the end of the first step, both evaluations before it included"
    try:
        command = [sys.executable, "-m", "kat_ray.cli", "train", "demo", *overrides]
        run_child(command, env, 300.0, folder / "startup.log")
    except SideError as error:
        return Figure(GROUP, name, None, 60, "<=", note=str(error))
    lines = (folder / "startup" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (first,) = (m for m in map(json.loads, lines) if "time/step" in m)
    return Figure(GROUP, name, first["time"] - started, 60, "<=", detail={"first_step_seconds": first["time/step"]})
