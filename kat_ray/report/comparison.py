"""A comparison of rules as one page: the table, accuracy against cost, differences with their intervals, curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kat_ray.analysis.compare_results import Result
from kat_ray.analysis.compare_table import INTERVALS, Paired, caption, difference_table, paired, table
from kat_ray.records.json_records import METRICS, read_json_lines
from kat_ray.report.page import Section, png_of, render, write_page
from kat_ray.report.style import figure, percent, smooth

_ALIKE = "Each rule from the same start, on the same prompts, for the same number of optimiser steps."
_NOT_ALIKE = "The runs differ in more than their rules, or not everything is known: see the notes."


def write_comparison(results: Sequence[Result], notes: Sequence[str], out: Path) -> list[Path]:
    """Write compare.html and its pictures into `out`; returns the files."""
    curves, damage = _curves(results)
    # A damaged file may have been noted before, for its seconds.
    notes = list(dict.fromkeys([*notes, *damage]))
    sections = [
        Section("table", "Every rule", caption(results), table=_turned(*table(results))),
        Section(
            "accuracy", "Accuracy against tokens",
            "Up is better, left is cheaper. Small dots are single seeds, bars are standard deviations.",
            png=png_of(_accuracy(results)),
        ),
    ]  # fmt: skip
    if pairs := paired(results):
        sections.append(
            Section(
                "differences", "Differences", f"The picture shows avg@k. {INTERVALS}",
                png=png_of(_differences(results, pairs)), table=_turned(*difference_table(pairs)),
            )
        )  # fmt: skip
    text = "Mean over seeds of each step, smoothed. Left: reverse KL of the trained tokens; right: tokens kept."
    sections.append(Section("curves", "Over the steps", text, png=png_of(curves)))
    values = {
        "title": f"kat-ray: {len(results)} rules, {max(len(r.seeds) for r in results)} seeds",
        "subtitle": _NOT_ALIKE if notes else _ALIKE,
        "notes": notes,
        "sections": sections,
    }
    return write_page(render("compare.html.j2", values), sections, out / "compare.html")


def _turned(heading: list[str], rows: list[list[str]]) -> list[list[str]]:
    """One column an arm: a page is higher than it is wide."""
    return list(map(list, zip(heading, *rows, strict=True)))


def _accuracy(results: Sequence[Result]) -> Any:
    fig, (axes,) = figure(1, 2, height=4)
    for panel, name, label in zip(axes, ("generated_tokens", "tflop"), ("tokens generated", "TFLOP"), strict=True):
        for number, result in enumerate(results):
            x, y = result.measure(name), result.measure("avg_at_k")
            spread = {"xerr": x.std(ddof=1), "yerr": y.std(ddof=1)} if len(x) > 1 else {}
            colour = f"C{number % 10}"
            panel.scatter(x, y, s=12, color=colour, alpha=0.45)
            panel.errorbar(x.mean(), y.mean(), fmt="o", color=colour, label=result.label, capsize=2, **spread)
        panel.set(xlabel=label, ylabel="avg@k after training")
        panel.set_xlim(left=0)
        percent(panel.yaxis)
    axes[1].legend(loc="lower left")
    return fig


def _differences(results: Sequence[Result], pairs: Sequence[Paired]) -> Any:
    baselines = list(dict.fromkeys(pair.baseline for pair in pairs))
    fig, (row,) = figure(1, len(baselines), height=0.8 + 0.35 * len(results))
    for axes, baseline in zip(row, baselines, strict=True):
        others = [pair for pair in pairs if pair.baseline is baseline]
        for i, pair in enumerate(others):
            mean, low, high = pair.differences["avg_at_k"]
            colour = f"C{results.index(pair.result) % 10}"
            axes.errorbar(mean, i, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(others)), labels=[pair.result.label for pair in others])
        axes.set(title=f"against {baseline.label}", ylim=(len(others) - 0.5, -0.5))
        percent(axes.xaxis)
    return fig


def _curves(results: Sequence[Result]) -> tuple[Any, list[str]]:
    fig, ((kl, kept),) = figure(1, 2)
    notes: list[str] = []
    for number, result in enumerate(results):
        runs = []
        for folder in result.folders:
            lines, damage = read_json_lines(folder / "metrics.jsonl", METRICS)
            runs.append(lines)
            notes += damage
        for axes, metric in ((kl, "learner/loss"), (kept, "rollout/kept_tokens")):
            values = _mean_series(runs, metric)
            if values:
                axes.plot(
                    range(1, len(values) + 1),
                    smooth(values, max(1, len(values) // 15)),
                    color=f"C{number % 10}",
                    label=result.label,
                )
    kl.set(title="Reverse KL of the trained tokens", xlabel="step", ylabel="nats", yscale="log")
    kept.set(title="Tokens kept per step", xlabel="step")
    kept.set_ylim(bottom=0)
    if kept.lines:
        kept.legend()
    return fig, notes


def _mean_series(runs: Sequence[Sequence[dict[str, Any]]], metric: str) -> list[float]:
    """Mean over runs of a metric, as far as all runs have it."""
    series = [[line[metric] for line in lines if line.get(metric) is not None] for lines in runs]
    shortest = min(map(len, series), default=0)
    means: list[float] = np.mean([values[:shortest] for values in series], axis=0).tolist() if shortest else []
    return means
