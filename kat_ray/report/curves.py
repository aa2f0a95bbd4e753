"""Pictures of a run over its steps, from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kat_ray.report.phases import Lens, Phases
from kat_ray.report.run_records import RunRecords
from kat_ray.report.style import (
    APPLIED,
    CUT,
    GREY,
    KEPT,
    SCALE,
    STOPS,
    WOULD,
    figure,
    percent,
    plain,
    smooth,
    stacked,
)
from kat_ray.types.records import FloatArray, IntArray


def line(axes: Any, records: RunRecords, metric: str, label: str, colour: str, parts: int = 25) -> bool:
    """A metric as `draw` draws it; whether the run has it."""
    return draw(axes, *records.series(metric), label, colour, parts)


def draw(
    axes: Any, steps: Sequence[float], values: list[float], label: str | None, colour: str, parts: int = 25
) -> bool:
    """Single steps faint, their trailing mean over one of `parts` of the run strong."""
    if not values:
        return False
    width = max(1, len(values) // parts)
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(values, width), color=colour, label=label)
    return True


def legend(axes: Any, **options: Any) -> None:
    """A legend, where anything has a label."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**options)


def learning(records: RunRecords) -> Any:
    """KL, accuracy, tokens of a step, gradient norm."""
    fig, ((kl, accuracy), (tokens, gradient)) = figure(2, 2)
    if line(kl, records, "kl/mean", "all scored tokens", GREY):  # else that loss is no KL
        line(kl, records, "learner/loss", "trained tokens", KEPT)
    kl.set(title="Reverse KL", ylabel="nats")
    legend(kl)
    accuracy.plot(*_pass_at_k(records), "o-", color=SCALE, label="pass@k")
    accuracy.plot(*records.series("eval/avg_at_k"), "o-", color=KEPT, label="avg@k")
    accuracy.set(title="Held-out accuracy", ylim=(0, 1))
    percent(accuracy.yaxis)
    legend(accuracy)
    line(tokens, records, "rollout/generated_tokens", "generated", GREY)
    line(tokens, records, "rollout/kept_tokens", "kept", KEPT)
    tokens.set(title="Tokens per step", xlabel="step")
    tokens.set_ylim(bottom=0)
    legend(tokens)
    line(gradient, records, "learner/grad_norm", "gradient norm", KEPT)
    gradient.set(title="Gradient norm before clipping", xlabel="step")
    gradient.set_ylim(bottom=0)
    return fig


def _pass_at_k(records: RunRecords) -> tuple[list[int], list[float]]:
    """Steps and pass@k; those with fewer answers (`evaluation.every_k`) are lower for that alone, and left out."""
    k = max((line["k"] for line in records.evaluations), default=0)
    fewer = {line.get("step") for line in records.evaluations if line["k"] < k}
    steps, values = records.series("eval/pass_at_k")
    kept = [i for i, step in enumerate(steps) if step not in fewer]
    return [steps[i] for i in kept], [values[i] for i in kept]


def stops(records: RunRecords) -> Any:
    """Shares of rollouts by how they ended, over the steps."""
    fig, ((axes,),) = figure(1, 1)
    stacked(axes, *stop_shares(records), STOPS)
    axes.set(title="How rollouts ended", xlabel="step")
    legend(axes, loc="lower left", ncols=4, facecolor="white", frameon=True)
    return fig


def stop_shares(records: RunRecords) -> tuple[list[int], dict[str, list[float]]]:
    """Steps, and by stop reason its share in each; `failed` only if any did."""
    lines = [line for line in records.steps if line.get("rollout/eos_share") is not None]
    shares = {
        reason: [line.get(f"rollout/{reason}_share") or 0.0 for line in lines]
        for reason in ("eos", "max_tokens", "trapped")
    }
    if any(line.get("rollout/failed") for line in lines):  # recorded as a count: its share is what is left
        shares["failed"] = [max(0.0, 1 - sum(parts)) for parts in zip(*shares.values(), strict=True)]
    return [line["step"] for line in lines], shares


