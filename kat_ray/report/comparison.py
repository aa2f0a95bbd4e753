"""A comparison of rules as one page: the table, accuracy against cost, differences with their intervals, curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kat_ray.compare import BASELINES, Result, paired_difference, table
from kat_ray.report.page import Section, png_of, render, write_page
from kat_ray.report.style import figure, percent, smooth

_COST = (
    "TFLOP: 2 per parameter and token forward, 6 with the backward pass. Student: prompts and generated tokens; "
    "teacher: prompts and scored tokens; learner: prompts and trained tokens. Attention over the past, padding and "
    "evaluation are left out. Seconds are those of the machine as it was; compare them only where it was idle."
)


def write_comparison(results: Sequence[Result], notes: Sequence[str], out: Path) -> list[Path]:
    """Write compare.html and its pictures into `out`; returns the files."""
    heading, rows = table(results)
    k = _k_of(results[0])
    sections = [
        Section(
            "table", "Every rule", f"Mean over seeds ± standard deviation; k = {k}. {_COST}",
            table=list(map(list, zip(heading, *rows, strict=True))),
        ),
        Section(
            "accuracy", "Accuracy against tokens",
            "Up is better, left is cheaper. Small dots are single seeds, bars are standard deviations.",
            png=png_of(_accuracy(results)),
        ),
    ]  # fmt: skip
    if differing := _differences(results):
        text = (
            "In avg@k, paired by seed and problem, with 95 % bootstrap intervals over both. An interval that "
            "holds 0 does not tell the two apart."
        )
        sections.append(Section("differences", "Differences", text, png=png_of(differing)))
    text = "Mean over seeds of each step, smoothed. Left: reverse KL of the trained tokens; right: tokens kept."
    sections.append(Section("curves", "Over the steps", text, png=png_of(_curves(results))))
    values = {
        "title": f"kat-ray: {len(results)} rules, {max(len(r.seeds) for r in results)} seeds",
        "notes": notes,
        "sections": sections,
    }
    return write_page(render("compare.html.j2", values), sections, out / "compare.html")


def _k_of(result: Result) -> int:
    return int(json.loads((result.folders[0] / "summary.json").read_text())["eval_after"]["k"])


def _accuracy(results: Sequence[Result]) -> Any:
    fig, (axes,) = figure(1, 2, height=4)
    for panel, name, label in zip(axes, ("generated_tokens", "tflop"), ("tokens generated", "TFLOP"), strict=True):
        for number, result in enumerate(results):
            x, y = result.measures[name], result.measures["avg_at_k"]
            spread = {"xerr": x.std(ddof=1), "yerr": y.std(ddof=1)} if len(x) > 1 else {}
            colour = f"C{number % 10}"
            panel.scatter(x, y, s=12, color=colour, alpha=0.45)
            panel.errorbar(x.mean(), y.mean(), fmt="o", color=colour, label=result.label, capsize=2, **spread)
        panel.set(xlabel=label, ylabel="avg@k after training")
        panel.set_xlim(left=0)
        percent(panel.yaxis)
    axes[1].legend(loc="lower left")
    return fig


def _differences(results: Sequence[Result]) -> Any:
    panels = [
        (baseline, others)
        for baseline in results
        if baseline.label in BASELINES and (others := [r for r in results if r.pairs_with(baseline)])
    ]
    if not panels:
        return None
    fig, (row,) = figure(1, len(panels), height=0.8 + 0.35 * len(results))
    for axes, (baseline, others) in zip(row, panels, strict=True):
        for i, other in enumerate(others):
            mean, low, high = paired_difference(other, baseline)
            axes.errorbar(
                mean,
                i,
                xerr=[[mean - low], [high - mean]],
                fmt="o",
                color=f"C{results.index(other) % 10}",
                capsize=3,
            )
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(others)), labels=[o.label for o in others])
        axes.set(title=f"against {baseline.label}", ylim=(len(others) - 0.5, -0.5))
        percent(axes.xaxis)
    return fig


def _curves(results: Sequence[Result]) -> Any:
    fig, ((kl, kept),) = figure(1, 2)
    for number, result in enumerate(results):
        for axes, metric in ((kl, "learner/loss"), (kept, "rollout/kept_tokens")):
            values = _mean_series(result.folders, metric)
            if values:
                axes.plot(
                    range(1, len(values) + 1),
                    smooth(values, max(1, len(values) // 15)),
                    color=f"C{number % 10}",
                    label=result.label,
                )
    kl.set(title="Reverse KL of the trained tokens", xlabel="step", ylabel="nats", yscale="log")
    kept.set(title="Tokens kept in a step", xlabel="step")
    kept.set_ylim(bottom=0)
    if kept.lines:
        kept.legend()
    return fig


def _mean_series(folders: Sequence[Path], metric: str) -> list[float]:
    runs = []
    for folder in folders:
        path = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        runs.append([line[metric] for line in lines if line.get(metric) is not None])
    shortest = min(map(len, runs), default=0)
    means: list[float] = np.mean([run[:shortest] for run in runs], axis=0).tolist() if shortest else []
    return means
