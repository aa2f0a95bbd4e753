"""The ends of rollouts that no monitor follows: each has the one that its engine gave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from actors.driver.dispatcher import CompletedRequest
from kat_ray.types.records import (
    EngineEnd,
    RolloutOutcome,
    RolloutSpec,
    SampledRollout,
    StepEnd,
    StepStart,
    StopReason,
)

_REASONS = {
    EngineEnd.EOS: StopReason.EOS,
    EngineEnd.MAX_TOKENS: StopReason.MAX_TOKENS,
    EngineEnd.FAILED: StopReason.FAILED,
}


class Unmonitored:
    """Stands where `actors.driver.monitor_group.MonitorGroup` does, in a run whose rule never acts."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        """`state` is the rule's, which no rollout changes."""
        self.state = state

    def start_step(self, step: int, state: Mapping[str, Any]) -> StepStart:
        """No limits."""
        return StepStart(threshold=None, budget=None)

    def end_step(self, step: int, outcomes: Sequence[RolloutOutcome], state: Mapping[str, Any]) -> None:
        """Nothing is learnt from them."""

    def close(self, completed: Sequence[CompletedRequest]) -> StepEnd:
        """The outcomes in the order of ids. Every rollout must have ended."""
        outcomes = [
            _outcome(spec, rollout)
            for done in completed
            for spec, rollout in zip(done.request.specs, done.report.rollouts, strict=True)
        ]
        return StepEnd(tuple(sorted(outcomes, key=lambda o: o.rollout_id)), busy_seconds=0.0)


def _outcome(spec: RolloutSpec, rollout: SampledRollout) -> RolloutOutcome:
    assert spec.rollout_id == rollout.rollout_id, (
        f"rollout {rollout.rollout_id} stands in place of {spec.rollout_id}"
    )
    assert rollout.end in _REASONS, f"rollout {rollout.rollout_id} has not ended"
    return RolloutOutcome(
        rollout_id=rollout.rollout_id,
        stop_reason=_REASONS[rollout.end],
        scored=None,
        cut=None,
        confirmed=None,
        threshold=None,
        minimum=None,
        probe=spec.probe,
        would_cut=None,
        teacher=spec.teacher,
    )
