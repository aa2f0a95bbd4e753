"""What a run's rollouts came to, by what their prompts are from: families of an environment, sources of data."""

from __future__ import annotations

from typing import Any

from kat_ray.report.curves import legend, line
from kat_ray.report.page import Section, png_of
from kat_ray.report.run_records import RunRecords
from kat_ray.report.style import figure, percent

_COUNT = "source/rollouts/"
_PANELS = {
    "source/pass_rate/": ("Right answers", "share"),
    "source/reward/": ("Reward", "mean"),
    "source/mean_length/": ("Mean length of a rollout", "tokens"),
}
_MOST = 8  # lines that can be told apart
_COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")


def source_sections(records: RunRecords) -> list[Section]:
    """The picture with its words; none of a run whose prompts say nothing of it."""
    names = sources(records)
    if not names:
        return []
    text = "Of the rollouts of training, by what their prompts are from. A step may have few of one source."
    if len(names) > _MOST:
        text += f" Drawn are the {_MOST} of {len(names)} with the most rollouts."
    return [Section("sources", "Sources", text, png=png_of(by_source(records)))]


def sources(records: RunRecords) -> list[str]:
    """Their names, those with the most rollouts first."""
    counts: dict[str, float] = {}
    for step in records.steps:
        for name, value in step.items():
            if name.startswith(_COUNT) and value is not None:
                counts[name.removeprefix(_COUNT)] = counts.get(name.removeprefix(_COUNT), 0.0) + value
    return sorted(counts, key=lambda name: (-counts[name], name))


def by_source(records: RunRecords) -> Any:
    """A panel for each figure that the run has, a line for each source."""
    names = sources(records)[:_MOST]
    there = {begin: shown for begin, shown in _PANELS.items() if any(records.series(begin + n)[1] for n in names)}
    fig, (panels,) = figure(1, len(there))
    for axes, (begin, (title, unit)) in zip(panels, there.items(), strict=True):
        for name, colour in zip(names, _COLOURS, strict=False):
            line(axes, records, begin + name, name, colour)
        axes.set(title=title, xlabel="step", ylabel=unit)
        if unit == "share":
            axes.set_ylim(0, 1)
            percent(axes.yaxis)
        legend(axes)
    return fig
