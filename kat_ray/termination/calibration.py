"""The threshold: a quantile over a FIFO of recent minima (arXiv 2606.09471, section on calibration)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile with linear interpolation between order statistics (numpy's default).

    Raises ValueError for an empty sequence or q outside [0, 1].
    """
    if not values or not 0.0 <= q <= 1.0:
        raise ValueError(f"quantile of {len(values)} values at q = {q}: needs values and 0 <= q <= 1")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


class MinimaBuffer:
    """FIFO of the minima m(y) of recent rollouts, nats."""

    def __init__(self, capacity: int) -> None:
        self._values: deque[float] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._values)

    def push(self, minimum: float) -> None:
        """Add one minimum; the oldest leaves when the buffer is full."""
        self._values.append(minimum)

    def values(self) -> list[float]:
        """The minima, oldest first, nats."""
        return list(self._values)

    def replace(self, minima: Sequence[float]) -> None:
        """Hold these, oldest first, nats; the newest of them where they are more than the capacity."""
        self._values = deque(minima, maxlen=self._values.maxlen)

    def threshold(self, eta: float) -> float:
        """The threshold Q_{1 - eta}(B), nats; ValueError while the buffer is empty."""
        return quantile(tuple(self._values), 1.0 - eta)
