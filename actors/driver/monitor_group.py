"""One trap monitor or several that act as one.

A sampler and all its rollouts belong to one monitor, so a chunk has one place to go to. Each monitor holds the
whole calibration: at the end of a step all of them learn from the rollouts of all, in the order of rollout ids, so
their thresholds are the same to the bit, and those of a single monitor.

A monitor that died is told again what it must know: the calibration at the step's start, and what was scored since.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from actors.cluster.pools import Pools
from actors.cluster.waiting import LOST
from actors.driver.dispatcher import Done
from kat_ray.data.accounting import finished
from kat_ray.types.records import StepEnd, StepStart, StopReason


class MonitorShards:
    """The monitors of a run, and the calibration that they share."""

    def __init__(self, pools: Pools, initial: Mapping[str, Any]) -> None:
        self._pools = pools
        self.state = initial  # of the rule, after the last step that was closed

    def start_step(self, step: int, state: Mapping[str, Any]) -> StepStart:
        """Open a step in all monitors, with this calibration."""
        step_start = self._on_all(lambda _, m: m.start_step.remote(step, (), (), state), lambda _: None)
        assert all(b == step_start[0] for b in step_start), f"monitors disagree: {step_start}"
        return step_start[0]

    def end_step(self, step: int, done: Sequence[Done], state: Mapping[str, Any]) -> StepEnd:
        """Close the step everywhere; the seconds are those of the busiest monitor.

        `state` is the calibration that the step began with.
        """
        own = [[d for d in done if d.monitor == i] for i in range(len(self._pools.monitors))]
        closed: list[StepEnd] = self._on_all(
            lambda i, m: m.close_step.remote([d.order.attempt for d in own[i]]), lambda i: self._tell(i, own[i])
        )
        outcomes = sorted((o for end in closed for o in end.outcomes), key=lambda o: o.rollout_id)
        ended = ray.put([finished(o) for o in outcomes if o.stop_reason is not StopReason.FAILED])

        def begin_again(i: int) -> None:
            self._pools.wait([self._pools.monitors[i].start_step.remote(step, (), (), state)], "the trap monitor")

        learnt = self._on_all(lambda _, m: m.learn.remote(step, ended), begin_again)
        self.state = learnt[0]
        return StepEnd(tuple(outcomes), max(end.busy_seconds for end in closed))

    def _tell(self, index: int, done: Sequence[Done]) -> None:
        """Have a new monitor see all chunks of these attempts, each in its order."""
        monitor = self._pools.monitors[index]
        refs = []
        for d in done:
            order = d.order
            ids, probes = [s.rollout_id for s in order.specs], [s.probe for s in order.specs]
            refs.append(monitor.admit.remote(order.step, order.attempt, ids, probes, order.rule_state))
            refs += [monitor.observe.remote(c.scored) for c in d.report.chunks]
        self._pools.wait(refs, "the trap monitor to see all chunks again")

    def _on_all(self, call: Callable[[int, Any], Any], prepare: Callable[[int], None]) -> list[Any]:
        """`call(i, monitor)` on all at once; where one was lost, `prepare(i)` and again."""
        refs = [call(i, m) for i, m in enumerate(self._pools.monitors)]
        return [self._settled(i, ref, call, prepare) for i, ref in enumerate(refs)]

    def _settled(self, i: int, ref: Any, call: Callable[[int, Any], Any], prepare: Callable[[int], None]) -> Any:
        while True:
            try:
                return self._pools.wait([ref], "the trap monitor")[0]
            except LOST as error:
                self._recover(i, error, prepare)
                ref = call(i, self._pools.monitors[i])

    def _recover(self, i: int, error: BaseException, prepare: Callable[[int], None]) -> None:
        self._pools.note_loss("monitor", i, error)
        while True:
            self._pools.revive_monitor(i)
            try:
                return prepare(i)
            except LOST as again:
                self._pools.note_loss("monitor", i, again)
