"""Says what share of the student's mass the KL sees: after the first step, and whenever that has changed much."""

from __future__ import annotations

import math
from typing import Any

from kat_ray.run.step_result import StepResult

# Of the mass outside the top k, since it was last said: below both it is scatter.
_FACTOR, _DIFFERENCE = 1.5, 0.02


class TailReport:
    """Call `observe` once a step, in order."""

    def __init__(self, top_k: int) -> None:
        """`top_k`: rollout.top_k_logprobs."""
        self._top_k = top_k
        self._said: float | None = None  # the tail mass of the last line

    def observe(self, step: StepResult) -> str | None:
        """The line to show after a step, if one is due."""
        report = step.learner
        if report.tail_mass is None or not report.tokens or report.skipped or not math.isfinite(report.tail_mass):
            return None
        if not self._is_news(report.tail_mass):
            return None
        self._said = report.tail_mass
        text = (
            f"step {step.done}: rollout.top_k_logprobs = {self._top_k} sees {1 - report.tail_mass:.1%} of the "
            "student's mass"
        )
        if report.kl_hidden is not None:
            text += (
                f"; the rest, which is one event, hides an estimated {report.kl_hidden:.2g} nats beside the "
                f"{report.loss:.3g} of learner/loss"
            )
        if report.top_k_for_99 is not None and report.tail_mass > 0.01:
            text += f"; {_rounded(report.top_k_for_99)} would see 99 %"
        return text

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {"said": self._said}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._said = state["said"]

    def _is_news(self, tail: float) -> bool:
        if self._said is None:
            return True
        low, high = sorted((tail, self._said))
        return high - low >= _DIFFERENCE and high >= _FACTOR * low


def _rounded(count: int) -> str:
    """Two digits: a sample of tokens gives no more."""
    return f"{int(float(f'{count:.2g}')):,}"
