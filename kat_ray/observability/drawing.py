"""What a run's figures look like in a terminal: a bar, and each figure with its course."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.text import Text

LABEL = 12  # columns of a figure's name, without what is longer
_VALUE = 9
_RANGE = 22
COURSE = (8, 60)  # columns of a course: fewest, most
_BLOCKS, _PLAIN = "▁▂▃▄▅▆▇█", "_.-~=+*#"


@dataclass(frozen=True)
class Figure:
    """A row: its name, its values, and how one is written."""

    name: str
    values: Sequence[float]
    write: Callable[[float], str]


def progress_bar(done: int, steps: int, width: int, unicode: bool = True) -> Text:
    """`done` of `steps` as a line, as wide as a row without the ends of its course."""
    room = min(width, LABEL + _VALUE + COURSE[1])
    full, empty = ("━", "─") if unicode else ("#", "-")
    filled = room * min(done, steps) // steps
    return Text(full * filled, style="green").append(empty * (room - filled), style="dim")


def row(figure: Figure, width: int, unicode: bool = True) -> Text:
    """Name, last value and course of a figure that has values; where there is room, also its ends in figures."""
    last = figure.values[-1]
    text = Text(f"{figure.name:<{LABEL}.{LABEL}} {figure.write(last):>{_VALUE}}")
    left = width - LABEL - _VALUE - 3
    ends = f"{figure.write(figure.values[0])} {'→' if unicode else '->'} {figure.write(last)}"
    with_ends = left - _RANGE >= COURSE[0]
    columns = min(left - _RANGE if with_ends else left, COURSE[1])
    if columns >= COURSE[0]:
        drawn = course(figure.values, columns, unicode)
        text.append("  ").append(drawn.ljust(columns) if with_ends else drawn, style="cyan")
        if with_ends:
            text.append(f"  {ends}", style="dim")
    return text


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


def cut_to(lines: Iterable[Text], width: int, unicode: bool = True) -> Text:
    """The lines as one text, each of at most `width` columns."""
    cut = list(lines)
    for line in cut:
        line.truncate(width, overflow="ellipsis" if unicode else "crop")
    return Text("\n").join(cut)
