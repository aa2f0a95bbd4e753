"""No termination: every rollout goes on to its end of sequence or its token limit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kat_ray.termination.base import Cut, Finished


class NoTracker:
    """Counts what it sees and never cuts."""

    __slots__ = ("seen",)

    threshold: float | None = None
    cut: Cut | None = None
    minimum: float | None = None

    def __init__(self) -> None:
        self.seen = 0

    def observe(self, d: Iterable[float]) -> Cut | None:
        """Count the d's."""
        self.seen += sum(1 for _ in d)
        return None


class NoRule:
    """Shares nothing between rollouts."""

    threshold: float | None = None
    samples: int = 0

    def start_step(self, step: int) -> None:
        """Nothing to fix."""

    def begin(self, probe: bool) -> NoTracker:
        """Start a rollout."""
        return NoTracker()

    def end_step(self, finished: Sequence[Finished]) -> None:
        """Nothing to learn from."""
