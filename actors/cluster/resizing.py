"""Samplers and scorers that change their number between two steps.

A replica that is to come is asked for as a placement group of its own, which is what an autoscaler sees; nothing
waits for it. It joins between two steps, once it is placed, has loaded its model and holds the current weights. A
replica that is to go gets no more rollouts at once, and ends a step later, when the last records that it made were
learnt. The run goes on without one whose node is gone and for which there is no other place.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError

from actors.cluster.actor_groups import ActorGroup
from actors.cluster.handles import Actor, Loading, Ref, remote
from actors.cluster.placement import Place, Placement
from actors.cluster.replica import Replica
from actors.cluster.run_actors import RunActors
from actors.cluster.waiting import get, last_line, ready
from actors.sampler.student_sampler import StudentSampler
from kat_ray.cluster.scaling_policy import Change, ScalingPolicy, StageTimes, scaling_metrics, size_metrics
from kat_ray.config import Config
from kat_ray.errors import UserError


@dataclass
class _Coming:
    """A replica that was asked for: first its place, then its actor."""

    place: Place
    ready: Ref[Any]  # first that of the place
    since: float
    replica: Replica | None = None


class Resizing:
    """Carries out what the scaling policy decides; does nothing where all of them have a fixed number."""

    def __init__(
        self, config: Config, actors: RunActors, placement: Placement, note: Callable[[str], object]
    ) -> None:
        self._actors, self._placement, self._note = actors, placement, note
        self._groups: dict[str, ActorGroup[Any]] = {"sampler": actors.samplers}
        self._bounds = {"sampler": config.sampler.bounds}
        for group in config.scorer_groups:
            self._groups[group.role], self._bounds[group.role] = actors.teachers[group.name], group.scorer.bounds
        self._is_elastic = any(low < high for low, high in self._bounds.values())
        self._policy = ScalingPolicy(config.pools, self._bounds)
        self._coming: dict[str, _Coming] = {}

    def between_steps(self, times: StageTimes) -> dict[str, float]:
        """Change the numbers on the evidence of the step that has ended; returns `pools/...` metrics.

        No sampler may be at work.
        """
        if not self._is_elastic:
            return size_metrics(self._sizes())
        for group in self._groups.values():
            group.end_retired()
            if lost := group.expendable_lost():
                group.drop(lost)
                self._actors.wire()
        for role in tuple(self._coming):
            self._bring_on(role)
        asked = {role: n + (role in self._coming) for role, n in self._sizes().items()}
        change = self._policy.observe(times, asked)
        if change is not None and change.by > 0 and change.role in self._coming:  # one at a time
            change = None
        if change is not None:
            self._carry_out(change)
        pending = {role: int(role in self._coming) for role in self._groups}
        return size_metrics(self._sizes()) | scaling_metrics(pending, times, change)

    def _sizes(self) -> dict[str, int]:
        return {role: len(group.replicas) for role, group in self._groups.items()}

    def _carry_out(self, change: Change) -> None:
        role = change.role
        if change.by > 0:
            self._note(f"pools: one {role} more than {self._sizes()[role]}: {change.reason}")
            place, ready = self._placement.request(role)
            self._coming[role] = _Coming(place, ready, time.monotonic())
            return
        self._note(f"pools: one {role} less: {change.reason}")
        if role in self._coming:
            self._placement.release(self._coming.pop(role).place)
        else:
            self._groups[role].retire(self._groups[role].replicas[-1])
            self._actors.wire()

    def _bring_on(self, role: str) -> None:
        """Bring a replica on, as far as it goes without waiting."""
        coming, group = self._coming[role], self._groups[role]
        if not ready([coming.ready]):
            return
        try:
            get([coming.ready], f"a new {role} to start")
            if coming.replica is None:
                coming.replica = group.start_replica(coming.place)
                coming.ready = remote(coming.replica.handle, Loading.ready)()
                return
            pid = self._initialise(role, coming.replica)
        except (RayError, UserError) as error:  # of no use: the same evidence will ask for another
            del self._coming[role]
            self._note(f"pools: a new {role} could not start ({last_line(error)})")
            self._placement.release(coming.place)
            return
        del self._coming[role]
        group.add(coming.replica, pid)
        self._actors.wire()
        seconds = time.monotonic() - coming.since
        self._note(f"pools: {len(group.replicas)} {role}s, the last after {seconds:.0f} s")

    def _initialise(self, role: str, replica: Replica) -> int:
        """Give a replica that is ready the current weights; returns its process id."""
        pending: list[Ref[Any]] = [remote(replica.handle, Actor.health)()]
        if role == "sampler" and self._actors.samplers.weights is not None:
            load = remote(replica.handle, StudentSampler.load_weights)
            pending.append(load(self._actors.samplers.weights))
        if role != "sampler":
            pending += self._groups[role].briefing(replica)
        what = f"a new {role} to take its weights"
        report, *_ = self._actors.supervisor.wait(pending, what, limit="hang_timeout")
        return int(report.pid)
