"""What a process is at, and since when it made no progress: how a hung actor is told from a busy one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class HeartbeatReport(NamedTuple):
    """What an actor answers when asked how it is."""

    pid: int
    task: str  # empty while it waits for work
    stalled: float  # seconds since the task last made progress; 0 without a task


class Heartbeat:
    """Kept by the thread that works, read by the one that answers."""

    def __init__(self) -> None:
        self._task = ""
        self._last = time.monotonic()

    @contextmanager
    def busy(self, task: str) -> Iterator[None]:
        """Work of this name is done inside; it must `beat` more often than `cluster.hang_timeout`."""
        outer = self._task
        self._task, self._last = outer or task, time.monotonic()
        try:
            yield
        finally:
            self._task, self._last = outer, time.monotonic()

    def beat(self) -> None:
        """Progress was made."""
        self._last = time.monotonic()

    def read(self) -> HeartbeatReport:
        """Now."""
        task = self._task
        return HeartbeatReport(os.getpid(), task, time.monotonic() - self._last if task else 0.0)
