"""Which actors hang: no answer to a ping, or answers without progress. A pure machine."""

from __future__ import annotations

from kat_ray.cluster.heartbeat import HeartbeatReport

_LONGEST_PERIOD = 10.0  # seconds between two rounds of pings, at most


class HangPolicy:
    """Keeps, by actor, since when a ping is unanswered and since when the actor is gone."""

    def __init__(self, *, hang_timeout: float, start_timeout: float) -> None:
        self._hang_timeout, self._start_timeout = hang_timeout, start_timeout
        self._asked_at: dict[str, float] = {}
        self._down_since: dict[str, float] = {}
        self._next_round = 0.0

    def is_due(self, now: float) -> bool:
        """Whether it is time for a round of `check`s; the next one is due a while later."""
        if now < self._next_round:
            return False
        self._next_round = now + min(_LONGEST_PERIOD, self._hang_timeout / 4)
        return True

    def check(self, name: str, now: float, answer: HeartbeatReport | None, *, answered: bool) -> str | None:
        """Why an actor has to be killed, None if it need not be.

        `answered` without an `answer` says that the actor is not there: it is being started.
        """
        if not answered:
            since = self._asked_at.setdefault(name, now)
            limit = self._start_timeout if name in self._down_since else self._hang_timeout
            return f"no answer for {now - since:.0f} s" if now - since > limit else None
        self._asked_at.pop(name, None)
        if answer is None:
            self._down_since.setdefault(name, now)
            return None
        self._down_since.pop(name, None)
        if answer.stalled > self._hang_timeout:
            return f"no progress for {answer.stalled:.0f} s in '{answer.task}'"
        return None

    def is_down(self, name: str, now: float) -> None:
        """The actor is gone, or was just killed."""
        self._asked_at.pop(name, None)
        self._down_since[name] = now

    def is_ready(self, name: str) -> None:
        """The actor is back."""
        self._asked_at.pop(name, None)
        self._down_since.pop(name, None)

    def down_seconds(self, name: str, now: float) -> float:
        """For how long an actor has been gone; 0 where it is there."""
        return now - self._down_since[name] if name in self._down_since else 0.0

    forget = is_ready