def threshold(records: RunRecords, phases: Phases | None, lens: Lens) -> Any:
    """The threshold beside the scale of KL that it follows."""
    fig, ((axes,),) = figure(1, 1)
    drawn = line(axes, records, "kl/mean", "mean KL of all scored tokens", GREY)
    if phases is not None:
        drawn |= _by_step(axes, phases.traces.step, phases.replayed.minimum, "mean m(y), seen to the end", SCALE)
    for number, (label, steps, values) in enumerate(_thresholds(records, lens)):
        if values:
            style = _STYLES[number % len(_STYLES)]
            colour = CUT if lens.own else APPLIED
            axes.step(steps, values, where="mid", color=colour, linestyle=style, label=label)
            drawn = True
    if drawn:
        axes.set_yscale("log")
        plain(axes.yaxis)
        axes.legend()
    axes.set(title="Threshold against the KL scale", xlabel="step", ylabel="nats")
    return fig


_STYLES = ("solid", "dashed", "dotted", "dashdot")  # of the teachers' thresholds


def _thresholds(records: RunRecords, lens: Lens) -> Iterator[tuple[str, list[int], list[float]]]:
    """What a line is of, its steps and values: one for the run, or for each teacher that has a name."""
    label = "threshold" if lens.own else "threshold, applied afterwards"
    parts = records.traces.by_teacher()
    for name, rows in parts:
        of = f"{label}: {name}" if name else label
        if not lens.own:
            yield of, *step_means(records.traces.step[rows], lens.thresholds[rows])
        else:
            yield of, *records.series(f"teacher/threshold/{name}" if name else "kat/threshold")


def step_means(steps: IntArray, values: FloatArray) -> tuple[list[int], list[float]]:
    """Steps, counted as in metrics.jsonl (from 1), and the mean over their rollouts' values; NaN is none."""
    known = ~np.isnan(values)
    found, which = np.unique(steps[known], return_inverse=True)
    means = np.bincount(which, weights=values[known], minlength=len(found)) / np.maximum(1, np.bincount(which))
    return (found + 1).tolist(), means.tolist()


def _by_step(axes: Any, steps: IntArray, values: FloatArray, label: str, colour: str) -> bool:
    return draw(axes, *step_means(steps, values), label, colour, parts=10)


def probes(records: RunRecords) -> Any:
    """What the rule would have done to the rollouts that it may not cut."""
    fig, ((shares, tokens),) = figure(1, 2, height=3.6)
    line(shares, records, "probe/right_share", "answered right", STOPS["eos"], parts=10)
    line(shares, records, "probe/would_cut_share", "would have been cut", CUT, parts=10)
    line(shares, records, "probe/false_cut_share", "both: a false cut", WOULD, parts=10)
    shares.set(title="Probes", ylim=(0, 1))
    percent(shares.yaxis)
    legend(shares, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)  # not over the lines
    line(tokens, records, "probe/tokens_after_cut", "tokens", KEPT, parts=10)
    tokens.set(title="Mean tokens that a cut would have saved", xlabel="step")
    tokens.set_ylim(bottom=0)
    return fig


def health(records: RunRecords) -> Any:
    """The diagnostics of arXiv 2604.13016 over the steps; kept tokens."""
    fig, ((overlap, gap), (teacher, tail)) = figure(2, 2)
    line(overlap, records, "health/overlap", "", KEPT)
    overlap.set(title="Overlap of the two top-16 sets", ylim=(0, 1))
    percent(overlap.yaxis)
    line(gap, records, "health/teacher_entropy", "teacher", SCALE)
    line(gap, records, "health/student_entropy", "student", KEPT)
    draw(gap, *entropy_gap(records), "gap: student - teacher", CUT)
    gap.axhline(0, color="black", linewidth=0.6)
    gap.set(title="Entropy, and the gap between the two", ylabel="nats")
    legend(gap)
    line(teacher, records, "health/teacher_max", "", SCALE)
    teacher.set(title="The teacher's largest probability", xlabel="step", ylim=(0, 1))
    line(tail, records, "health/tail_mass", "", KEPT)
    tail.set(title="The student's mass outside its top k", xlabel="step")
    tail.set_ylim(bottom=0)
    return fig


def entropy_gap(records: RunRecords) -> tuple[list[int], list[float]]:
    """The student's mean entropy minus the teacher's, nats, in the steps that have both."""
    names = ("health/student_entropy", "health/teacher_entropy")
    lines = [line for line in records.steps if all(line.get(name) is not None for name in names)]
    return [line["step"] for line in lines], [line[names[0]] - line[names[1]] for line in lines]
