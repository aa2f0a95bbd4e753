"""What the control plane costs and where it saturates: the real actors, object store and monitor, stub engines.

    RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0 python -m actors.bench.scaling [--quick] [--json FILE]

prints the tables of docs/scaling.md as Markdown. Two cores cannot run 32 samplers at speed: CPU seconds per call
and per token are what the arithmetic goes on from. With `--run DIR`, a run at 256 rollouts a step, the share of its
step time that monitor and decision path take is printed too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from actors.bench.capacity import Assumptions, Cost, Costs, fit, markdown, plan
from actors.bench.decision_path import bytes_figure, chunks_of_a_step, decision_path_figure
from kat_ray.data.accounting import ScoredTokens
from kat_ray.records.traces import TokenFeatures, TraceRow, write_traces
from kat_ray.run.step_metrics import score_metrics
from kat_ray.types.records import StopReason

ROLES = ("sampler", "scorer", "monitor", "driver", "system")
_FLOOD = (16, 64, 256)  # rollouts of a chunk


def books_seconds_per_token(rollouts: int = 256, length: int = 512) -> float:
    """CPU seconds of the driver's traces and metrics of a step, per token."""
    scored = chunks_of_a_step(rollouts, length, 16)
    ids = np.zeros(length, dtype=np.int32)
    with tempfile.TemporaryDirectory() as folder:
        spent = []
        for step in range(3):  # the first one loads libraries
            started = time.process_time()
            tokens = ScoredTokens(scored)
            d = tokens.column("d")
            columns: dict[str, Any] = {f.name: tokens.column(f.name) for f in fields(TokenFeatures)}
            rows = [
                TraceRow(
                    i, str(i), 0, 0, ids, d[i], StopReason.MAX_TOKENS, None, None, None, False, None, None, None,
                    None, TokenFeatures(**{name: column[i] for name, column in columns.items()}),
                )
                for i in range(rollouts)
            ]  # fmt: skip
            write_traces(Path(folder), step, rows)
            score_metrics(scored, dict.fromkeys(range(rollouts), length))
            spent.append(time.process_time() - started)
    return min(spent[1:]) / (rollouts * length)


@dataclass(frozen=True)
class Flood:
    """A monitor actor that is sent chunks faster than it can take them."""

    rollouts: int  # of a chunk
    calls: int
    tokens: int
    seconds: float
    cpu_seconds: float


def flood(monitor: Any, step: int, rollouts: int, calls: int) -> Flood:
    """Saturate a monitor actor with chunks of `rollouts` x 16 tokens that lie in the object store."""
    import ray

    refs = [ray.put(c) for c in chunks_of_a_step(rollouts, 16 * calls, 16)]
    ray.get(monitor.start_step.remote(step, list(range(rollouts)), [True] * rollouts))
    before, started = ray.get(monitor.cpu.remote())[0], time.monotonic()
    ray.get([monitor.observe.remote(r) for r in refs])
    seconds, after = time.monotonic() - started, ray.get(monitor.cpu.remote())[0]
    ray.get(monitor.end_step.remote())
    return Flood(rollouts, calls, rollouts * 16 * calls, seconds, after - before)


def settings_of(quick: bool) -> list[Any]:
    """The configurations: full speed, then a few at a set rate for the latency of decisions."""
    from actors.bench.fleet import Setting

    if quick:
        return [
            Setting(1, 256, 1),
            Setting(4, 256, 2),
            Setting(4, 1024, 2, shards=2),
            Setting(4, 1024, 2, rate=8e3),
        ]
    grid = [(1, 256), (1, 1024), (4, 256), (4, 1024), (4, 4096), (16, 1024), (16, 4096), (32, 1024), (32, 16384)]
    return [
        *(Setting(samplers, rollouts, min(4, samplers)) for samplers, rollouts in grid),
        Setting(4, 1024, 4, max_tokens=256),
        Setting(32, 16384, 4, shards=4),
        *(Setting(samplers, 1024, min(4, samplers), rate=rate) for samplers in (4, 16) for rate in (4e3, 16e3)),
    ]


def run(quick: bool) -> tuple[list[Any], list[Flood]]:
    """Measure all settings, and flood one monitor."""
    from actors.bench.fleet import Fleet, local_ray

    settings = settings_of(quick)
    with local_ray():
        fleet = Fleet(
            max(s.samplers for s in settings), max(s.scorers for s in settings), {s.shards for s in settings}
        )
        measured = []
        for setting in settings:
            measured.append(fleet.measure(setting, tokens=20_000 if quick else 100_000))
            print(f"{setting}: {measured[-1].tokens_per_second:,.0f} tokens/s", file=sys.stderr, flush=True)
        floods = [flood(fleet.monitors[1][0], 10**6 + i, r, 20 if quick else 150) for i, r in enumerate(_FLOOD)]
    return measured, floods


