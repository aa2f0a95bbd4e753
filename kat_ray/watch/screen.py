"""A run's view as lines of a terminal: progress, and each figure with its course."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

from kat_ray.watch.view import State, View

_LABEL = 12  # columns of a figure's name, without what is longer
_VALUE = 9
_RANGE = 22
_COURSE = (8, 60)  # columns of a course: fewest, most
_BLOCKS, _PLAIN = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_SILENT = 10.0  # steps' time without a line, after which a run is said to be silent; 30 s at least
_COLOURS = {State.GOING: "green", State.FINISHED: "bold green", State.STOPPED: "red"}


@dataclass(frozen=True)
class Figure:
    """A row: its name, its values, and how one is written."""

    name: str
    values: Sequence[float]
    write: Callable[[float], str]


def screen(view: View, width: int, now: float, unicode: bool = True) -> Text:
    """Lines of at most `width` columns."""
    lines: list[Text] = [_head(view, now), *_progress(view, width, now, unicode)]
    rows = list(_figures(view))
    if rows:
        lines += [Text(), *(_row(row, width, unicode) for row in rows)]
    lines += [Text(line) for line in _totals(view)]
    if view.notes:
        lines += [Text(), *(Text(_printable(note), style="dim") for note in view.notes)]
    for line in lines:
        line.truncate(width, overflow="ellipsis" if unicode else "crop")
    return Text("\n").join(lines)


def course(values: Sequence[float], width: int, unicode: bool = True) -> str:
    """Values as bars in `width` columns at most, each the mean of its share; a gap where none is finite."""
    marks = _BLOCKS if unicode else _PLAIN
    count = min(width, len(values))
    means = []
    for i in range(count):
        part = [v for v in values[i * len(values) // count : (i + 1) * len(values) // count] if math.isfinite(v)]
        means.append(sum(part) / len(part) if part else math.nan)
    known = [m for m in means if math.isfinite(m)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(marks) - 1) / (high - low) if high > low else 0.0
    return "".join(marks[round((m - low) * scale)] if math.isfinite(m) else " " for m in means)


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    whole = int(max(0.0, seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _printable(text: str) -> str:
    """What moves a terminal's cursor or colours stays out of it."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _head(view: View, now: float) -> Text:
    text = Text(_printable(view.name), style="bold").append("  ")
    text.append(view.state.value, style=_COLOURS.get(view.state, "yellow"))
    pace = view.seconds_a_step()
    if view.state is State.GOING and view.written is not None:
        silent = now - view.written
        if silent > max(30.0, _SILENT * (pace or 0.0)):
            text.append(f"  no step for {duration(silent)}", style="bold red")
    return text


def _progress(view: View, width: int, now: float, unicode: bool) -> Iterator[Text]:
    if view.steps is None or view.state is State.ABSENT:
        return
    done = min(view.done, view.steps)
    count = f"step {done}/{view.steps}  {done / view.steps:.0%}"
    pace = view.seconds_a_step()
    if view.state is State.GOING and pace is not None:
        since = 0.0 if view.written is None else now - view.written
        count += f"  {pace:.1f} s a step  ETA {duration(pace * (view.steps - done) - min(since, pace))}"
    room = min(width, _LABEL + _VALUE + _COURSE[1])
    full, empty = ("━", "─") if unicode else ("#", "-")
    filled = room * done // view.steps
    yield Text(count)
    yield Text(full * filled, style="green").append(empty * (room - filled), style="dim")


def _figures(view: View) -> Iterator[Figure]:
    four, share, whole = "{:.4f}".format, "{:.1%}".format, "{:,.0f}".format
    of_teachers = [
        Figure(f"threshold {name}", view.series(f"teacher/threshold/{name}"), four)
        for name in view.names("teacher/threshold/")
    ]
    for figure in (
        Figure("KL", view.series("kl/mean"), four),
        Figure("reward", view.series("reward/mean"), "{:.3f}".format),
        Figure("accuracy", view.series("eval/avg_at_k"), share),
        Figure("trapped", view.series("rollout/trapped_share"), share),
        *(of_teachers or [Figure("threshold", view.series("kat/threshold"), four)]),
        Figure("length", view.series("rollout/mean_length"), whole),
        Figure("tokens/s", view.series("throughput/tokens_per_second"), whole),
    ):
        if figure.values:
            yield figure


def _row(figure: Figure, width: int, unicode: bool) -> Text:
    last = figure.values[-1]
    text = Text(f"{figure.name:<{_LABEL}.{_LABEL}} {figure.write(last):>{_VALUE}}")
    left = width - _LABEL - _VALUE - 3
    ends = f"{figure.write(figure.values[0])} {'→' if unicode else '->'} {figure.write(last)}"
    with_ends = left - _RANGE >= _COURSE[0]
    columns = min(left - _RANGE if with_ends else left, _COURSE[1])
    if columns >= _COURSE[0]:
        drawn = course(figure.values, columns, unicode)
        text.append("  ").append(drawn.ljust(columns) if with_ends else drawn, style="cyan")
        if with_ends:
            text.append(f"  {ends}", style="dim")
    return text


def _totals(view: View) -> Iterator[str]:
    generated, kept = sum(view.series("rollout/generated_tokens")), sum(view.series("rollout/kept_tokens"))
    if generated:
        text = f"{'tokens':<{_LABEL}} {generated:,.0f} generated"
        yield text + (f", {kept / generated:.1%} kept" if kept else "")
    fired = view.series("guards/fired")
    trouble = {
        "skipped": sum(view.series("learner/skipped")),
        "actors restarted": sum(view.series("pool/restarts")),
        "rollouts failed": sum(view.series("rollout/failed")),
    }
    words = [f"{count:,.0f} {what}" for what, count in trouble.items() if count]
    if fired:
        now, most = f"{fired[-1]:.0f} fired" if fired[-1] else "quiet", sum(1 for f in fired if f)
        yield f"{'guards':<{_LABEL}} {now}" + (f" ({most} steps with one)" if most else "")
    if words:
        yield f"{'trouble':<{_LABEL}} {', '.join(words)}"
