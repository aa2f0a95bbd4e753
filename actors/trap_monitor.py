"""The trap monitor: one named actor around the termination rule.

It receives floats, never tensors. It decides online which rollouts are trapped and keeps the only ledger of
how rollouts end. Several of them share a run's rollouts as `actors.monitor_shards` deals them out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from kat_ray.accounting import finished
from kat_ray.termination import (
    Finished,
    NewTokens,
    RolloutStart,
    RunFacts,
    TerminationConfig,
    make_rule,
    make_table,
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

_TRAPPED = 4
# How rollouts end, by the number in `TrapMonitor._end`; 0 is running.
_REASONS = {
    int(EngineEnd.EOS): StopReason.EOS,
    int(EngineEnd.MAX_TOKENS): StopReason.MAX_TOKENS,
    int(EngineEnd.FAILED): StopReason.FAILED,
    _TRAPPED: StopReason.TRAPPED,
}


class TrapMonitor:
    """Decides online. Call order per step: `start_step`, any number of `observe`, `end_step`.

    The rollouts under way are rows of arrays: `_scored` counts the d's received, `_end` is set exactly once.
    """

    def __init__(self, termination: TerminationConfig, facts: RunFacts) -> None:
        self._rule = make_rule(termination, facts)
        self._late_tokens = 0
        self._decisions = 0
        self._busy_seconds = 0.0
        self._timeline = Timeline()
        self._begin([], [])

    def _begin(self, rollout_ids: Sequence[int], probes: Sequence[bool]) -> None:
        self._rows = {int(rollout_id): row for row, rollout_id in enumerate(rollout_ids)}
        self._probe = np.asarray(probes, dtype=bool)
        self._scored = np.zeros(len(rollout_ids), dtype=np.int64)
        self._end = np.zeros(len(rollout_ids), dtype=np.int8)
        starts = [RolloutStart(int(i), bool(p)) for i, p in zip(rollout_ids, probes, strict=True)]
        self._table = make_table(self._rule, starts)

    def start_step(self, step: int, rollout_ids: Sequence[int], probes: Sequence[bool]) -> StepStart:
        """Register the rollouts of a step; returns the threshold and the budget that they all get."""
        self._busy_seconds = 0.0
        assert not self._rows, f"step {step} starts while {len(self._rows)} rollouts are open"
        self._rule.start_step(step)
        self._begin(rollout_ids, probes)
        return StepStart(self._rule.threshold, self._rule.budget)

    def observe(self, chunk: ScoredChunk) -> TerminationDecision:
        """Take the d's of a chunk; returns the rollouts that are newly confirmed as trapped."""
        with self._timeline.span("observe"):
            return self._observe(chunk)

    def _observe(self, chunk: ScoredChunk) -> TerminationDecision:
        started = time.thread_time()
        rows = np.array([self._rows[i] for i in chunk.rollout_ids.tolist()], dtype=np.int64)
        count = np.diff(chunk.offsets)
        open_ = self._end[rows] == EngineEnd.RUNNING
        self._late_tokens += int(count[~open_].sum())  # scored while the decision was on its way
        rows, count = rows[open_], count[open_]
        gap = np.flatnonzero(chunk.start[open_] != self._scored[rows])
        if len(gap):
            raise ValueError(
                f"rollout {chunk.rollout_ids[open_][gap[0]]}: a chunk starts at token "
                f"{chunk.start[open_][gap[0]]}, but {self._scored[rows[gap[0]]]} tokens were scored so far"
            )
        self._scored[rows] += count
        tokens = NewTokens(*(getattr(chunk, name) for name in NewTokens._fields))
        cuts, confirmed = self._table.observe(rows, tokens, chunk.offsets[:-1][open_], count)
        trapped = (cuts >= 0) & ~self._probe[rows]
        self._end[rows] = np.where(trapped, _TRAPPED, chunk.ended[open_])
        self._decisions += int(trapped.sum())
        decision = TerminationDecision(
            rollout_ids=chunk.rollout_ids[open_][trapped],
            cut=cuts[trapped].astype(np.int32),
            confirmed=confirmed[trapped].astype(np.int32),
        )
        self._busy_seconds += time.thread_time() - started
        return decision

    def end_step(self) -> StepEnd:
        """Close the step of the only monitor, and learn from it."""
        closed = self.close_step()
        self.learn([finished(o) for o in closed.outcomes if o.stop_reason is not StopReason.FAILED])
        return closed

    def learn(self, ended: Sequence[Finished]) -> None:
        """Feed the calibration with *all* rollouts of the step, in the order of rollout ids.

        So it depends neither on who finished first nor on which of several monitors saw it.
        """
        self._rule.end_step(ended)

    def close_step(self) -> StepEnd:
        """Close the step: every rollout has ended; outcomes in the order of rollout ids."""
        started = time.thread_time()
        running = [i for i, row in self._rows.items() if self._end[row] == EngineEnd.RUNNING]
        assert not running, f"{len(running)} rollouts have not ended, the first is {running[0]}"
        outcomes = [self._outcome(rollout_id, row) for rollout_id, row in sorted(self._rows.items())]
        self._begin([], [])
        return StepEnd(tuple(outcomes), self._busy_seconds + time.thread_time() - started)

    def _outcome(self, rollout_id: int, row: int) -> RolloutOutcome:
        followed, probe = self._table.followed(row), bool(self._probe[row])
        cut = followed.cut if self._end[row] == _TRAPPED else None
        return RolloutOutcome(
            rollout_id=rollout_id,
            stop_reason=_REASONS[int(self._end[row])],
            scored=int(self._scored[row]),
            cut=cut.at if cut else None,
            confirmed=cut.confirmed if cut else None,
            threshold=followed.threshold,
            minimum=followed.minimum,
            probe=probe,
            would_cut=followed.cut.at if probe and followed.cut else None,
            weights=None if followed.weights is None else np.asarray(followed.weights, dtype=np.float32),
        )

    def spans(self) -> tuple[Span, ...]:
        """What was done since this was last asked."""
        return self._timeline.drain()

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and what is held now."""
        return {
            "open_rollouts": len(self._rows),
            "calibration_samples": self._rule.samples,
            "decisions": self._decisions,
            "late_tokens": self._late_tokens,
        }
