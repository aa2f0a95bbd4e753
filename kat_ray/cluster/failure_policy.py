"""How many deaths a run bears: counted by actor within one step."""

from __future__ import annotations

from collections import Counter

from kat_ray.errors import UserError


class FailurePolicy:
    """Counts deaths; the one too many ends the run."""

    def __init__(self, max_restarts: int) -> None:
        self._max_restarts = max_restarts
        self._in_step: Counter[str] = Counter()  # by actor, since a step was last completed
        self.restarts: Counter[str] = Counter()  # by role, since the run began

    def lost(self, name: str, reason: str) -> None:
        """Count a death of `role:number`; `UserError` where that actor was lost too often within one step."""
        self.restarts[name.partition(":")[0]] += 1
        self._in_step[name] += 1
        times = self._in_step[name]
        if times > self._max_restarts:
            raise UserError(
                f"{name} was lost {times} times in one step (cluster.max_restarts = {self._max_restarts}), last: "
                f"{reason}. Its output is in Ray's session logs (/tmp/ray/session_latest/logs/worker-*)."
            )

    def step_done(self) -> None:
        """A step was completed for the first time: deaths before it do not count against the next."""
        self._in_step.clear()
