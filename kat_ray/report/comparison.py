"""A comparison of rules as one page: the table, accuracy against cost, differences with their intervals, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from kat_ray.analysis.compare_curves import COSTS, STEPS
from kat_ray.analysis.compare_equal import BANDS, EQUAL_COST, ArmCurve
from kat_ray.analysis.compare_results import Result
from kat_ray.analysis.compare_table import (
    INTERVALS,
    Compared,
    Paired,
    caption,
    difference_table,
    equal_tables,
    table,
)
from kat_ray.records.json_records import METRICS, read_json_lines
from kat_ray.report.page import Section, png_of, render, write_page
from kat_ray.report.style import GREY, figure, percent, smooth, thousands

_ALIKE = "Each rule from the same start, on the same prompts, for the same number of optimiser steps."
_MARKERS = {STEPS: "o", "generated_tokens": "s", "tflop": "^"}  # of a difference, by what is equal
_NOT_ALIKE = "The runs differ in more than their rules, or not everything is known: see the notes."


def write_comparison(compared: Compared, out: Path) -> list[Path]:
    """Write compare.html and its pictures into `out`; returns the files."""
    results, pairs = compared.results, compared.pairs
    curves, damage = _curves(results)
    # A damaged file may have been noted before, for its seconds.
    notes = list(dict.fromkeys([*compared.notes, *damage]))
    sections = [
        Section("table", "Every rule", caption(results), table=_turned(*table(results))),
        Section(
            "accuracy", "Accuracy against tokens",
            "Up is better, left is cheaper. Small dots are single seeds, bars are standard deviations.",
            png=png_of(_accuracy(results)),
        ),
    ]  # fmt: skip
    if compared.curves:
        picture = png_of(_along_the_way(results, compared.curves))
        sections.append(Section("along", "Accuracy along the runs", BANDS, png=picture))
    if pairs:
        also = ", at equal cost too; the table is after equal steps" if any(pair.equal for pair in pairs) else ""
        sections.append(
            Section(
                "differences", "Differences", f"The picture shows avg@k{also}. {INTERVALS}",
                png=png_of(_differences(results, pairs)), table=_turned(*difference_table(pairs)),
            )
        )  # fmt: skip
    sections += _equal_cost(compared)
    text = "Mean over seeds of each step, smoothed. Left: reverse KL of the trained tokens; right: tokens kept."
    sections.append(Section("curves", "Over the steps", text, png=png_of(curves)))
    values = {
        "title": f"kat-ray: {len(results)} rules, {max(len(r.seeds) for r in results)} seeds",
        "subtitle": _NOT_ALIKE if notes else _ALIKE,
        "notes": notes,
        "sections": sections,
    }
    return write_page(render("compare.html.j2", values), sections, out / "compare.html")


def _equal_cost(compared: Compared) -> list[Section]:
    """A table for each cost; what is said of one holds for the others."""
    sections, text = [], EQUAL_COST
    for name, content in equal_tables(compared.pairs).items():
        title = f"At equal {COSTS[name]}"
        sections.append(Section(f"equal-{name.replace('_', '-')}", title, text, table=_turned(*content)))
        text = "As at equal generated tokens."
    if compared.unknown is not None:
        sections.append(Section("equal-unknown", "Not known at equal cost", compared.unknown))
    return sections


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
        thousands(panel.xaxis)
        percent(panel.yaxis)
    axes[1].legend(loc="lower left")
    return fig


def _along_the_way(results: Sequence[Result], curves: Mapping[str, ArmCurve]) -> Any:
    fig, (axes,) = figure(1, 3, width=12, height=4.6)
    names = {**{name: f"{text} in training" for name, text in COSTS.items()}, STEPS: "optimiser steps"}
    for panel, (name, label) in zip(axes, names.items(), strict=True):
        for number, result in enumerate(results):
            if (arm := curves.get(result.label)) is None:
                continue
            colour, costs, band = f"C{number % 10}", arm.costs[name], arm.bands[name]
            panel.fill_between(costs, band.low, band.high, color=colour, alpha=0.13, linewidth=0)
            panel.plot(costs, band.mean, color=colour, linewidth=1.8, label=result.label)
            panel.plot(costs[-1], band.mean[-1], "o", color=colour, markersize=4)
            for curve in arm.runs.values():
                panel.scatter(
                    curve.cost(name), curve.right.mean(axis=1), s=5, color=colour, alpha=0.35, linewidth=0
                )
        panel.set(xlabel=label)
        panel.set_xlim(left=0)
        thousands(panel.xaxis)
        percent(panel.yaxis)
        panel.sharey(axes[0])
    axes[0].set(ylabel="avg@k on held-out problems")
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper left", ncols=6)
    return fig


def _differences(results: Sequence[Result], pairs: Sequence[Paired]) -> Any:
    baselines = list(dict.fromkeys(pair.baseline for pair in pairs))
    known = [name for name in COSTS if any(name in pair.equal for pair in pairs)]
    fig, (row,) = figure(1, len(baselines), height=0.9 + (0.35 + 0.15 * len(known)) * len(results))
    for axes, baseline in zip(row, baselines, strict=True):
        others = [pair for pair in pairs if pair.baseline is baseline]
        for i, pair in enumerate(others):
            found = {STEPS: pair.differences["avg_at_k"], **{n: e.difference for n, e in pair.equal.items()}}
            colour = f"C{results.index(pair.result) % 10}"
            for name, (mean, low, high) in found.items():
                at = i + 0.2 * (list(_MARKERS).index(name) - 1) if known else i
                axes.errorbar(
                    mean, at, xerr=[[mean - low], [high - mean]], fmt=_MARKERS[name], color=colour, capsize=3
                )
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(others)), labels=[pair.result.label for pair in others])
        axes.set(title=f"against {baseline.label}", ylim=(len(others) - 0.5, -0.5))
        percent(axes.xaxis)
    if known:
        labels = {STEPS: "at equal steps", **{name: f"at equal {COSTS[name]}" for name in known}}
        handles = [Line2D([], [], color=GREY, marker=_MARKERS[n], linestyle="none") for n in labels]
        fig.legend(handles, labels.values(), loc="outside upper left", ncols=3)
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
