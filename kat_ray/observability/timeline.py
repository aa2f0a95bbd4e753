"""What a process did when: spans of its work, and the Chrome trace that shows those of a whole run.

Spans are recorded always (a microsecond each) and kept only until they are asked for, the latest at most.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

_KEPT = 20_000


class Span(NamedTuple):
    """A stretch of work; seconds since the epoch, by the clock of the process's machine."""

    name: str
    start: float
    end: float


class Timeline:
    """The spans of one process since they were last asked for."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=_KEPT)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record what runs inside."""
        started = time.time()
        try:
            yield
        finally:
            self._spans.append(Span(name, started, time.time()))

    def drain(self) -> tuple[Span, ...]:
        """All spans, oldest first; they are forgotten here."""
        spans = tuple(self._spans)
        self._spans.clear()
        return spans


class ChromeTrace:
    """timeline.json of a run: open it in chrome://tracing or https://ui.perfetto.dev. A row for every actor.

    The file is an array of events, written as they come; viewers do not ask for its end, so that of a run that was
    killed opens too.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, int] = {}
        self._first: float | None = None

    def add(self, spans: Mapping[str, Sequence[Span]], step: int) -> None:
        """Append the spans of a step by actor; microseconds since the first one."""
        with self._path.open("a", encoding="utf-8") as file:
            if not file.tell():  # a run that was resumed goes on with its file
                file.write("[\n")
            for actor, own in spans.items():
                if actor not in self._rows:
                    self._rows[actor] = len(self._rows)
                    file.write(_line(self._name(actor)))
                for span in own:
                    if self._first is None:
                        self._first = span.start
                    file.write(_line(self._event(actor, span, step)))

    def _name(self, actor: str) -> dict[str, Any]:
        return {"name": "thread_name", "ph": "M", "pid": 0, "tid": self._rows[actor], "args": {"name": actor}}

    def _event(self, actor: str, span: Span, step: int) -> dict[str, Any]:
        assert self._first is not None
        return {
            "name": span.name,
            "ph": "X",
            "pid": 0,
            "tid": self._rows[actor],
            "ts": round(1e6 * (span.start - self._first)),
            "dur": round(1e6 * (span.end - span.start)),
            "args": {"step": step},
        }


def _line(event: Mapping[str, Any]) -> str:
    return json.dumps(event) + ",\n"
