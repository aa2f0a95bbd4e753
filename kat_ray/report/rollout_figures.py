"""Pictures of a run's rollouts, from their traces: where KL lies, where it goes low, what the stages hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from kat_ray.analysis.replay import Traces
from kat_ray.report.phases import NO_TRAP, PHASES, Lens, Phases, phase_means
from kat_ray.report.run_records import RunRecords
from kat_ray.report.style import APPLIED, CUT, KEPT, PHASE_COLOURS, SCALE, WOULD, figure, percent, plain
from kat_ray.termination import RULES, Effect
from kat_ray.types.records import FloatArray, IntArray

_FLOOR = 1e-4  # nats: below it KL is drawn as one colour
_DRAWN = 100  # rollouts in a heat map; what is counted is never sampled


def parts_of(steps: IntArray, count: int) -> list[IntArray]:
    """The first, ..., last of `count` equal parts of a run's steps, as masks over rollouts."""
    if not len(steps):
        return [np.zeros(0, dtype=bool)] * count
    edges = np.linspace(steps.min(), steps.max() + 1, count + 1)
    return [(steps >= low) & (steps < high) for low, high in pairwise(edges)]


def ends_of(steps: IntArray) -> list[tuple[str, IntArray]]:
    """The first and the last quarter of a run, or its first and last step if there are no four: names and masks."""
    found = np.unique(steps)
    if not len(found):
        return []
    if len(found) == 1:
        return [("The run's only step", steps == found[0])]
    if len(found) < 4:
        return [("First step", steps == found[0]), ("Last step", steps == found[-1])]
    first, *_, last = parts_of(steps, 4)
    return [("First quarter of the run", first), ("Last quarter", last)]


def heat_map(records: RunRecords, lens: Lens) -> Any:
    """KL of every token of some rollouts, early and late; cuts are marked."""
    traces = records.traces
    marks = _marks(records, lens)
    drawn = [(title, _in_order(traces, np.flatnonzero(mask), marks)) for title, mask in ends_of(traces.step)]
    fig, (panels,) = figure(1, max(1, len(drawn)), height=5.6)
    scale = Normalize(np.log10(_FLOOR), 1)
    lengths = traces.lengths[np.concatenate([rows for _, rows in drawn] or [np.zeros(0, np.int64)])]
    right = max(1, int(np.percentile(lengths, 95))) if len(lengths) else 1
    for axes, (title, rows) in zip(panels, drawn, strict=False):
        axes.set(title=title, xlabel="token", facecolor="#9ca3af")
        axes.grid(visible=False)
        if len(rows):
            _heat(axes, traces, rows, scale, marks)
            axes.set_xlim(-0.5, right - 0.5)
            count = sum(dict(ends_of(traces.step))[title])
            axes.set_ylabel(f"{len(rows)} of {count:,} rollouts")
    labels = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if labels:
        fig.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3, fontsize=9)
    bar = fig.colorbar(ScalarMappable(scale, "viridis"), ax=list(panels), shrink=0.8, label="reverse KL, nats")
    ticks = np.arange(np.log10(_FLOOR), 1.01)
    bar.set_ticks(ticks, labels=[f"{10.0**t:g}" for t in ticks])
    return fig


def _marks(records: RunRecords, lens: Lens) -> dict[str, tuple[str, IntArray]]:
    """By label its colour and, for every rollout, the marked token, -1 for none."""
    traces = records.traces
    would = np.where(traces.probe == 1, traces.would_cut, -1)
    marks = {"cut": (CUT, traces.cut), "probe: would be cut": (WOULD, would)}
    if not lens.own:
        marks["cut of the settings applied afterwards"] = (APPLIED, lens.cut)
    elif RULES[lens.rule.rule].effect is not Effect.CUTS:
        marks["KAT would cut"] = (APPLIED, np.where((traces.cut < 0) & (would < 0), lens.cut, -1))
    return marks


def _in_order(traces: Traces, rows: IntArray, marks: Mapping[str, tuple[str, IntArray]]) -> IntArray:
    """A sample of the rollouts: those with a mark by its place, then the others by length."""
    chosen = rows[np.linspace(0, len(rows) - 1, min(_DRAWN, len(rows))).astype(int)]
    first = np.full(len(chosen), -1)
    for _, cuts in marks.values():
        first = np.where(first < 0, cuts[chosen], first)
    return chosen[np.lexsort((np.where(first < 0, traces.lengths[chosen], first), first < 0))]


def _heat(
    axes: Any, traces: Traces, rows: IntArray, scale: Normalize, marks: Mapping[str, tuple[str, IntArray]]
) -> None:
    image = np.ma.masked_invalid(np.log10(np.maximum(padded(traces, rows), _FLOOR)))
    axes.imshow(image, aspect="auto", cmap="viridis", norm=scale, interpolation="nearest", origin="lower")
    for label, (colour, cuts) in marks.items():
        at = np.flatnonzero(cuts[rows] >= 0)
        if len(at):
            axes.scatter(
                cuts[rows][at], at, marker="o", s=32, color=colour, edgecolors="white", linewidths=0.7, label=label
            )


