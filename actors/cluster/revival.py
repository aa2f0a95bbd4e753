"""Bringing a lost replica back without waiting: whoever waits for anything else polls it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ObjectLostError

from actors.cluster.handles import Ref
from actors.cluster.health import answer_of, ping
from actors.cluster.replica import Replica
from actors.cluster.waiting import ACTOR_LOST, LearnersLost, Limit, get, ready
from kat_ray.cluster.heartbeat import HeartbeatReport
from kat_ray.cluster.revival import PAUSE, Revival, Step

if TYPE_CHECKING:
    from actors.cluster.supervisor import Supervisor


class ReplicaRevival:
    """First another process has to answer, then it has to take what it must know: its `briefing`."""

    def __init__(
        self, replica: Replica, supervisor: Supervisor, briefing: Callable[[Replica], Sequence[Ref[Any]]]
    ) -> None:
        """`briefing` calls the new process and returns the references of its answers."""
        self.replica = replica
        self._supervisor, self._briefing = supervisor, briefing
        self._limit = Limit.of(supervisor.limits, "start_timeout")
        self._told: list[Ref[Any]] | None = None  # answers to the briefing
        self._awaited: list[Ref[Any]] = []  # those of them that are not there
        self._told_at = 0.0
        self._begin()

    @property
    def pending(self) -> list[Ref[Any]]:
        """References that this waits for now, none of which was there at the last poll; none while it pauses."""
        return [self._ping] if self._told is None and self._ping is not None else self._awaited

    @property
    def patience(self) -> float:
        """Seconds after which to poll again, though nothing of `pending` is there."""
        return PAUSE if not self.pending else 1.0

    def poll(self) -> bool:
        """Go on as far as possible without waiting; whether the replica is back and knows all it must.

        `UserError` if it does not come back in time, or never will; `LearnersLost` if the weights are gone.
        """
        if self._told is None and not self._has_new_process():
            return False
        assert self._told is not None
        there = set(ready(self._told))
        self._awaited = [ref for ref in self._told if ref not in there]
        if self._awaited:
            if time.monotonic() - self._told_at > self._limit.seconds:
                raise self._limit.error(f"{self.replica.name} to take its weights")
            return False
        try:
            get(self._told, "its weights")
        except ACTOR_LOST as error:
            self._supervisor.lost(self.replica, error)
            self._begin()
            return False
        except ObjectLostError as error:
            raise LearnersLost("the weights were lost with the node that held them") from error
        return True

    def _begin(self) -> None:
        self._told = None
        self._ping: Ref[HeartbeatReport] | None = None
        self._awaited = []
        self._machine: Revival = self._supervisor.begin_revival(self.replica)

    def _has_new_process(self) -> bool:
        answer = None
        if self._ping is not None and ready([self._ping]):
            answer, self._ping = answer_of(self._ping, self.replica.name), None
        step = self._machine.handle(time.monotonic(), answer)
        if step is Step.KILL:
            ray.kill(self.replica.handle, no_restart=False)
            self._ping = None
        elif step is Step.PING:
            self._ping = ping(self.replica.handle)
        elif step is Step.READY:
            assert self._machine.pid is not None
            self._supervisor.is_ready(self.replica, self._machine.pid)
            self._told, self._told_at = list(self._briefing(self.replica)), time.monotonic()
        return step is Step.READY
