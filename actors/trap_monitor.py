"""The trap monitor: one named actor around the termination rule.

It receives floats, never tensors. It decides online which rollouts are trapped and keeps the only ledger of
how rollouts end. Left out: sharding over several monitors.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kat_ray.termination import (
    Finished,
    NewTokens,
    RolloutStart,
    RolloutTracker,
    RunFacts,
    TerminationConfig,
    make_rule,
)
from kat_ray.timeline import Span, Timeline
from kat_ray.types import (
    EngineEnd,
    RolloutOutcome,
    ScoredChunk,
    StepEnd,
    StepStart,
    StopReason,
    TerminationDecision,
)

_ENDS = {
    EngineEnd.EOS: StopReason.EOS,
    EngineEnd.MAX_TOKENS: StopReason.MAX_TOKENS,
    EngineEnd.FAILED: StopReason.FAILED,
}


@dataclass
class _Rollout:
    """A rollout of the step under way. `scored` counts the d's received, `end` is set exactly once."""

    tracker: RolloutTracker
    probe: bool
    scored: int = 0
    end: StopReason | None = field(default=None)

    def close(self, reason: StopReason) -> None:
        assert self.end is None, f"a rollout ended twice: {self.end} and {reason}"
        self.end = reason


class TrapMonitor:
    """Decides online. Call order per step: `start_step`, any number of `observe`, `end_step`."""

    def __init__(self, termination: TerminationConfig, facts: RunFacts) -> None:
        self._rule = make_rule(termination, facts)
        self._rollouts: dict[int, _Rollout] = {}
        self._late_tokens = 0
        self._decisions = 0
        self._busy_seconds = 0.0
        self._timeline = Timeline()

    def start_step(self, step: int, rollout_ids: Sequence[int], probes: Sequence[bool]) -> StepStart:
        """Register the rollouts of a step; returns the threshold and the budget that they all get."""
        self._busy_seconds = 0.0
        assert not self._rollouts, f"step {step} starts while {len(self._rollouts)} rollouts are open"
        self._rule.start_step(step)
        for rollout_id, probe in zip(rollout_ids, probes, strict=True):
            start = RolloutStart(int(rollout_id), bool(probe))
            self._rollouts[start.rollout_id] = _Rollout(self._rule.begin(start), start.probe)
        return StepStart(self._rule.threshold, self._rule.budget)

    def observe(self, chunk: ScoredChunk) -> TerminationDecision:
        """Take the d's of a chunk; returns the rollouts that are newly confirmed as trapped."""
        with self._timeline.span("observe"):
            return self._observe(chunk)

    def _observe(self, chunk: ScoredChunk) -> TerminationDecision:
        started = time.perf_counter()
        newly: list[tuple[int, int, int]] = []
        for i, rollout_id in enumerate(chunk.rollout_ids.tolist()):
            rollout = self._rollouts[rollout_id]
            rows = slice(int(chunk.offsets[i]), int(chunk.offsets[i + 1]))
            count = rows.stop - rows.start
            if rollout.end is not None:
                self._late_tokens += count  # scored while the decision was on its way
                continue
            if int(chunk.start[i]) != rollout.scored:
                raise ValueError(
                    f"rollout {rollout_id}: a chunk starts at token {chunk.start[i]}, "
                    f"but {rollout.scored} tokens were scored so far"
                )
            rollout.scored += count
            cut = rollout.tracker.observe(NewTokens(*(getattr(chunk, name)[rows] for name in NewTokens._fields)))
            if cut is not None and not rollout.probe:
                rollout.close(StopReason.TRAPPED)
                newly.append((rollout_id, cut.at, cut.confirmed))
            elif (end := EngineEnd(int(chunk.ended[i]))) is not EngineEnd.RUNNING:
                rollout.close(_ENDS[end])
        self._decisions += len(newly)
        self._busy_seconds += time.perf_counter() - started
        ids, cuts, confirmed = zip(*newly, strict=True) if newly else ((), (), ())
        return TerminationDecision(
            rollout_ids=np.asarray(ids, dtype=np.int64),
            cut=np.asarray(cuts, dtype=np.int32),
            confirmed=np.asarray(confirmed, dtype=np.int32),
        )

    def end_step(self) -> StepEnd:
        """Close the step: every rollout has ended; outcomes in the order of rollout ids.

        The calibration is fed in that order too, so that it does not depend on who finished first.
        """
        open_ids = [i for i, r in self._rollouts.items() if r.end is None]
        assert not open_ids, f"{len(open_ids)} rollouts have not ended, the first is {open_ids[0]}"
        ordered = sorted(self._rollouts.items())
        outcomes = [_outcome(rollout_id, rollout) for rollout_id, rollout in ordered]
        self._rule.end_step([_finished(o) for o in outcomes if o.stop_reason is not StopReason.FAILED])
        self._rollouts.clear()
        return StepEnd(tuple(outcomes), self._busy_seconds)

    def spans(self) -> tuple[Span, ...]:
        """What was done since this was last asked."""
        return self._timeline.drain()

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and what is held now."""
        return {
            "open_rollouts": len(self._rollouts),
            "calibration_samples": self._rule.samples,
            "decisions": self._decisions,
            "late_tokens": self._late_tokens,
        }


def _finished(outcome: RolloutOutcome) -> Finished:
    return Finished(
        outcome.minimum,
        cut=outcome.cut is not None,
        probe=outcome.probe,
        length=outcome.scored,
        full=outcome.stop_reason is StopReason.MAX_TOKENS,
    )


def _outcome(rollout_id: int, rollout: _Rollout) -> RolloutOutcome:
    tracker = rollout.tracker
    assert rollout.end is not None
    trapped = rollout.end is StopReason.TRAPPED
    return RolloutOutcome(
        rollout_id=rollout_id,
        stop_reason=rollout.end,
        scored=rollout.scored,
        cut=tracker.cut.at if trapped and tracker.cut else None,
        confirmed=tracker.cut.confirmed if trapped and tracker.cut else None,
        threshold=tracker.threshold,
        minimum=tracker.minimum,
        probe=rollout.probe,
        would_cut=tracker.cut.at if rollout.probe and tracker.cut else None,
        weights=None if tracker.weights is None else np.asarray(tracker.weights, dtype=np.float32),
    )