def costs_of(measured: Sequence[Any], floods: Sequence[Flood]) -> Costs:
    """Costs per call and token of each role: of the monitor from the floods, of others from runs at full speed."""
    fast = [m for m in measured if m.setting.rate is None]

    def of(role: str) -> Cost:
        return fit([m.chunks for m in fast], [m.tokens for m in fast], [m.cpu[role] for m in fast])

    return Costs(
        sampler=of("sampler"),
        scorer=of("scorer"),
        monitor=fit([f.calls for f in floods], [f.tokens for f in floods], [f.cpu_seconds for f in floods]),
        driver=fit([m.rollouts for m in fast], [m.tokens for m in fast], [m.cpu["driver"] for m in fast]),
        books_token=books_seconds_per_token(),
        bytes_token=max(m.bytes_put / m.tokens for m in measured),
    )


def report(measured: Sequence[Any], floods: Sequence[Flood], costs: Costs) -> str:
    """All tables of docs/scaling.md."""
    assumed = Assumptions()
    parts = [
        "### Full speed and set rates\n",
        "| samplers x rollouts (scorers, monitors) | rate set | tokens/s | calls + puts /M tok | bytes/tok "
        "| trapped | CPU s /M tok: sampler | scorer | monitor | driver | raylet, GCS | decision p50 ms | p99 ms "
        "| busiest process |",
        "| --- |" + " ---: |" * 12 + " --- |",
        *(_row(m) for m in measured),
        "\n### One monitor, flooded\n",
        "| rollouts of a chunk | chunks/s | tokens/s | CPU ms a chunk | CPU us a token | share of a core |",
        "| ---: |" + " ---: |" * 5,
        *(
            f"| {f.rollouts} | {f.calls / f.seconds:,.0f} | {f.tokens / f.seconds:,.0f} "
            f"| {f.cpu_seconds / f.calls * 1e3:.2f} | {f.cpu_seconds / f.tokens * 1e6:.3f} "
            f"| {f.cpu_seconds / f.seconds:.0%} |"
            for f in floods
        ),
        "\n### Costs that the arithmetic takes\n",
        "| | ms a chunk | us a token |",
        "| --- | ---: | ---: |",
        *(
            f"| {role} | {cost.call * 1e3:.2f} | {cost.token * 1e6:.3f} |"
            for role, cost in (("sampler", costs.sampler), ("scorer", costs.scorer), ("monitor", costs.monitor))
        ),
        f"| driver, sampling | {costs.driver.call * 1e3:.3f} a rollout | {costs.driver.token * 1e6:.3f} |",
        f"| driver, books and traces | | {costs.books_token * 1e6:.3f} |",
        f"\n### 8, 64 and 512 GPUs\n\n{markdown([plan(n, costs, assumed) for n in (8, 64, 512)])}",
    ]
    return "\n".join(parts)


def _row(m: Any) -> str:
    s = m.setting
    million = m.tokens / 1e6
    role = max(m.busiest, key=m.busiest.get)
    cpu = " | ".join(f"{m.cpu_per_million(r):.2f}" for r in ROLES)
    return (
        f"| {s.name} ({s.scorers}, {s.shards}) | {f'{s.rate:,.0f}' if s.rate else 'none'} "
        f"| {m.tokens_per_second:,.0f} | {(m.remote_calls + m.puts) / million:,.0f} | {m.bytes_put / m.tokens:.0f} "
        f"| {m.trapped_share:.0%} | {cpu} | {m.latency(50) * 1e3:.0f} | {m.latency(99) * 1e3:.0f} "
        f"| {role} {m.busiest[role]:.0%} |"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few settings, few tokens: to see that it works")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    parser.add_argument("--run", type=Path, help="directory of a run, to print the figures with")
    args = parser.parse_args()
    started = time.monotonic()
    load = os.getloadavg()[0]
    measured, floods = run(args.quick)
    costs = costs_of(measured, floods)
    print(f"Load average before: {load:.1f} on {os.cpu_count()} cores; took {time.monotonic() - started:.0f} s.\n")
    print(report(measured, floods, costs))
    figures = [bytes_figure()] + ([decision_path_figure(args.run)] if args.run else [])
    for figure in figures:
        print(f"\n{figure.name}: {figure.value:.4g} (goal {figure.sense} {figure.goal}) {dict(figure.detail)}")
    if args.json:
        rows = [asdict(m) | {"decision_seconds": [m.latency(p) for p in (50, 99)]} for m in measured]
        content = {"settings": rows, "floods": [asdict(f) for f in floods], "costs": asdict(costs)}
        content["figures"] = [f.as_dict() for f in figures]
        args.json.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
