"""Held-out sets beside the first (`evaluation.sets`, greedy answers), from evaluations.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kat_ray.analysis.intervals import accuracy_interval
from kat_ray.report.curves import legend
from kat_ray.report.page import Section, png_of
from kat_ray.report.run_records import RunRecords
from kat_ray.report.style import APPLIED, CUT, KEPT, SCALE, STOPS, WOULD, figure, percent

_COLOURS = (KEPT, SCALE, WOULD, STOPS["max_tokens"], APPLIED, CUT, STOPS["eos"])
_STYLES = ("o-", "s--", "^:")  # where there are more sets than colours
_FIRST = "first set"

Points = Sequence[tuple[int, Mapping[str, Any]]]


def held_out_sections(records: RunRecords) -> list[Section]:
    """Curves and a table of all held-out sets; none of a run that has one alone."""
    found = by_set(records)
    if len(found) < 2:
        return []
    text = (
        "avg@k of each set over the steps; greedy answers are one to a problem. The table has the first and the "
        "newest evaluation, with intervals of 95 % over problems. Where k is another, pass@k is another figure."
    )
    return [Section("held-out", "Held-out sets", text, png=png_of(_curves(found)), table=[*_table(found)])]


def by_set(records: RunRecords) -> dict[str, Points]:
    """Steps and results of each set by its name, the one that the run is judged by first."""
    found: dict[str, list[tuple[int, Mapping[str, Any]]]] = {_FIRST: []}
    for line in records.evaluations:
        if "step" not in line:  # of an evaluation that no step stands beside
            continue
        found[_FIRST].append((line["step"], line))
        for name, result in (line.get("sets") or {}).items():
            found.setdefault(name, []).append((line["step"], result))
    return {name: points for name, points in found.items() if points}


def _curves(found: Mapping[str, Points]) -> Any:
    fig, ((axes,),) = figure(1, 1, height=3.6)
    for number, (name, points) in enumerate(found.items()):
        style = _STYLES[number // len(_COLOURS) % len(_STYLES)]
        steps, values = [step for step, _ in points], [result["avg_at_k"] for _, result in points]
        axes.plot(steps, values, style, color=_COLOURS[number % len(_COLOURS)], label=name)
    axes.set(title="Held-out accuracy, avg@k", xlabel="step", ylim=(0, 1))
    percent(axes.yaxis)
    legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4)  # not over the lines
    return fig


def _table(found: Mapping[str, Points]) -> Iterator[tuple[str, ...]]:
    yield "set", "problems", "step", "k", "avg@k", "95 %", "pass@k", "mean length", "cut off at the limit"
    for name, points in found.items():
        for step, result in dict([points[0], points[-1]]).items():
            low, high = accuracy_interval(result["right"], result["k"]) if result.get("right") else (None, None)
            spread = "" if low is None or high is None else f"{low:.1%} to {high:.1%}"
            yield (
                name, _number(result, "problems", "{:,}"), f"{step:,}", str(result["k"]),
                f"{result['avg_at_k']:.1%}", spread, f"{result['pass_at_k']:.1%}",
                _number(result, "mean_length", "{:.0f}"), _number(result, "truncated_share", "{:.1%}"),
            )  # fmt: skip


def _number(result: Mapping[str, Any], name: str, form: str) -> str:
    return form.format(result[name]) if name in result else ""
