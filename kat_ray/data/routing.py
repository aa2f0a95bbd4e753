"""Which teacher scores the rollouts of a prompt, and what it is told in place of the prompt."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from kat_ray.config import DataConfig
from kat_ray.config.teachers import section_of
from kat_ray.data.chat import ChatTemplate, encode
from kat_ray.data.context import Context
from kat_ray.data.rows import Row, kind
from kat_ray.errors import DataError
from kat_ray.types.records import DEFAULT_TEACHER


class Route(NamedTuple):
    """The name of a teacher, and the text that it is given; None: the prompt."""

    teacher: str
    told: str | None


class Routing:
    """The teachers of a split by name, with the templates of what they are told; without any, nobody is asked."""

    def __init__(
        self,
        data: DataConfig,
        teachers: Mapping[str, str | None],
        template: ChatTemplate | None,
        theirs: Mapping[str, ChatTemplate] | None = None,
    ) -> None:
        """`template` renders what a teacher is told, as it does prompts, but for those that have `theirs`."""
        self._data, self._template, self._theirs = data, template, theirs or {}
        self._names = tuple(teachers) if data.teacher_column is not None else ()
        told = {name: text for name, text in teachers.items() if text is not None}
        self._contexts = {name: Context(text, section_of(name)) for name, text in told.items()}

    def of(self, row: Row) -> Route:
        """Who scores the rollouts of a row's prompt; `DataError` where it names nobody that there is."""
        name = self._teacher(row)
        context = self._contexts.get(name)
        template = self._theirs.get(name, self._template)
        return Route(name, None if context is None else context.text(row, self._data, template))

    def encoded(self, tokenizer: Any, routes: Sequence[Route]) -> list[tuple[int, ...] | None]:
        """The token ids of what teachers are told, None where it is the prompt."""
        found: list[tuple[int, ...] | None] = [None] * len(routes)
        for name in dict.fromkeys(route.teacher for route in routes):
            told = [route.told if route.teacher == name else None for route in routes]
            ids = encode(tokenizer, self._theirs.get(name, self._template), told)
            found = [own if own is not None else other for own, other in zip(ids, found, strict=True)]
        return found

    def refuse_unused(self, source: str, used: Collection[str], skipped: int) -> None:
        """`DataError` for a teacher without a prompt: it costs its scorers, whether or not it has any to score."""
        column = self._data.teacher_column
        for name in self._names:
            if name in used:
                continue
            verb = "lacks a teacher" if name == DEFAULT_TEACHER else "names it"
            left_out = f", of those that are not too long ({skipped} are)" if skipped else ""
            raise DataError(
                f"{section_of(name)}: no row of {source} {verb} in column {column!r}{left_out}: leave that teacher "
                "out, or give it prompts (data.teacher_column chooses the column)"
            )

    def _teacher(self, row: Row) -> str:
        if not self._names:
            return DEFAULT_TEACHER
        column, names = self._data.teacher_column or "", self._names
        value = row.value(column)
        if value is None:
            if DEFAULT_TEACHER in names:
                return DEFAULT_TEACHER
            raise DataError(
                f"{row.where}: {row.lacks(column, 'data.teacher_column')}; the section `teacher` would score the "
                "rows that name nobody, and there is none"
            )
        if not isinstance(value, str):
            raise DataError(f"{row.where}: {column} is {kind(value)}; a teacher's name is text")
        if value not in names:
            close = difflib.get_close_matches(value, names, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise DataError(
                f"{row.where}: {column} = {value!r}: no such teacher, there are {', '.join(names)}{meant}"
            )
        return value
