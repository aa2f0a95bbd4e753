"""Every actor is asked how it is, a few seconds apart; one that hangs is killed, and so becomes one that died."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import ray
from ray.exceptions import ActorDiedError, ObjectLostError, RayActorError

from actors.cluster.handles import Actor, Handle, Ref, remote
from actors.cluster.replica import Replica
from actors.cluster.waiting import death_message, is_for_good, ready
from kat_ray.cluster.hang_policy import HangPolicy
from kat_ray.cluster.heartbeat import HeartbeatReport
from kat_ray.cluster.revival import Unavailable
from kat_ray.config.cluster import ClusterConfig

log = logging.getLogger("kat_ray.health")


def ping(handle: Handle[Actor]) -> Ref[HeartbeatReport]:
    """Ask an actor how it is, beside whatever it works at; returns the reference of its answer."""
    return remote(handle, Actor.health, concurrency_group="health")()


def answer_of(reference: Ref[HeartbeatReport], name: str) -> HeartbeatReport | Unavailable:
    """The answer to a ping that is there."""
    try:
        report: HeartbeatReport = ray.get(reference)
    except ActorDiedError as error:
        return Unavailable(is_for_good(error), death_message(error, f"{name} to come back"))
    except (RayActorError, ObjectLostError):  # the answer of a scorer lies in its node's object store
        return Unavailable()
    return report


class HealthMonitor:
    """Pings the actors of a run and kills those that hang."""

    def __init__(self, limits: ClusterConfig) -> None:
        self._policy = HangPolicy(hang_timeout=limits.hang_timeout, start_timeout=limits.start_timeout)
        self._pings: dict[str, Ref[HeartbeatReport]] = {}

    def check(self, replicas: Iterable[Replica]) -> None:
        """Look at every actor, at most every few seconds. Does not wait."""
        now = time.monotonic()
        if self._policy.is_due(now):
            for replica in replicas:
                self._check(replica, now)

    def _check(self, replica: Replica, now: float) -> None:
        name = replica.name
        pending = self._pings.get(name)
        if pending is None:
            pending = self._pings[name] = ping(replica.handle)
        answered = bool(ready([pending]))
        answer = answer_of(self._pings.pop(name), name) if answered else None
        report = answer if isinstance(answer, HeartbeatReport) else None
        reason = self._policy.check(name, now, report, answered=answered)
        if reason is not None:
            log.warning("%s hangs (%s; cluster.hang_timeout): it is killed and replaced", name, reason)
            self.is_down(replica)
            ray.kill(replica.handle, no_restart=False)

    def is_down(self, replica: Replica) -> None:
        """The actor is gone."""
        self._pings.pop(replica.name, None)
        self._policy.is_down(replica.name, time.monotonic())

    def is_ready(self, replica: Replica) -> None:
        """The actor is back, or gone for good: what was known of it is forgotten."""
        self._pings.pop(replica.name, None)
        self._policy.is_ready(replica.name)

    def down_seconds(self, replica: Replica) -> float:
        """For how long an actor has been gone; 0 where it is there."""
        return self._policy.down_seconds(replica.name, time.monotonic())
