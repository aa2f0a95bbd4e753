"""Several data sets as one: their rows one after another, and how often each prompt stands in an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeVar

from kat_ray.config import DataConfig, EnvironmentConfig
from kat_ray.data.rows import Row, open_rows, renamed
from kat_ray.errors import DataError

T = TypeVar("T")

MAIN = "data"  # the name of the data set beside those of `data.mix`
_MOST = 10_000_000  # prompts of an epoch


def weights_of(data: DataConfig) -> dict[str, float]:
    """The weights of the data sets by name; none where there is only one."""
    if not data.mix:
        return {}
    return {MAIN: data.weight} | {name: part.weight for name, part in data.mix.items()}


def open_all(data: DataConfig, environment: EnvironmentConfig | None = None) -> tuple[str, Iterator[Row]]:
    """The name of the source, or of the first of several, and all rows, their columns named as `data` reads them.

    Each data set is read as far as its own limit says.
    """
    source, rows = open_rows(data, environment)
    if not data.mix:
        return source, renamed(islice(rows, data.limit), data.rename)
    return source, _chained(data, rows)


def _chained(data: DataConfig, rows: Iterator[Row]) -> Iterator[Row]:
    yield from _of(MAIN, renamed(islice(rows, data.limit), data.rename), data.path)
    for name, part in data.mix.items():
        own = data.model_copy(
            update={f: getattr(part, f) for f in ("path", "name", "revision", "split", "streaming")}
        )
        _, found = open_rows(own)
        yield from _of(name, renamed(islice(found, part.limit), part.rename), part.path)


def _of(name: str, rows: Iterator[Row], path: str) -> Iterator[Row]:
    empty = True
    for row in rows:
        empty = False
        yield Row(row.where, row.number, row.columns, name)
    if empty:
        raise DataError(f"{path}: holds no prompts")


def epoch(items: Sequence[T], origins: Sequence[str], weights: Mapping[str, float]) -> tuple[T, ...]:
    """An epoch in which data sets stand in proportion to their weights.

    `origins` [N] names the data set of each of `items` [N]. The one with most items to its weight has each of them
    once; of the others each stands as often as it takes, some of them, at equal distances, once more. `DataError`
    for an epoch of more than 10 million prompts.
    """
    own: dict[str, list[T]] = {name: [] for name in weights}
    for item, origin in zip(items, origins, strict=True):
        own[origin].append(item)
    if lacking := next((name for name, found in own.items() if not found), None):
        raise DataError(f"data.mix: no prompt of {lacking!r} is left: all are too long, or are in another data set")
    scale = max(len(found) / weights[name] for name, found in own.items())
    if scale * sum(weights.values()) > _MOST:
        raise DataError(
            f"data.mix: an epoch would have {scale * sum(weights.values()):,.0f} prompts, for the data set of "
            f"{min(map(len, own.values())):,} to have its share; at most {_MOST:,}: bring the weights nearer "
            "to the sizes"
        )
    drawn: list[T] = []
    for name, found in own.items():
        whole, more = divmod(round(weights[name] * scale), len(found))
        drawn += found * whole + [found[i * len(found) // more] for i in range(more)]
    return tuple(drawn)
