"""One look for all pictures: matplotlib without a screen, few colours that mean the same everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

KEPT, CUT, SCALE, GREY = "#2563eb", "#dc2626", "#0f766e", "#6b7280"
WOULD, APPLIED = "#7c3aed", "#0891b2"  # what the rule says of a probe; settings applied afterwards
STOPS = {"eos": "#16a34a", "max_tokens": "#d97706", "trapped": CUT, "failed": GREY}
PHASE_COLOURS = {"no trap": GREY, "before": KEPT, "agreement": CUT, "after": "#d97706"}
_STYLE = {
    "figure.dpi": 120,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.use": True,
}
matplotlib.rcParams.update(_STYLE)


def figure(rows: int, columns: int, width: float = 10, height: float = 3.2) -> tuple[Any, Any]:
    """A figure with rows x columns of axes; `height` inches for each row."""
    fig, axes = pyplot.subplots(rows, columns, figsize=(width, height * rows), squeeze=False)
    return fig, axes


def smooth(values: list[float], width: int) -> list[float]:
    """Trailing mean over `width` values, for a line through noisy ones."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def percent(axis: Any) -> None:
    """Label an axis of shares in per cent; a tick at 2.5 % is not called 2 %."""
    axis.set_major_formatter(lambda value, _: f"{100 * value:.6g}%")


def stacked(axes: Any, steps: Sequence[int], shares: Mapping[str, list[float]], colours: Mapping[str, str]) -> None:
    """Shares that sum to 1 over the steps, one above the other, each in the colour of its name."""
    width = max(1, len(steps) // 25)
    if steps:
        smoothed = [smooth(values, width) for values in shares.values()]
        axes.stackplot(steps, *smoothed, labels=list(shares), colors=[colours[name] for name in shares], alpha=0.8)
        axes.set_xlim(min(steps), max(*steps, min(steps) + 1))
    axes.set(ylim=(0, 1))
    percent(axes.yaxis)


def thousands(axis: Any) -> None:
    """Label an axis with 100k and 2M where its numbers are large."""

    def label(value: float, _: object) -> str:
        for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:g}{letter}"
        return f"{value:g}"

    axis.set_major_formatter(label)


def plain(axis: Any) -> None:
    """Label a logarithmic axis with numbers as people write them, at 1, 2 and 5 of each decade."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")


def save(fig: Any, path: Any) -> None:
    """Write a PNG and free the figure."""
    fig.savefig(path, metadata={"Software": None})
    pyplot.close(fig)
