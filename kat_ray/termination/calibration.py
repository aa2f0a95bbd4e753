"""The threshold, from recent rollouts that were seen to their end.

`MinimaBuffer` is the paper's: a quantile over a FIFO of minima (arXiv 2606.09471, section on calibration).
`ShareBuffer` looks at what cuts would cost instead: the largest threshold whose cuts stay within a budget.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from kat_ray.termination.base import Finished
from kat_ray.termination.settings import KatParameters
from kat_ray.termination.staircase import Staircase
from kat_ray.termination.state import BudgetCalibrationState, CalibrationState, read_state


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


class Calibration(Protocol):
    """A FIFO of what recent rollouts said, and the threshold that follows from it."""

    def __len__(self) -> int: ...

    def push(self, rollout: Finished) -> None:
        """Add a rollout, unless it has nothing to say; the oldest leaves when the buffer is full."""

    def threshold(self) -> float | None:
        """The threshold, nats; None where there is none to give."""

    def state(self, threshold: float | None) -> dict[str, Any]:
        """What a checkpoint keeps, with the threshold that is in use."""

    def load(self, state: Mapping[str, Any]) -> float | None:
        """Go on from it, the newest where it holds too many; returns the threshold that was in use."""


class MinimaBuffer:
    """FIFO of the minima m(y) of recent rollouts, nats; the threshold is Q_{1 - eta} of them."""

    def __init__(self, capacity: int, eta: float) -> None:
        self._values: deque[float] = deque(maxlen=capacity)
        self._eta = eta

    def __len__(self) -> int:
        return len(self._values)

    def push(self, rollout: Finished) -> None:
        if rollout.minimum is not None:
            self.add(rollout.minimum)

    def add(self, minimum: float) -> None:
        """Add one minimum, nats."""
        self._values.append(minimum)

    def threshold(self) -> float | None:
        return quantile(tuple(self._values), 1.0 - self._eta) if self._values else None

    def state(self, threshold: float | None) -> dict[str, Any]:
        return CalibrationState(buffer=list(self._values), threshold=threshold).model_dump()

    def load(self, state: Mapping[str, Any]) -> float | None:
        saved = read_state(CalibrationState, state)
        self._values = deque(saved.buffer, maxlen=self._values.maxlen)
        return saved.threshold


class ShareBuffer:
    """FIFO of recent rollouts' staircases; the threshold is the largest whose cuts stay within the budget.

    With l_i(s) the share of its KL that rollout i would lose under the threshold s, n rollouts and budget b,

        s = sup { s : (sum_i l_i(s) + 1) / (n + 1) <= b }

    l_i is at most 1 and rises with s, so for rollouts that are exchangeable with those of the buffer the expected
    share that a new one loses is at most b, whatever their distribution (conformal risk control, Angelopoulos et
    al., arXiv 2208.02814, theorem 1). The 1 is the price of a small buffer: below n = 1 / b - 1 nothing is cut.
    """

    def __init__(self, capacity: int, budget: float) -> None:
        self._stairs: deque[Staircase] = deque(maxlen=capacity)
        self._budget = budget

    def __len__(self) -> int:
        return len(self._stairs)

    def push(self, rollout: Finished) -> None:
        if rollout.evidence is not None:
            self.add(rollout.evidence)

    def add(self, stairs: Staircase) -> None:
        """Add one rollout that was seen to its end."""
        self._stairs.append(stairs)

    def threshold(self) -> float | None:
        allowed = self._budget * (len(self._stairs) + 1) - 1.0  # the shares' sum
        if not self._stairs or allowed < 0.0:
            return None
        value = np.concatenate([s.value[::-1] for s in self._stairs])
        share = np.concatenate([s.share[::-1] for s in self._stairs])
        gained = np.diff(share, prepend=0.0)
        ends = np.cumsum([len(s.value) for s in self._stairs])
        first = np.array([0, *ends[:-1]])[np.diff(ends, prepend=0) > 0]  # of every rollout that has jumps
        gained[first] = share[first]
        order = np.argsort(value, kind="stable")
        value, lost = value[order], np.cumsum(gained[order])
        over = np.flatnonzero(lost > allowed)
        if len(over):
            return float(value[over[0]])  # low means below it, so this jump and its equals are not taken
        return math.nextafter(float(value[-1]), math.inf) if len(value) else None

    def state(self, threshold: float | None) -> dict[str, Any]:
        stairs = [{"value": s.value.tolist(), "share": s.share.tolist()} for s in self._stairs]
        return {"stairs": stairs, "threshold": threshold}

    def load(self, state: Mapping[str, Any]) -> float | None:
        saved = read_state(BudgetCalibrationState, state)
        stairs = (Staircase(np.array(s.value), np.array(s.share)) for s in saved.stairs)
        self._stairs = deque(stairs, maxlen=self._stairs.maxlen)
        return saved.threshold


def calibration(rule: KatParameters) -> MinimaBuffer | ShareBuffer:
    """The empty calibration that the settings ask for."""
    if rule.budget is None:
        return MinimaBuffer(rule.buffer, rule.eta)
    return ShareBuffer(rule.buffer, rule.budget)