def padded(traces: Traces, rows: IntArray) -> FloatArray:
    """KL of rollouts as rows of one array, NaN past their ends."""
    image = np.full((len(rows), int(traces.lengths[rows].max(initial=1))), np.nan)
    for i, row in enumerate(rows):
        values = traces.d[traces.offsets[row] : traces.offsets[row + 1]]
        image[i, : len(values)] = values
    return image


def onset(phases: Phases) -> Any:
    """Where the first stretch of agreement begins, in the thirds of the run."""
    fig, ((tokens, share),) = figure(1, 2)
    starts, lengths = phases.replayed.cut, phases.traces.lengths
    names = ("first third", "second third", "last third")
    for mask, name, colour in zip(parts_of(phases.traces.step, 3), names, (CUT, SCALE, KEPT), strict=True):
        active = mask & phases.active
        hit = active & phases.trapped
        if not hit.any():
            continue
        label = f"{name}: {hit.sum() / active.sum():.0%} of {active.sum():,}"
        for axes, values in ((tokens, starts[hit]), (share, starts[hit] / lengths[hit])):
            ordered = np.sort(values)
            axes.plot(
                ordered,
                (np.arange(len(ordered)) + 1) / active.sum(),
                drawstyle="steps-post",
                color=colour,
                label=label,
            )
    tokens.set(title="Onset of the first low stretch", xlabel="token", ylabel="share of rollouts that reached it")
    share.set(title="Relative to the rollout's length", xlabel="share of the rollout")
    for axes in (tokens, share):
        axes.set_ylim(0, 1)
        percent(axes.yaxis)
    percent(share.xaxis)
    if tokens.lines:
        tokens.legend(title="rollouts with a low stretch")
    return fig


def stages(phases: Phases) -> Any:
    """Distribution over rollouts of the mean KL before, during and after agreement."""
    fig, ((axes,),) = figure(1, 1)
    means = phase_means(phases)
    names = [name for name in (NO_TRAP, *PHASES) if len(means[name])]
    if names:
        values = [np.maximum(means[name], _FLOOR) for name in names]
        boxes = axes.boxplot(
            values, orientation="horizontal", patch_artist=True, widths=0.55, showfliers=False,
            tick_labels=[f"{name}\n({len(means[name]):,})" for name in names],
        )  # fmt: skip
        for box, median, name in zip(boxes["boxes"], boxes["medians"], names, strict=True):
            box.set(facecolor=PHASE_COLOURS[name], alpha=0.6)
            median.set(color="black")
        axes.set_xscale("log")
        axes.invert_yaxis()
    axes.set(
        title="Mean KL of a rollout's stages (number of rollouts)", xlabel="nats; box: quartiles, whiskers: 1.5 x"
    )
    return fig


def teacher_top(found: Mapping[str, Sequence[tuple[int, float]]], text: Callable[[int], str]) -> Any:
    """The teacher's most frequent top tokens in each stage."""
    fig, (row,) = figure(1, max(1, len(found)), height=3.6)
    for axes, (name, tokens) in zip(row, found.items(), strict=False):
        labels = [text(i).replace("\n", "⏎").replace(" ", "␣") for i, _ in tokens]
        axes.barh(range(len(tokens)), [share for _, share in tokens], color=PHASE_COLOURS[name], alpha=0.75)
        axes.set_yticks(range(len(tokens)), labels=[repr(label)[1:-1] for label in labels])
        axes.invert_yaxis()
        axes.set(title=name, xlabel="share of the stage's tokens")
        percent(axes.xaxis)
    return fig


def position(records: RunRecords, bins: int = 24) -> Any:
    """Mean KL by position in the rollout, in the thirds of the run."""
    fig, ((axes,),) = figure(1, 1)
    traces = records.traces
    longest = int(traces.lengths.max(initial=1))
    edges = np.unique(np.linspace(0, longest, bins + 1).astype(int))
    offset = np.arange(len(traces.d)) - np.repeat(traces.offsets[:-1], traces.lengths)
    which = np.digitize(offset, edges) - 1
    middle = (edges[:-1] + edges[1:]) / 2
    masks = parts_of(np.repeat(traces.step, traces.lengths), 3)
    for mask, name, colour in zip(
        masks, ("first third", "second third", "last third"), (CUT, SCALE, KEPT), strict=True
    ):
        usable = mask & np.isfinite(traces.d)
        count = np.bincount(which[usable], minlength=len(middle))[: len(middle)]
        total = np.bincount(which[usable], weights=traces.d[usable], minlength=len(middle))[: len(middle)]
        shown = count > 0
        if not shown.any():
            continue
        axes.plot(middle[shown], total[shown] / count[shown], "o-", markersize=3, color=colour, label=name)
    if axes.lines:
        axes.set_yscale("log")
        plain(axes.yaxis)
        axes.legend(title="of the run's steps")
    axes.set(title="Mean KL by position", xlabel="token", ylabel="nats")
    return fig
