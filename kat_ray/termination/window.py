"""The window statistic z(e) = mean(d[e-W .. e-1]), online.

A window mean is a difference of two prefix sums: O(1) work per token and W floats per rollout. Prefix
sums are added up strictly in order in double precision, so that `numpy.cumsum` over a recorded trace gives
the same bits (a replay must reproduce a run's cuts exactly).
"""

from __future__ import annotations

import math


class WindowMean:
    """Mean of the last W values; `push` returns it once W values have been seen.

    A non-finite value (the teacher gave none) makes every window that holds it undefined: `push` returns
    NaN for those, which is neither low nor a minimum. It does not outlive the window.
    """

    __slots__ = ("_last_bad", "_prefix", "_ring", "_width", "count")

    def __init__(self, width: int) -> None:
        assert width >= 1
        self._width = width
        self._ring = [0.0] * width  # prefix sums before each of the last W values
        self._prefix = 0.0
        self._last_bad = -1
        self.count = 0

    def push(self, value: float) -> float | None:
        """Add one value, nats. Returns z(count), NaN if undefined, None while fewer than W were seen."""
        slot = self.count % self._width
        if math.isfinite(value):
            before = self._prefix
            self._prefix = before + value
        else:
            before = self._prefix
            self._last_bad = self.count
        self._ring[slot] = before
        self.count += 1
        if self.count < self._width:
            return None
        if self._last_bad >= self.count - self._width:
            return math.nan
        return (self._prefix - self._ring[self.count % self._width]) / self._width
