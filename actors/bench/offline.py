"""What is done with a run afterwards: how fast traces are replayed, and what a report of 10,000 rollouts costs."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from actors.bench.figure import Figure
from kat_ray.analysis.replay import calibrate, load_traces
from kat_ray.analysis.replay_rules import COLUMNS, follow
from kat_ray.config.load import load_config, save_config
from kat_ray.records.traces import TokenFeatures, TraceRow, write_traces
from kat_ray.report.command import report
from kat_ray.termination import RULES, RunFacts
from kat_ray.termination.settings import KatSettings
from kat_ray.types.records import StopReason

_ROLLOUTS, _PER_STEP, _LONGEST = 10_000, 100, 208
_RULES = ("fixed_prefix", "random", "repetition", "prune_opd")


def offline_figures() -> list[Figure]:
    """Trace tokens a second of CPU time on one core, for every rule; time to make a report."""
    with TemporaryDirectory() as folder:
        run = _recorded(Path(folder) / "run")
        started = time.perf_counter()
        files = report(run, None, out=None, rollouts=300, gradients=None, say=lambda text: None)
        seconds = time.perf_counter() - started
        megabytes = files[0].stat().st_size / 1e6
        loading = time.process_time()
        traces, _ = load_traces(run, COLUMNS)
        loading = time.process_time() - loading
    tokens = len(traces.d)
    facts = RunFacts(0, _LONGEST)
    kat = {"window": 16, "min_samples": 64, "min_steps": 2}
    speed = {
        name: tokens / _cpu(lambda changes=changes: calibrate(traces, KatSettings(**kat, **changes)))
        for name, changes in (("kat", {}), ("kat with a budget", {"budget": 0.02}))
    }
    for name in _RULES:
        settings = RULES[name].settings.model_construct(rule=name)
        speed[name] = tokens / _cpu(lambda settings=settings: follow(traces, settings, facts))
    return [
        Figure(
            "offline", f"replay of rule {name}, million trace tokens per second of one core", value / 1e6,
            goal=1.0, detail={"tokens": tokens, "rollouts": _ROLLOUTS, "load_seconds": loading},
        )
        for name, value in speed.items()
    ] + [
        Figure(
            "offline", "seconds to make the report of 10,000 rollouts", seconds,
            detail={"html_megabytes": megabytes, "tokens": tokens},
            note="that it opens in a browser within 5 s is a test (tests/browser)",
        )
    ]  # fmt: skip


def _cpu(work: object) -> float:
    assert callable(work)
    started = time.process_time()
    work()
    return time.process_time() - started


def _recorded(run: Path) -> Path:
    """A run of rule none with 10,000 rollouts of the demo's lengths; half of them fall into a trap."""
    (run / "traces").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for step in range(_ROLLOUTS // _PER_STEP):
        rows = [_row(step * _PER_STEP + i, step, rng) for i in range(_PER_STEP)]
        write_traces(run / "traces", step, rows)
    save_config(load_config("demo", ["termination.rule=none"]), run / "config.yaml")
    return run


def _row(rollout_id: int, step: int, rng: np.random.Generator) -> TraceRow:
    length = int(rng.integers(20, _LONGEST + 1))
    d = rng.exponential(0.4, length).astype(np.float32)
    if rollout_id % 2:
        d[length // 2 :] *= 0.01
    share = rng.random(length, dtype=np.float32)
    ids = rng.integers(3, 160, length).astype(np.int32)
    return TraceRow(
        rollout_id=rollout_id, prompt_id=f"train:{rollout_id % 6000 + 1}", step=step, policy_version=step,
        token_ids=ids, d=d, stop_reason=StopReason.MAX_TOKENS if length == _LONGEST else StopReason.EOS, cut=None,
        confirmed=None, threshold=None, probe=False, minimum=None, would_cut=None, correct=bool(rollout_id % 3),
        features=TokenFeatures(ids, share, share, share, share, share),
    )  # fmt: skip
