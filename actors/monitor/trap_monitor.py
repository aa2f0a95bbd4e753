"""The trap monitor: an actor around the termination rule.

It receives floats per token, never tensors. It decides online which rollouts are cut, and holds the only record
of how rollouts end. Several monitors can share a run's rollouts; see `actors.driver.monitor_group`.

Rollouts are grouped by attempt: those that one sampler was given at once. If the sampler is lost, its rollouts come
again under another number, and late scores of the first attempt are ignored.
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
)
from kat_ray.termination.by_teacher import TeacherRules
from kat_ray.types.records import (
    DEFAULT_TEACHER,
    EngineEnd,
    RolloutOutcome,
    ScoredChunk,
    StepEnd,
    StepStart,
    StopReason,
    TerminationDecision,
)

_CUT = 4  # in `_Attempt.end`, beside the numbers of EngineEnd: the rule ended the rollout
_REASONS = {
    int(EngineEnd.EOS): StopReason.EOS,
    int(EngineEnd.MAX_TOKENS): StopReason.MAX_TOKENS,
    int(EngineEnd.FAILED): StopReason.FAILED,
    _CUT: StopReason.TRAPPED,
}


class _Attempt:
    """The rollouts of an attempt as rows of arrays: `scored` counts the d's received, `end` is set exactly once."""

    def __init__(
        self, rules: TeacherRules, rollout_ids: Sequence[int], probes: Sequence[bool], teachers: Sequence[str]
    ) -> None:
        self.row = {rollout_id: row for row, rollout_id in enumerate(rollout_ids)}
        starts = [RolloutStart(i, probe=p) for i, p in zip(rollout_ids, probes, strict=True)]
        self.teachers = teachers or [DEFAULT_TEACHER] * len(starts)
        self.table = rules.table(starts, self.teachers)
        self.probe = np.asarray(probes, dtype=bool)
        self.scored = np.zeros(len(starts), dtype=np.int64)
        self.end = np.zeros(len(starts), dtype=np.int64)

    def outcome(self, rollout_id: int) -> RolloutOutcome:
        row = self.row[rollout_id]
        state, probe = self.table.tracker_state(row), bool(self.probe[row])
        cut = state.cut if self.end[row] == _CUT else None
        return RolloutOutcome(
            rollout_id=rollout_id,
            stop_reason=_REASONS[int(self.end[row])],
            scored=int(self.scored[row]),
            cut=cut.at if cut else None,
            confirmed=cut.confirmed if cut else None,
            threshold=state.threshold,
            minimum=state.minimum,
            probe=probe,
            would_cut=state.cut.at if probe and state.cut else None,
            weights=None if state.weights is None else np.asarray(state.weights, dtype=np.float32),
            evidence=state.evidence,
            teacher=self.teachers[self.row[rollout_id]],
        )


