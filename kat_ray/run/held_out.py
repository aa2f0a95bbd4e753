"""Whether rewards rise while held-out answers get worse: what is rewarded is then not what is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class HeldOutWatch:
    """`observe` every step, `evaluated` after every evaluation; `take` says what the newest one showed.

    Each evaluation is held against the one before, and the mean reward of the steps between the two against that of
    the steps before those.
    """

    def __init__(self) -> None:
        self._total, self._steps = 0.0, 0  # rewards since the last evaluation
        self._reward: float | None = None  # mean of those before it
        self._accuracy: float | None = None
        self._fall: float | None = None

    def observe(self, reward: float | None) -> None:
        """The mean reward of one more step; None says nothing."""
        if reward is not None:
            self._total, self._steps = self._total + reward, self._steps + 1

    def evaluated(self, accuracy: float) -> None:
        """The accuracy of the weights after the steps that were observed."""
        reward = self._total / self._steps if self._steps else None
        self._fall = None
        if reward is not None and self._reward is not None and self._accuracy is not None:
            self._fall = max(0.0, self._accuracy - accuracy) if reward > self._reward else 0.0
        self._reward, self._accuracy = reward, accuracy
        self._total, self._steps = 0.0, 0

    def take(self) -> float | None:
        """How far accuracy fell where rewards rose, else 0; None where nothing was compared since the last call."""
        fall, self._fall = self._fall, None
        return fall

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {
            "total": self._total,
            "steps": self._steps,
            "reward": self._reward,
            "accuracy": self._accuracy,
            "fall": self._fall,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._total, self._steps = state["total"], state["steps"]
        self._reward, self._accuracy, self._fall = state["reward"], state["accuracy"], state["fall"]
