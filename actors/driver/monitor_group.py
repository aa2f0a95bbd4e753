"""One trap monitor or several that act as one.

A sampler and all its rollouts belong to one monitor, so a chunk has one place to go to. Each monitor holds the
whole calibration: at the end of a step all of them learn from the rollouts of all, in the order of rollout ids, so
their thresholds are the same to the bit, and those of a single monitor.

A monitor that died is told again what it must know: the calibration at the step's start, and what was scored since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ray

from actors.cluster.actor_groups import ActorGroup
from actors.cluster.handles import Ref, remote
from actors.driver.dispatcher import CompletedRequest
from actors.monitor.trap_monitor import TrapMonitor
from kat_ray.data.accounting import finished
from kat_ray.types.records import RolloutOutcome, StepEnd, StepStart, StopReason


class MonitorGroup:
    """The monitors of a run, and the calibration that they share."""

    def __init__(self, actors: ActorGroup[TrapMonitor], initial: Mapping[str, Any]) -> None:
        self._actors = actors
        self.state = initial  # of the rule, after the last step that was closed

    def start_step(self, step: int, state: Mapping[str, Any]) -> StepStart:
        """Open a step in all monitors, with this calibration."""
        starts = self._actors.call(
            lambda _, monitor: remote(monitor, TrapMonitor.start_step)(step, (), (), state), "the trap monitor"
        )
        assert all(start == starts[0] for start in starts), f"monitors disagree: {starts}"
        return starts[0]

    def close(self, completed: Sequence[CompletedRequest]) -> StepEnd:
        """The outcomes of these requests of the step that is open; the seconds are those of the busiest monitor in
        the step so far. More may follow before `end_step`.
        """
        own = [[c for c in completed if c.monitor == i] for i in range(len(self._actors.replicas))]
        closed = self._actors.call(
            lambda i, monitor: remote(monitor, TrapMonitor.close_step)([c.request.attempt for c in own[i]]),
            "the trap monitor",
            prepare=lambda i: self._replay(i, own[i]),
        )
        outcomes = sorted((o for end in closed for o in end.outcomes), key=lambda o: o.rollout_id)
        return StepEnd(tuple(outcomes), max(end.busy_seconds for end in closed))

    def end_step(self, step: int, outcomes: Sequence[RolloutOutcome], state: Mapping[str, Any]) -> None:
        """Have all monitors learn from all outcomes of the step, in the order of rollout ids.

        `state` is the calibration that the step began with.
        """
        ended = ray.put([finished(o) for o in outcomes if o.stop_reason is not StopReason.FAILED])
        learnt = self._actors.call(
            lambda _, monitor: remote(monitor, TrapMonitor.learn)(step, ended),
            "the trap monitor",
            prepare=partial(self._start_one, step, state),
        )
        self.state = learnt[0]

    def _start_one(self, step: int, state: Mapping[str, Any], index: int) -> None:
        monitor = self._actors.handles[index]
        started = remote(monitor, TrapMonitor.start_step)(step, (), (), state)
        self._actors.supervisor.wait([started], "the trap monitor")

    def _replay(self, index: int, completed: Sequence[CompletedRequest]) -> None:
        """Have a new monitor see all chunks of these requests, each request's in their order."""
        monitor = self._actors.handles[index]
        refs: list[Ref[Any]] = []
        for done in completed:
            request = done.request
            ids, probes = [s.rollout_id for s in request.specs], [s.probe for s in request.specs]
            teachers = [s.teacher for s in request.specs]
            admit, observe = remote(monitor, TrapMonitor.admit), remote(monitor, TrapMonitor.observe)
            refs.append(admit(request.step, request.attempt, ids, probes, request.rule_state, teachers))
            refs += [observe(c.scored) for c in done.report.chunks]
        self._actors.supervisor.wait(refs, "the trap monitor to see all chunks again")
