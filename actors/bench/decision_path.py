"""Two figures of the decision path: its share of the step time, and what it puts into the object store per token.

No Ray: the records are made by the code that makes them in a run, from engines without a model.
"""

from __future__ import annotations

import json
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from actors.bench.figure import Figure
from kat_ray.data.chunks import PendingRollout, build_chunk
from kat_ray.termination import RunFacts
from kat_ray.termination.settings import KatSettings
from kat_ray.types.records import EngineEnd, ScoredChunk


def scored_chunk(rollouts: int, start: int, tokens: int, ended: EngineEnd, rng: np.random.Generator) -> ScoredChunk:
    """A scored chunk of `tokens` new tokens of each rollout 0 .. rollouts - 1, as a scorer makes it."""
    n = rollouts * tokens
    features = rng.random((5, n)).astype(np.float16)
    return ScoredChunk(
        scorer="scorer:0",
        attempt=0,
        rollout_ids=np.arange(rollouts, dtype=np.int64),
        start=np.full(rollouts, start, dtype=np.int32),
        offsets=np.arange(rollouts + 1, dtype=np.int32) * tokens,
        token_ids=rng.integers(0, 50_000, n, dtype=np.int32),
        d=rng.exponential(0.3, n).astype(np.float32),
        ended=np.full(rollouts, ended, dtype=np.int8),
        overlap=features[0],
        teacher_max=features[1],
        teacher_entropy=features[2],
        student_entropy=features[3],
        student_tail=features[4],
        teacher_top=rng.integers(0, 50_000, n, dtype=np.int32),
        seconds=0.0,
    )


def chunks_of_a_step(rollouts: int, length: int, tokens: int) -> list[ScoredChunk]:
    """A step of equal rollouts, `tokens` of each a chunk, ended by the last one."""
    rng = np.random.default_rng(0)
    last = length - tokens
    ends = {last: EngineEnd.MAX_TOKENS}
    return [
        scored_chunk(rollouts, start, tokens, ends.get(start, EngineEnd.RUNNING), rng)
        for start in range(0, length, tokens)
    ]


def monitor_seconds_per_token(
    rollouts: int = 256, length: int = 512, tokens: int = 16, repeats: int = 3, budget: float | None = None
) -> float:
    """CPU seconds of `TrapMonitor`, no Ray, per token: `start_step`, `observe` of real records and `end_step`.

    The best of some repeats under the active KAT rule, with a quantile or a budget; what is slower was disturbed.
    """
    from actors.monitor.trap_monitor import TrapMonitor

    rule = KatSettings(min_samples=1, min_steps=0, window=64, budget=budget)
    chunks = chunks_of_a_step(rollouts, length, tokens)
    probes = [i % 10 == 0 for i in range(rollouts)]
    spent = []
    monitor = TrapMonitor(rule, RunFacts(0, length))
    for step in range(repeats + 1):  # the first one calibrates
        started = time.process_time()
        monitor.start_step(step, range(rollouts), probes)
        for chunk in chunks:
            monitor.observe(chunk)
        monitor.end_step()
        spent.append(time.process_time() - started)
    return min(spent[1:]) / (rollouts * length)


def decision_path_figure(run: Path, skip: int = 2) -> Figure:
    """Monitor plus decision path as a share of the step time, from a run's metrics at 256 rollouts a step.

    The first `skip` steps are left out. For comparison `detail` holds the monitor alone on real records, by itself.
    ValueError where no steps are left.
    """
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [m for m in lines if "time/step" in m][skip:]
    if not steps:
        raise ValueError(f"{run}: no steps after the first {skip}")
    total = {name: sum(m[name] for m in steps) for name in ("time/step", "time/monitor", "time/control")}
    tokens = sum(m["rollout/generated_tokens"] for m in steps)
    return Figure(
        group="scaling",
        name="monitor plus decision path, share of step time at 256 concurrent rollouts",
        value=(total["time/monitor"] + total["time/control"]) / total["time/step"],
        goal=0.02,
        sense="<=",
        detail={
            "steps": len(steps),
            "step_seconds": total["time/step"] / len(steps),
            "tokens_per_second": tokens / total["time/step"],
            "monitor_us_per_token": total["time/monitor"] / tokens * 1e6,
            "sampler_us_per_token": total["time/control"] / tokens * 1e6,
            "monitor_alone_us_per_token": monitor_seconds_per_token() * 1e6,
            "monitor_alone_with_a_budget_us_per_token": monitor_seconds_per_token(budget=0.02) * 1e6,
        },
        note="CPU time of the monitor, and of the sampler's loop in sending chunks and applying decisions",
    )


def bytes_figure(rollouts: int = 256, length: int = 256, prompt: int = 128, vocabulary: int = 151_936) -> Figure:
    """Object-store bytes per generated token at k = 64, over all records of a step of equal rollouts.

    Everything put stays until the step ends: the peak is what is put. The default vocabulary is Qwen3's.
    """
    by_field: dict[str, int] = {}
    for records in _records(rollouts, length, prompt, vocabulary):
        for record in records:
            for f in fields(record):
                value = getattr(record, f.name)
                if isinstance(value, np.ndarray):
                    name = f"{type(record).__name__}.{f.name}"
                    by_field[name] = by_field.get(name, 0) + value.nbytes
    tokens = rollouts * length
    return Figure(
        group="scaling",
        name="object-store bytes per generated token at k = 64",
        value=sum(by_field.values()) / tokens,
        goal=450,
        sense="<=",
        detail={name: round(size / tokens, 2) for name, size in by_field.items()} | {"vocabulary": vocabulary},
        note="arrays of the real records; pickling adds about 1 kB a record",
    )


def _records(rollouts: int, length: int, prompt: int, vocabulary: int, chunk_tokens: int = 16) -> Any:
    """The records of every chunk of a step: RolloutChunk, ScoredChunk and TeacherRows."""
    from actors.bench.fleet import bench_config
    from actors.teacher.settings import ScorerSettings
    from actors.testing.stub_engine import StubEngine
    from actors.testing.stub_teacher import StubScorer, stub_teacher
    from kat_ray.types.records import SamplingSettings

    engine = StubEngine(64, vocabulary)
    scorer = StubScorer(
        "scorer:0", ScorerSettings.from_config(bench_config(rollouts), "stub", (1,), length), stub_teacher
    )
    pending = {str(i): PendingRollout(i, tuple(range(prompt)), 0) for i in range(rollouts)}
    for name in pending:
        engine.add(name, (), 0, SamplingSettings(length, 1.0, 1.0, 64, (1,)))
    for step in range(1, length + 1):
        for row in engine.step():
            assert row.topk_ids is not None and row.logprobs is not None
            pending[row.request_id].add(row.token_ids, row.topk_ids, row.logprobs)
            pending[row.request_id].end = row.end
        if step % chunk_tokens == 0 or not engine.running:
            news = [p for p in pending.values() if p.has_news]
            chunk = build_chunk(news, [], attempt=0, top_k=64, vocabulary=vocabulary)
            yield (chunk, *scorer.score(chunk))
