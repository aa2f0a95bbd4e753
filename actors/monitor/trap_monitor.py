"""The trap monitor: one named actor around the termination rule.

It receives floats, never tensors. It decides online which rollouts are trapped and keeps the only ledger of
how rollouts end. Several of them share a run's rollouts as `actors.driver.monitor_group` deals them out.

Rollouts come in attempts: those that one sampler was given at once. Those of a sampler that was lost come again
under another number, and what is still on its way of the first is looked at by nobody.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kat_ray.cluster.heartbeat import Heartbeat, HeartbeatReport
from kat_ray.data.accounting import finished
from kat_ray.errors import StateLost
from kat_ray.observability.logs import label_logs
from kat_ray.observability.timeline import Span, Timeline
from kat_ray.termination import (
    Finished,
    NewTokens,
    RolloutStart,
    RunFacts,
    TerminationConfig,
    TerminationRule,
    make_rule,
    make_table,
)
from kat_ray.types.records import (
    EngineEnd,
    RolloutOutcome,
    ScoredChunk,
    StepEnd,
    StepStart,
    StopReason,
    TerminationDecision,
)

_TRAPPED = 4
# How rollouts end, by the number in `_Attempt.end`; 0 is running.
_REASONS = {
    int(EngineEnd.EOS): StopReason.EOS,
    int(EngineEnd.MAX_TOKENS): StopReason.MAX_TOKENS,
    int(EngineEnd.FAILED): StopReason.FAILED,
    _TRAPPED: StopReason.TRAPPED,
}


class _Attempt:
    """The rollouts of one order, as rows of arrays: `scored` counts the d's received, `end` is set exactly once."""

    def __init__(self, rule: TerminationRule, rollout_ids: Sequence[int], probes: Sequence[bool]) -> None:
        self.row = {rollout_id: row for row, rollout_id in enumerate(rollout_ids)}
        starts = [RolloutStart(i, probe=p) for i, p in zip(rollout_ids, probes, strict=True)]
        self.table = make_table(rule, starts)
        self.probe = np.asarray(probes, dtype=bool)
        self.scored = np.zeros(len(starts), dtype=np.int64)
        self.end = np.zeros(len(starts), dtype=np.int64)

    def outcome(self, rollout_id: int) -> RolloutOutcome:
        """How a rollout ended."""
        row = self.row[rollout_id]
        followed, probe = self.table.tracker_state(row), bool(self.probe[row])
        cut = followed.cut if self.end[row] == _TRAPPED else None
        return RolloutOutcome(
            rollout_id=rollout_id,
            stop_reason=_REASONS[int(self.end[row])],
            scored=int(self.scored[row]),
            cut=cut.at if cut else None,
            confirmed=cut.confirmed if cut else None,
            threshold=followed.threshold,
            minimum=followed.minimum,
            probe=probe,
            would_cut=followed.cut.at if probe and followed.cut else None,
            weights=None if followed.weights is None else np.asarray(followed.weights, dtype=np.float32),
        )


