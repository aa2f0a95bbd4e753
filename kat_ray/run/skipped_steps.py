"""Skipped steps in a row: one is an accident, many are a run that will not recover."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kat_ray.errors import UserError


class SkipGuard:
    """Counts a run's skipped steps. Call `observe` once a step, in order."""

    def __init__(self, limit: int) -> None:
        self._limit = limit  # learner.max_skipped_steps
        self.in_a_row = 0
        self.total = 0

    def observe(self, skipped: bool, tokens: int) -> bool:
        """Take a step's report; True if the run has to stop.

        `tokens` are those in the loss: a step that kept none and was not skipped says nothing of the numbers.
        """
        if skipped:
            self.in_a_row += 1
            self.total += 1
        elif tokens:
            self.in_a_row = 0
        return self.in_a_row >= self._limit

    def error(self, step: int, dump: Path | None) -> UserError:
        """Why the run ends at `step` (as in metrics.jsonl); `dump` is its batch's file, None if that is lost."""
        where = "was lost with the node that held it"
        if dump is not None:
            where = f"is in {dump} (docs/numbers.md tells how to read it)"
        return UserError(
            f"learner.max_skipped_steps = {self._limit}: step {step} is the last of {self.in_a_row} in a row whose "
            f"loss or gradient was not finite; each was skipped. Its batch {where}. Look for teacher rows that are "
            "not finite; try another learner.dtype, a lower learner.lr, or the checkpoint before the first of them"
        )

    def state(self) -> dict[str, Any]:
        """The counts, as JSON."""
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.in_a_row, self.total = int(state["in_a_row"]), int(state["total"])