class TrapMonitor:
    """Calls per step: `start_step`; for each attempt `admit`, then any number of `observe`; `end_step`.

    A monitor that was restarted in between must be given everything again: `admit`, then all chunks scored so far,
    in order.
    """

    def __init__(
        self, termination: TerminationConfig, facts: RunFacts, teachers: Sequence[str] = (DEFAULT_TEACHER,)
    ) -> None:
        """`teachers` are the names of those whose scores rollouts are judged by, each by a rule of its own."""
        label_logs()
        self._termination, self._facts, self._teachers = termination, facts, tuple(teachers)
        self._rules = self._new_rules()
        self._next = 0  # the step that the calibration is good for
        self._step: int | None = None
        self._attempts: dict[int, _Attempt] = {}
        self._late_tokens = 0
        self._decisions = 0
        self._busy_seconds = 0.0
        self._timeline = Timeline()
        self._heartbeat = Heartbeat()

    def _new_rules(self) -> TeacherRules:
        return TeacherRules(self._termination, self._facts, self._teachers)

    def health(self) -> HeartbeatReport:
        return self._heartbeat.read()

    def state(self) -> dict[str, Any]:
        """The calibration, as JSON: what `start_step` and `admit` take."""
        return self._rules.state()

    def start_step(
        self,
        step: int,
        rollout_ids: Sequence[int] = (),
        probes: Sequence[bool] = (),
        state: Mapping[str, Any] | None = None,
    ) -> StepStart:
        """Open a step; returns the threshold and the budget of its rollouts.

        `state` is the calibration to begin with, None for the current one. Rollouts named here are attempt 0, of
        the only teacher; others are added by `admit`.
        """
        open_ = sum(int((a.end == EngineEnd.RUNNING).sum()) for a in self._attempts.values())
        assert state is not None or not open_, f"step {step} starts while {open_} rollouts are open"
        if state is not None and step != self._next:
            self._rules = self._new_rules()
            self._rules.load_state(state)
        self._busy_seconds = 0.0
        self._step, self._next = step, step
        self._attempts = {}
        start = self._rules.start_step(step)
        if rollout_ids:
            self._attempts[0] = _Attempt(self._rules, rollout_ids, probes, ())
        return start

    def admit(
        self,
        step: int,
        attempt: int,
        rollout_ids: Sequence[int],
        probes: Sequence[bool],
        state: Mapping[str, Any] | None = None,
        teachers: Sequence[str] = (),
    ) -> None:
        """Add an attempt's rollouts; an attempt that is known is left as it is.

        `teachers` names who scores each of them; without it the only one does.
        """
        if self._step != step:
            self.start_step(step, state=state)
        if attempt not in self._attempts:
            self._attempts[attempt] = _Attempt(self._rules, rollout_ids, probes, teachers)

    def observe(self, chunk: ScoredChunk) -> TerminationDecision:
        """Take the d's of a chunk; returns the rollouts that the rule has just cut.

        Rows that were seen before are skipped. `StateLost` if the attempt is not known or rows before these are
        missing: `admit` it, and send all its chunks again.
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
        self._late_tokens += int(count[~running].sum())  # scored before the decision arrived
        new = running & (chunk.start >= attempt.scored[rows])  # what starts before that was seen before
        rows, count = rows[new], count[new]
        gap = np.flatnonzero(chunk.start[new] != attempt.scored[rows])
        if len(gap):
            # Scores that a restarted monitor should have seen again were lost: the sampler sends all again.
            raise StateLost(
                f"rollout {chunk.rollout_ids[new][gap[0]]}: a chunk starts at token "
                f"{chunk.start[new][gap[0]]}, but {attempt.scored[rows[gap[0]]]} tokens were scored so far"
            )
        attempt.scored[rows] += count
        tokens = NewTokens(*(getattr(chunk, name) for name in NewTokens._fields))
        cuts, _ = attempt.table.observe(rows, tokens, chunk.offsets[:-1][new], count)
        cut = (cuts >= 0) & ~attempt.probe[rows]
        attempt.end[rows] = np.where(cut, _CUT, chunk.ended[new])
        self._decisions += int(cut.sum())
        decision = TerminationDecision(chunk.rollout_ids[new][cut])
        self._busy_seconds += time.thread_time() - started
        return decision

    def end_step(self) -> StepEnd:
        """Close the step with all attempts, where there is one monitor only, and update the calibration."""
        closed = self.close_step(tuple(self._attempts))
        assert self._step is not None
        self.learn(self._step, [finished(o) for o in closed.outcomes if o.stop_reason is not StopReason.FAILED])
        return closed

    def learn(self, step: int, ended: Sequence[Finished]) -> dict[str, Any]:
        """Update the calibration with *all* rollouts of the step, in the order of rollout ids; returns its state.

        So it depends neither on which rollout ended first nor on which of several monitors saw it. A repeated call
        for the same step changes nothing. `StateLost` if the step is not open.
        """
        if self._next != step + 1:
            if self._step != step:
                raise StateLost(f"step {step} is not open in this monitor")
            self._rules.end_step(ended)
            self._next, self._step = step + 1, None
        return self._rules.state()

    def close_step(self, attempts: Sequence[int]) -> StepEnd:
        """The outcomes of these attempts, by rollout id. All of their rollouts must have ended.

        Other attempts were lost with their samplers. `StateLost` if one of these is not known.
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
        """The spans since the last call."""
        return self._timeline.drain()

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and the current state."""
        return {
            "open_rollouts": sum(len(a.row) for a in self._attempts.values()),
            "calibration_samples": self._rules.samples,
            "decisions": self._decisions,
            "late_tokens": self._late_tokens,
        }
