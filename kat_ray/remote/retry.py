"""What becomes of a request that failed, and how many may be under way: decided without clock, thread or socket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Time-out of a proxy or server, too many requests, a fault that may pass. Everything else is an answer.
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
TOO_MANY = frozenset({429, 503})  # the server says that it has more than it can do

Verdict = Literal["answer", "again"]


def verdict(status: int) -> Verdict:
    """Whether a status is the server's answer, or a reason to ask again."""
    return "again" if status in AGAIN else "answer"


@dataclass
class Retry:
    """One request: how long to wait before its next attempt, and when to give up. Times in seconds.

    The wait doubles from `first` to `longest`, and is spread over its upper half, so that requests which failed
    together do not come again together. What the server asks for (Retry-After) is waited for at least.
    """

    started: float
    give_up_after: float
    first: float = 0.2
    longest: float = 10.0
    failures: int = 0

    def left(self, now: float) -> float:
        """Seconds until it is given up."""
        return self.started + self.give_up_after - now

    def wait(self, now: float, spread: float, asked: float | None = None) -> float | None:
        """After a failure: seconds to wait, None to give up. `spread` is drawn from [0, 1)."""
        base = min(self.longest, self.first * 2.0 ** min(self.failures, 30))
        self.failures += 1
        seconds = max(base * (0.5 + 0.5 * spread), asked or 0.0)
        return None if seconds >= self.left(now) else seconds


@dataclass
class Window:
    """How many requests may be under way: half as many after each time that the server has too many, and one more
    after as many good answers as there may be requests, up to `most`.
    """

    most: int
    size: int = 0
    running: int = 0
    _good: int = 0

    def __post_init__(self) -> None:
        self.size = self.most

    @property
    def is_free(self) -> bool:
        """Whether another request may begin."""
        return self.running < self.size

    def begin(self) -> None:
        """A request begins."""
        assert self.is_free, "a request waits for a place"
        self.running += 1

    def end(self, too_many: bool) -> None:
        """A request ended; `too_many`: the server said that it has more than it can do."""
        self.running -= 1
        if too_many:
            self.size, self._good = max(1, self.size // 2), 0
            return
        self._good += 1
        if self._good >= self.size and self.size < self.most:
            self.size, self._good = self.size + 1, 0
