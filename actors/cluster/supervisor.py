"""What has to be looked at while anything is waited for: signals, hanging actors, deaths and their number."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from actors.cluster.handles import Actor, R, Ref, remote
from actors.cluster.health import HealthMonitor
from actors.cluster.replica import Replica
from actors.cluster.signals import StopRequest
from actors.cluster.waiting import Limit, last_line, wait, wait_for_start
from kat_ray.cluster.failure_policy import FailurePolicy
from kat_ray.cluster.revival import Revival
from kat_ray.config.cluster import ClusterConfig

log = logging.getLogger("kat_ray.supervisor")


class Supervisor:
    """Knows every actor of a run that was told all it must know, by its process."""

    def __init__(self, limits: ClusterConfig, stop: StopRequest) -> None:
        self.limits = limits
        self._stop = stop
        self._health = HealthMonitor(limits)
        self._failures = FailurePolicy(limits.max_restarts)
        self._pids: dict[Replica, int] = {}
        self._meanwhile: Callable[[], object] | None = None

    @property
    def restarts(self) -> int:
        """Actors lost since the run began."""
        return self._failures.restarts.total()

    def check(self, interruptible: bool = False) -> None:
        """Once a second, whatever is waited for: `Preempted` where the run is to end and may."""
        self._stop.check(interruptible)
        self._health.check(tuple(self._pids))
        do = self._meanwhile
        if interruptible and do is not None:
            with self.meanwhile(None):  # it may wait itself
                do()

    @contextmanager
    def meanwhile(self, do: Callable[[], object] | None) -> Iterator[None]:
        """Once a second while something interruptible is waited for inside, `do` is called."""
        outer, self._meanwhile = self._meanwhile, do
        try:
            yield
        finally:
            self._meanwhile = outer

    def wait(
        self, refs: Sequence[Ref[R]], what: str, limit: str = "step_timeout", interruptible: bool = False
    ) -> list[R]:
        """Results of calls, within `cluster.<limit>`."""
        return wait(refs, what, Limit.of(self.limits, limit), partial(self.check, interruptible))

    def wait_for_start(
        self, calls: Sequence[Callable[[], Ref[R]]], what: str, interruptible: bool = False
    ) -> list[R]:
        """Results of calls on actors that are being started, within `cluster.start_timeout`."""
        check = partial(self._stop.check, interruptible)
        return wait_for_start(calls, what, Limit.of(self.limits, "start_timeout"), check)

    def watch(self, replicas: Iterable[Replica]) -> None:
        """Remember the processes of actors: another one under the same name has to be told everything."""
        watched = list(replicas)
        calls = [remote(r.handle, Actor.health) for r in watched]
        reports = self.wait_for_start(calls, "actors to answer", True)
        for replica, report in zip(watched, reports, strict=True):
            self.is_ready(replica, report.pid)

    def is_ready(self, replica: Replica, pid: int) -> None:
        """A process holds a replica, and is told all it must know."""
        self._pids[replica] = pid
        self._health.is_ready(replica)

    def forget(self, replica: Replica) -> None:
        """A replica is gone for good."""
        self._pids.pop(replica, None)
        self._health.is_ready(replica)

    def lost(self, replica: Replica, error: BaseException) -> None:
        """Count a death; `UserError` if there are too many of one actor within one step."""
        self.count_loss(replica.name, error)

    def count_loss(self, name: str, error: BaseException) -> None:
        """Count the loss of `role:number`, which may be a step's records: `record:12`."""
        reason = last_line(error)
        log.warning("%s was lost (%s)", name, reason)
        self._failures.lost(name, reason)

    def step_done(self) -> None:
        """A step was completed for the first time."""
        self._failures.step_done()

    def begin_revival(self, replica: Replica) -> Revival:
        """What decides how the replica is waited for; it counts as gone from now on."""
        self._health.is_down(replica)
        return Revival(
            replica.name,
            self._pids.get(replica),
            time.monotonic(),
            start_timeout=self.limits.start_timeout,
            hang_timeout=self.limits.hang_timeout,
        )

    def down_seconds(self, replica: Replica) -> float:
        """For how long a replica has been gone; 0 where it is there."""
        return self._health.down_seconds(replica)