class TrapMonitor:
    """Decides online. Call order per step: `start_step`, then `admit` and any number of `observe` for each attempt,
    and `end_step`. A monitor that was started anew in between is told everything again: by `admit`, and by the
    chunks that were scored so far, in their order.
    """

    def __init__(self, termination: TerminationConfig, facts: RunFacts) -> None:
        label_logs()
        self._termination, self._facts = termination, facts
        self._rule = make_rule(termination, facts)
        self._next = 0  # the step that the calibration is good for
        self._step: int | None = None
        self._attempts: dict[int, _Attempt] = {}
        self._late_tokens = 0
        self._decisions = 0
        self._busy_seconds = 0.0
        self._timeline = Timeline()
        self._heartbeat = Heartbeat()

    def health(self) -> HeartbeatReport:
        """What it is at."""
        return self._heartbeat.read()

    def state(self) -> dict[str, Any]:
        """The calibration, as JSON: what `start_step` and `admit` take."""
        return self._rule.state()

    def start_step(
        self,
        step: int,
        rollout_ids: Sequence[int] = (),
        probes: Sequence[bool] = (),
        state: Mapping[str, Any] | None = None,
    ) -> StepStart:
        """Open a step; returns the threshold and the budget that all its rollouts get.

        `state` is the calibration that it must begin with, None for the one at hand. Rollouts named here are
        attempt 0; others come by `admit`.
        """
        open_ = sum(int((a.end == EngineEnd.RUNNING).sum()) for a in self._attempts.values())
        assert state is not None or not open_, f"step {step} starts while {open_} rollouts are open"
        if state is not None and step != self._next:
            self._rule = make_rule(self._termination, self._facts)
            self._rule.load_state(state)
        self._busy_seconds = 0.0
        self._step, self._next = step, step
        self._attempts = {}
        self._rule.start_step(step)
        if rollout_ids:
            self._attempts[0] = _Attempt(self._rule, rollout_ids, probes)
        return StepStart(self._rule.threshold, self._rule.budget)

    def admit(
        self,
        step: int,
        attempt: int,
        rollout_ids: Sequence[int],
        probes: Sequence[bool],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Take an attempt's rollouts in; those of an attempt that is known are left as they are."""
        if self._step != step:
            self.start_step(step, state=state)
        if attempt not in self._attempts:
            self._attempts[attempt] = _Attempt(self._rule, rollout_ids, probes)

    def observe(self, chunk: ScoredChunk) -> TerminationDecision:
        """Take the d's of a chunk; returns the rollouts that are newly confirmed as trapped.

        What was seen before is passed over. `StateLost` if the attempt is not known: `admit` it, and say it all
        again.
        """
        with self._timeline.span("observe"), self._heartbeat.busy("observe"):
            return self._observe(chunk)

    def _observe(self, chunk: ScoredChunk) -> TerminationDecision:
        started = time.thread_time()
        attempt = self._attempts.get(chunk.attempt)
        if attempt is None:
            raise StateLost(f"attempt {chunk.attempt} is not known to this monitor")
        rows = np.array([attempt.row[i] for i in chunk.rollout_ids.tolist()], dtype=np.int64)
        count = np.diff(chunk.offsets)
        running = attempt.end[rows] == EngineEnd.RUNNING
        self._late_tokens += int(count[~running].sum())  # scored while the decision was on its way
        new = running & (chunk.start >= attempt.scored[rows])  # what starts before that was seen before
        rows, count = rows[new], count[new]
        gap = np.flatnonzero(chunk.start[new] != attempt.scored[rows])
        if len(gap):
            # Scores that a new monitor was to see again were lost on the way: whoever sent them sends all again.
            raise StateLost(
                f"rollout {chunk.rollout_ids[new][gap[0]]}: a chunk starts at token "
                f"{chunk.start[new][gap[0]]}, but {attempt.scored[rows[gap[0]]]} tokens were scored so far"
            )
        attempt.scored[rows] += count
        tokens = NewTokens(*(getattr(chunk, name) for name in NewTokens._fields))
        cuts, _ = attempt.table.observe(rows, tokens, chunk.offsets[:-1][new], count)
        trapped = (cuts >= 0) & ~attempt.probe[rows]
        attempt.end[rows] = np.where(trapped, _TRAPPED, chunk.ended[new])
        self._decisions += int(trapped.sum())
        decision = TerminationDecision(chunk.rollout_ids[new][trapped])
        self._busy_seconds += time.thread_time() - started
        return decision

    def end_step(self) -> StepEnd:
        """Close the step of the only monitor with all attempts, and learn from it."""
        closed = self.close_step(tuple(self._attempts))
        assert self._step is not None
        self.learn(self._step, [finished(o) for o in closed.outcomes if o.stop_reason is not StopReason.FAILED])
        return closed

    def learn(self, step: int, ended: Sequence[Finished]) -> dict[str, Any]:
        """Feed the calibration with *all* rollouts of the step, in the order of rollout ids; returns its state.

        So it depends neither on who finished first nor on which of several monitors saw it. A step is learnt from
        once, however often this is said. `StateLost` if the step is not open.
        """
        if self._next != step + 1:
            if self._step != step:
                raise StateLost(f"step {step} is not open in this monitor")
            self._rule.end_step(ended)
            self._next, self._step = step + 1, None
        return self._rule.state()

    def close_step(self, attempts: Sequence[int]) -> StepEnd:
        """Outcomes of these attempts, in the order of rollout ids: all of their rollouts have ended.

        Other attempts were lost with their samplers. `StateLost` if one is not known.
        """
        started = time.thread_time()
        unknown = [a for a in attempts if a not in self._attempts]
        if unknown:
            raise StateLost(f"attempts {unknown} are not known to this monitor")
        own = [self._attempts[a] for a in attempts]
        running = [i for a in own for i, row in a.row.items() if a.end[row] == EngineEnd.RUNNING]
        assert not running, f"{len(running)} rollouts have not ended, the first is {running[0]}"
        outcomes = sorted((a.outcome(i) for a in own for i in a.row), key=lambda o: o.rollout_id)
        self._attempts = {}
        return StepEnd(tuple(outcomes), self._busy_seconds + time.thread_time() - started)

    def spans(self) -> tuple[Span, ...]:
        """What was done since this was last asked."""
        return self._timeline.drain()

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and what is held now."""
        return {
            "open_rollouts": sum(len(a.row) for a in self._attempts.values()),
            "calibration_samples": self._rule.samples,
            "decisions": self._decisions,
            "late_tokens": self._late_tokens,
        }
