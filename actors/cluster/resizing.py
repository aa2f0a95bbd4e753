"""Pools that change their size between two steps.

A replica that is to come is asked for as a placement group of its own, which is what an autoscaler sees; nothing
waits for it. It joins between two steps, once it is placed, has loaded its model and holds the current weights. A
replica that is to go gets no more rollouts at once, and ends a step later, when the last records that it made were
learnt. One whose node is gone, and for which there is no other, is done without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup

from actors.cluster.pools import Pools
from actors.cluster.waiting import get
from kat_ray.cluster.scaling_policy import Change, PoolPlanner, pool_metrics, size_metrics, stage_times
from kat_ray.config import Config
from kat_ray.errors import UserError

ROLES = ("sampler", "scorer")


@dataclass
class _Coming:
    """A replica that was asked for: first its place, then its actor."""

    group: PlacementGroup
    ready: Any
    since: float
    actor: Any = None


class ElasticPools:
    """Carries out what the planner decides; does nothing where both pools are of a fixed size."""

    def __init__(self, config: Config, pools: Pools, note: Callable[[str], object]) -> None:
        self._pools, self._note = pools, note
        self._bounds = {"sampler": config.sampler.bounds, "scorer": config.scorer.bounds}
        self._is_elastic = any(low < high for low, high in self._bounds.values())
        self._planner = PoolPlanner(config.pools, self._bounds)
        self._coming: dict[str, _Coming] = {}

    def between_steps(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Change the pools on the evidence of the step that has ended; returns `pools/...` metrics.

        No sampler may be at work.
        """
        if not self._is_elastic:
            return size_metrics(self._sizes())
        self._pools.end_retired()
        self._drop_lost()
        for role in tuple(self._coming):
            self._welcome(role)
        times = stage_times(metrics)
        change = self._planner.look(times, {role: n + (role in self._coming) for role, n in self._sizes().items()})
        if change is not None and change.by > 0 and change.role in self._coming:  # one at a time
            change = None
        if change is not None:
            self._carry_out(change)
        pending = {role: int(role in self._coming) for role in ROLES}
        return size_metrics(self._sizes()) | pool_metrics(pending, times, change)

    def _sizes(self) -> dict[str, int]:
        return {role: len(self._pools.replicas(role)) for role in ROLES}

    def _carry_out(self, change: Change) -> None:
        role = change.role
        if change.by > 0:
            self._note(f"pools: one {role} more than {self._sizes()[role]}: {change.reason}")
            group, ready = self._pools.placement.ask(role)
            self._coming[role] = _Coming(group, ready, time.monotonic())
            return
        self._note(f"pools: one {role} less: {change.reason}")
        if role in self._coming:
            coming = self._coming.pop(role)
            self._pools.placement.forget(coming.group)
        else:
            self._pools.retire(role)

    def _welcome(self, role: str) -> None:
        """Bring a replica on, as far as it goes without waiting."""
        coming = self._coming[role]
        if not ray.wait([coming.ready], timeout=0)[0]:
            return
        try:
            get([coming.ready], f"a new {role} to start")
            if coming.actor is None:
                coming.actor = self._pools.make_spare(role, coming.group)
                coming.ready = coming.actor.ready.remote()
                return
            pid = self._pools.brief(role, coming.actor)
        except (RayError, UserError) as error:  # of no use: what speaks for it will speak again
            del self._coming[role]
            self._note(f"pools: a new {role} could not start ({str(error).splitlines()[-1]})")
            self._pools.placement.forget(coming.group)
            return
        del self._coming[role]
        self._pools.join_pool(role, coming.actor, coming.group, pid)
        self._note(f"pools: {len(self._pools.replicas(role))} {role}s, the last after {_seconds(coming)}")

    def _drop_lost(self) -> None:
        for role in ROLES:
            self._pools.drop(role, self._pools.spare_lost(role))


def _seconds(coming: _Coming) -> str:
    return f"{time.monotonic() - coming.since:.0f} s"
