"""Whether training goes well by its own measure while held-out answers get worse.

Of rewards that rise: what is rewarded is then not what is wanted. Of a KL that falls while the teacher is told more
than the student: the student then learns to act as if it knew what it was not told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_ERRORS = 2.0  # standard errors of a fall that chance explains


def fall_beyond_chance(before: Sequence[float], after: Sequence[float]) -> float:
    """How far the mean of `after` lies below that of `before`, less twice the standard error; 0 at least.

    Both are shares of right answers to the same problems [P], so the error is that of paired differences, the
    spread of the problems' own falls / sqrt(P). Of a single problem nothing is known.
    """
    falls = np.subtract(before, after)
    if len(falls) < 2:
        return 0.0
    error = float(falls.std(ddof=1)) / len(falls) ** 0.5
    return max(0.0, float(falls.mean()) - _ERRORS * error)


class HeldOutWatch:
    """`observe` every step, `evaluated` after every evaluation; `take` says what the newest one showed.

    Each evaluation is held against the one before, and the mean of the measure (a reward, or a KL with its sign
    turned) over the steps between the two against that of the steps before those.
    """

    def __init__(self) -> None:
        self._total, self._steps = 0.0, 0  # of the measure since the last evaluation
        self._reward: float | None = None  # mean of those before it
        self._shares: tuple[float, ...] = ()  # right answers to each problem then
        self._fall: float | None = None

    def observe(self, reward: float | None) -> None:
        """The measure of one more step, of which more is better; None says nothing."""
        if reward is not None:
            self._total, self._steps = self._total + reward, self._steps + 1

    def evaluated(self, shares: Sequence[float]) -> None:
        """Right answers to each problem, as shares, by the weights after the steps that were observed."""
        reward = self._total / self._steps if self._steps else None
        self._fall = None
        if reward is not None and self._reward is not None and len(shares) == len(self._shares):
            self._fall = fall_beyond_chance(self._shares, shares) if reward > self._reward else 0.0
        self._reward, self._shares = reward, tuple(shares)
        self._total, self._steps = 0.0, 0

    def take(self) -> float | None:
        """`fall_beyond_chance` where the measure rose, else 0; None where nothing was compared since then."""
        fall, self._fall = self._fall, None
        return fall

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {
            "total": self._total,
            "steps": self._steps,
            "reward": self._reward,
            "shares": list(self._shares),
            "fall": self._fall,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._total, self._steps = state["total"], state["steps"]
        self._reward, self._shares, self._fall = state["reward"], tuple(state["shares"]), state["fall"]
