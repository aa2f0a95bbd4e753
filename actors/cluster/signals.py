"""SIGTERM and Ctrl-C: remembered until the run can stop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from kat_ray.errors import UserError


class Preempted(Exception):
    """The process was told to end (SIGTERM, Ctrl-C) at a moment at which it can be stopped."""


class StopRequest:
    """SIGTERM or a first Ctrl-C: remembered until the run can stop; the second Ctrl-C stops at once."""

    def __init__(self, grace: float) -> None:
        """`grace` is `run.grace_seconds`."""
        self._grace = grace
        self._deadline: float | None = None
        self._warned = False
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take over the two signals for as long as this lasts."""
        before = {s: signal.signal(s, self._take) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self._deadline = number, time.monotonic() + self._grace

    def too_long(self, seconds: float) -> str | None:
        """What to say of `seconds` of learning, which cannot be interrupted; once, then None."""
        if self._warned or seconds <= self._grace:
            return None
        self._warned = True
        return (
            f"learning a step took {seconds:.0f} s and run.grace_seconds is {self._grace:g}: a run that is told to "
            "end meanwhile keeps its newest checkpoint only. Resume it with run.grace_seconds="
            f"{2 * math.ceil(seconds)}, or with a smaller run.checkpoint_every"
        )

    def check(self, interruptible: bool = True) -> None:
        """Raise `Preempted` if the run is to stop here, `UserError` if it should have stopped long ago."""
        if self._deadline is None:
            return
        if interruptible:
            raise Preempted
        if time.monotonic() > self._deadline:
            raise UserError(
                f"told to end, and {self._grace:g} s later (run.grace_seconds) the step was still not finished: it "
                "is lost, the newest checkpoint is intact"
            )
