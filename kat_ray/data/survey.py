"""What a data set comes to, row by row: which rows are refused and why, and how long prompts are.

A run refuses a data set at its first bad row. Here all of them are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kat_ray.config import DataConfig, EnvironmentConfig
from kat_ray.data.chat import ChatTemplate
from kat_ray.data.mixture import open_all
from kat_ray.data.prompts import check_row
from kat_ray.errors import DataError

_BINS = 8
_BAR = 40  # characters of the longest


@dataclass(frozen=True)
class Refused:
    """Rows that cannot be used for one reason."""

    count: int
    first: str  # its place


def refusals(
    data: DataConfig, template: ChatTemplate | None, graded: bool, environment: EnvironmentConfig | None = None
) -> tuple[int, Mapping[str, Refused]]:
    """Rows that were read, and by reason those that are refused."""
    found: dict[str, Refused] = {}
    rows = 0
    _, source = open_all(data, environment)
    for row in source:
        rows += 1
        try:
            check_row(row, data, template, graded)
        except DataError as error:
            reason = str(error).removeprefix(row.where).removeprefix(": ")
            before = found.get(reason, Refused(0, row.where))
            found[reason] = Refused(before.count + 1, before.first)
    return rows, found


def distribution(lengths: Sequence[int]) -> list[str]:
    """Lines that show how long prompts are, in tokens: quantiles and a histogram."""
    values = np.asarray(lengths)
    shown = {"shortest": 0, "median": 50, "90 %": 90, "99 %": 99, "longest": 100}
    lines = [", ".join(f"{name} {np.percentile(values, q, method='nearest'):,.0f}" for name, q in shown.items())]
    low, high = int(values.min()), int(values.max())
    step = -(-(high - low + 1) // _BINS)
    edges = np.arange(low, high + step + 1, step)
    counts, _ = np.histogram(values, edges)
    width = len(f"{high:,}")
    for first, behind, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "█" * max(round(_BAR * count / counts.max()), int(count > 0))
        lines.append(f"{first:>{width},} to {behind - 1:>{width},}  {count:>8,}  {bar}".rstrip())
    return lines
