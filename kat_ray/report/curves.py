"""Pictures of a run over its steps, from metrics.jsonl."""

from __future__ import annotations

from typing import Any

from kat_ray.report.run_records import RunRecords
from kat_ray.report.style import CUT, GREY, KEPT, SCALE, STOPS, figure, percent, smooth


def _line(axes: Any, records: RunRecords, metric: str, label: str, colour: str) -> bool:
    steps, values = records.series(metric)
    if not values:
        return False
    width = max(1, len(values) // 25)
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(values, width), color=colour, label=label)
    return True


def _legend(axes: Any, **options: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**options)


def learning(records: RunRecords) -> Any:
    """KL, accuracy, tokens of a step, gradient norm."""
    fig, ((kl, accuracy), (tokens, gradient)) = figure(2, 2)
    _line(kl, records, "kl/mean", "all scored tokens", GREY)
    _line(kl, records, "learner/loss", "trained tokens", KEPT)
    kl.set(title="Reverse KL", ylabel="nats")
    _legend(kl)
    for metric, label, colour in (("eval/pass_at_k", "pass@k", SCALE), ("eval/avg_at_k", "avg@k", KEPT)):
        steps, values = records.series(metric)
        accuracy.plot(steps, values, "o-", color=colour, label=label)
    accuracy.set(title="Held-out accuracy", ylim=(0, 1))
    percent(accuracy.yaxis)
    _legend(accuracy)
    _line(tokens, records, "rollout/generated_tokens", "generated", GREY)
    _line(tokens, records, "rollout/kept_tokens", "kept", KEPT)
    tokens.set(title="Tokens of a step", xlabel="step")
    tokens.set_ylim(bottom=0)
    _legend(tokens)
    _line(gradient, records, "learner/grad_norm", "gradient norm", KEPT)
    gradient.set(title="Gradient norm before clipping", xlabel="step")
    gradient.set_ylim(bottom=0)
    return fig


def stops(records: RunRecords) -> Any:
    """Shares of rollouts by how they ended, over the steps."""
    fig, ((axes,),) = figure(1, 1)
    steps, _ = records.series("rollout/eos_share")
    width = max(1, len(steps) // 25)
    shares, labels = [], []
    for reason in ("eos", "max_tokens", "trapped"):
        shares.append(smooth(records.series(f"rollout/{reason}_share")[1], width))
        labels.append(reason)
    if steps:
        axes.stackplot(steps, *shares, labels=labels, colors=[STOPS[label] for label in labels], alpha=0.8)
        axes.set_xlim(min(steps), max(*steps, min(steps) + 1))
    axes.set(title="How rollouts ended", xlabel="step", ylim=(0, 1))
    percent(axes.yaxis)
    _legend(axes, loc="lower left", ncols=3, facecolor="white", frameon=True)
    return fig


def threshold(records: RunRecords) -> Any:
    """The rule's threshold beside the scale of KL that it follows."""
    fig, ((axes,),) = figure(1, 1)
    drawn = _line(axes, records, "kl/mean", "mean KL of all scored tokens", GREY)
    drawn |= _line(axes, records, "kat/window_min_mean", "mean smallest window m(y)", SCALE)
    steps, values = records.series("kat/threshold")
    if values:
        axes.step(steps, values, where="mid", color=CUT, label="threshold")
    if drawn or values:
        axes.set_yscale("log")
        axes.legend()
    axes.set(title="Threshold against the KL scale", xlabel="step", ylabel="nats")
    return fig


def probes(records: RunRecords) -> Any:
    """What the rule would have done to the rollouts that it may not cut."""
    fig, ((shares, tokens),) = figure(1, 2)
    _line(shares, records, "probe/right_share", "answered right", STOPS["eos"])
    _line(shares, records, "probe/would_cut_share", "would have been cut", CUT)
    _line(shares, records, "probe/false_cut_share", "would have been cut, and answered right", "#7c3aed")
    shares.set(title="Probes", xlabel="step", ylim=(0, 1))
    percent(shares.yaxis)
    _legend(shares)
    _line(tokens, records, "probe/tokens_after_cut", "tokens", KEPT)
    tokens.set(title="Tokens that a cut would have saved, mean", xlabel="step")
    tokens.set_ylim(bottom=0)
    return fig


def health(records: RunRecords) -> Any:
    """The diagnostics of arXiv 2604.13016 over the steps; kept tokens."""
    fig, ((overlap, gap), (teacher, tail)) = figure(2, 2)
    _line(overlap, records, "health/overlap", "", KEPT)
    overlap.set(title="Overlap of the two top-16 sets", ylim=(0, 1))
    percent(overlap.yaxis)
    _line(gap, records, "health/teacher_entropy", "teacher", SCALE)
    _line(gap, records, "health/student_entropy", "student", KEPT)
    gap.set(title="Entropy", ylabel="nats")
    gap.set_ylim(bottom=0)
    _legend(gap)
    _line(teacher, records, "health/teacher_max", "", SCALE)
    teacher.set(title="The teacher's largest probability", xlabel="step", ylim=(0, 1))
    _line(tail, records, "health/tail_mass", "", KEPT)
    tail.set(title="The student's mass outside its top k", xlabel="step")
    tail.set_ylim(bottom=0)
    return fig
