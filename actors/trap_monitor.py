"""The trap monitor: one named actor around the termination rule.

It receives floats, never tensors. It decides online which rollouts are trapped and keeps the only ledger of
how rollouts end. Left out: sharding over several monitors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kat_ray.termination import Finished, RolloutStart, RolloutTracker, TerminationConfig, make_rule
from kat_ray.types import (
    EngineEnd,
    RolloutOutcome,
    ScoredChunk,
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

    def __init__(self, termination: TerminationConfig, seed: int = 0) -> None:
        self._rule = make_rule(termination, seed)
        self._rollouts: dict[int, _Rollout] = {}
        self._late_tokens = 0
        self._decisions = 0

    def start_step(self, step: int, rollout_ids: Sequence[int], probes: Sequence[bool]) -> float | None:
        """Register the rollouts of a step; returns the threshold they all get (nats), None if inactive."""
        assert not self._rollouts, f"step {step} starts while {len(self._rollouts)} rollouts are open"
        self._rule.start_step(step)
        for rollout_id, probe in zip(rollout_ids, probes, strict=True):
            start = RolloutStart(int(rollout_id), bool(probe))
            self._rollouts[start.rollout_id] = _Rollout(self._rule.begin(start), start.probe)
        return self._rule.threshold

    def observe(self, chunk: ScoredChunk) -> TerminationDecision:
        """Take the d's of a chunk; returns the rollouts that are newly confirmed as trapped."""
        newly: list[tuple[int, int, int]] = []
        for i, rollout_id in enumerate(chunk.rollout_ids.tolist()):
            rollout = self._rollouts[rollout_id]
            rows = slice(int(chunk.offsets[i]), int(chunk.offsets[i + 1]))
            d, token_ids = chunk.d[rows].tolist(), chunk.token_ids[rows].tolist()
            if rollout.end is not None:
                self._late_tokens += len(d)  # scored while the decision was on its way
                continue
            if int(chunk.start[i]) != rollout.scored:
                raise ValueError(
                    f"rollout {rollout_id}: a chunk starts at token {chunk.start[i]}, "
                    f"but {rollout.scored} tokens were scored so far"
                )
            rollout.scored += len(d)
            cut = rollout.tracker.observe(d, token_ids)
            if cut is not None and not rollout.probe:
                rollout.close(StopReason.TRAPPED)
                newly.append((rollout_id, cut.at, cut.confirmed))
            elif (end := EngineEnd(int(chunk.ended[i]))) is not EngineEnd.RUNNING:
                rollout.close(_ENDS[end])
        self._decisions += len(newly)
        ids, cuts, confirmed = zip(*newly, strict=True) if newly else ((), (), ())
        return TerminationDecision(
            rollout_ids=np.asarray(ids, dtype=np.int64),
            cut=np.asarray(cuts, dtype=np.int32),
            confirmed=np.asarray(confirmed, dtype=np.int32),
        )

    def end_step(self) -> list[RolloutOutcome]:
        """Close the step: every rollout has ended; outcomes in the order of rollout ids.

        The calibration is fed in that order too, so that it does not depend on who finished first.
        """
        open_ids = [i for i, r in self._rollouts.items() if r.end is None]
        assert not open_ids, f"{len(open_ids)} rollouts have not ended, the first is {open_ids[0]}"
        ordered = sorted(self._rollouts.items())
        outcomes = [_outcome(rollout_id, rollout) for rollout_id, rollout in ordered]
        self._rule.end_step(
            [
                Finished(o.minimum, cut=o.cut is not None, probe=o.probe)
                for o in outcomes
                if o.stop_reason is not StopReason.FAILED
            ]
        )
        self._rollouts.clear()
        return outcomes

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and what is held now."""
        return {
            "open_rollouts": len(self._rollouts),
            "calibration_samples": self._rule.samples,
            "decisions": self._decisions,
            "late_tokens": self._late_tokens,
        }


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
    )
