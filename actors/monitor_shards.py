"""One trap monitor or several that act as one.

A sampler and all its rollouts belong to one monitor, so a chunk has one place to go to. Each monitor holds the
whole calibration: at the end of a step all of them learn from the rollouts of all, in the order of rollout ids, so
their thresholds are the same to the bit, and those of a single monitor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from actors.pools import shard_of, wait
from kat_ray.accounting import finished
from kat_ray.types import RolloutSpec, StepEnd, StepStart, StopReason


class MonitorShards:
    """Handles of the monitors; the position of a rollout among a step's says whose it is."""

    def __init__(self, shards: Sequence[Any]) -> None:
        self._shards = tuple(shards)

    def start_step(self, step: int, specs: Sequence[RolloutSpec], samplers: int) -> StepStart:
        """Register a step's rollouts, of which sampler i of n gets `specs[i::n]`."""
        owned: list[list[RolloutSpec]] = [[] for _ in self._shards]
        for position, spec in enumerate(specs):
            owned[shard_of(position % samplers, len(owned))].append(spec)
        begun: list[StepStart] = wait(
            [
                shard.start_step.remote(step, [s.rollout_id for s in own], [s.probe for s in own])
                for shard, own in zip(self._shards, owned, strict=True)
            ],
            None,
            "the trap monitor",
        )
        assert all(b == begun[0] for b in begun), f"monitors disagree: {begun}"
        return begun[0]

    def end_step(self) -> StepEnd:
        """Close the step everywhere; the seconds are those of the busiest monitor."""
        closed: list[StepEnd]
        if len(self._shards) == 1:
            (only,) = closed = wait([self._shards[0].end_step.remote()], None, "the trap monitor")
            return only
        closed = wait([shard.close_step.remote() for shard in self._shards], None, "the trap monitors")
        outcomes = sorted((o for end in closed for o in end.outcomes), key=lambda o: o.rollout_id)
        ended = ray.put([finished(o) for o in outcomes if o.stop_reason is not StopReason.FAILED])
        wait([shard.learn.remote(ended) for shard in self._shards], None, "the trap monitors")
        return StepEnd(tuple(outcomes), max(end.busy_seconds for end in closed))
