"""Actors by role: made in their places, called all at once, replaced where they are lost, more of them or fewer."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic

import ray

from actors.cluster.handles import A, Handle, R, Ref
from actors.cluster.placement import Place, Placement
from actors.cluster.replica import Replica
from actors.cluster.revival import ReplicaRevival
from actors.cluster.supervisor import Supervisor
from actors.cluster.waiting import ACTOR_LOST

log = logging.getLogger("kat_ray.actors")

Maker = Callable[[str, dict[str, Any]], Handle[A]]  # name and Ray's options of an actor


class ActorGroup(Generic[A]):
    """The replicas of one role. A replica's number is never given twice."""

    def __init__(
        self,
        role: str,
        supervisor: Supervisor,
        placement: Placement,
        make: Maker[A],
        fewest: int | None = None,
        label: str = "",
    ) -> None:
        """`fewest` replicas are enough; None: all are needed. `label` names the actors instead of the role."""
        self.role, self.supervisor = role, supervisor
        self.replicas: tuple[Replica[A], ...] = ()
        self._placement, self._make, self._fewest, self._label = placement, make, fewest, label
        self._numbers = itertools.count()
        self._retired: list[Replica[A]] = []  # whose last records are still to be learnt

    @property
    def handles(self) -> list[Handle[A]]:
        """The actors, in the order of `replicas`."""
        return [replica.handle for replica in self.replicas]

    def start(self) -> None:
        """Make a replica in every place that was reserved for the role."""
        self.replicas = tuple(self.start_replica(place) for place in self._placement.places(self.role))

    def start_replica(self, place: Place) -> Replica[A]:
        """One more, in this place; it begins to load its model and is not used yet."""
        number = next(self._numbers)
        options = self._placement.options(self.role, number, place, self._label)
        handle = self._make(f"{self._label or self.role}:{number}", options)
        return Replica(self.role, number, handle, place)

    def briefing(self, replica: Replica[A]) -> list[Ref[Any]]:
        """Tell a new process of a replica what it must know; references of its answers."""
        return []

    def call(
        self,
        request: Callable[[int, Handle[A]], Ref[R]],
        what: str,
        *,
        interruptible: bool = False,
        prepare: Callable[[int], None] = lambda _: None,
    ) -> list[R]:
        """`request(i, handle)` on every replica at once; the results in their order.

        Where one was lost it is replaced, or done by another where it is dropped; then `prepare(i)`, and again.
        """
        return [result for _, result in self._call(request, what, interruptible, prepare)]

    def by_replica(self, request: Callable[[Handle[A]], Ref[R]], what: str) -> dict[Replica[A], R]:
        """`request(handle)` on every replica at once; results of those that the group still has at the end."""
        answers = self._call(lambda _, handle: request(handle), what, False, lambda _: None)
        return {replica: result for replica, result in answers if replica in self.replicas}

    def _call(
        self,
        request: Callable[[int, Handle[A]], Ref[R]],
        what: str,
        interruptible: bool,
        prepare: Callable[[int], None],
    ) -> list[tuple[Replica[A], R]]:
        """As `call`, and who answered in the end."""
        results: dict[int, R] = {}
        holders = list(self.replicas)  # of the parts
        refs = {i: request(i, replica.handle) for i, replica in enumerate(holders)}
        while refs:
            errors: dict[int, BaseException] = {}
            for i, ref in refs.items():
                try:
                    (results[i],) = self.supervisor.wait([ref], what, interruptible=interruptible)
                except ACTOR_LOST as error:
                    errors[i] = error
            lost = {holders[i]: error for i, error in errors.items()}
            substitutes = {r: self._replace(r, error, interruptible) for r, error in lost.items()}
            for i in errors:
                holders[i] = substitutes[holders[i]]
                holders[i] = self._prepared(i, holders[i], prepare, interruptible)
            refs = {i: request(i, holders[i].handle) for i in errors}
        return [(holder, results[i]) for i, holder in enumerate(holders)]

    def _replace(self, replica: Replica[A], error: BaseException, interruptible: bool) -> Replica[A]:
        """The replica, once it is back; another one where it was dropped."""
        self.supervisor.lost(replica, error)
        if replica in self.replicas and not self.revive(replica, interruptible):
            self.drop([replica])
        return replica if replica in self.replicas else self.replicas[0]

    def _prepared(
        self, part: int, replica: Replica[A], prepare: Callable[[int], None], interruptible: bool
    ) -> Replica[A]:
        while True:
            try:
                prepare(part)
                return replica
            except ACTOR_LOST as error:
                replica = self._replace(replica, error, interruptible)

    def begin_revival(self, replica: Replica[A]) -> ReplicaRevival:
        """Begin to bring a lost replica back; to be polled."""
        return ReplicaRevival(replica, self.supervisor, self.briefing)

    def revive(self, replica: Replica[A], interruptible: bool = False) -> bool:
        """Wait until a lost replica is back and knows all it must; False once it is no longer needed."""
        revival = self.begin_revival(replica)
        while not revival.poll():
            if replica in self.expendable_lost():
                return False
            if pending := revival.pending:
                ray.wait(pending, num_returns=len(pending), timeout=revival.patience)
            else:
                time.sleep(revival.patience)
            self.supervisor.check(interruptible)
        return True

    def expendable_lost(self) -> list[Replica[A]]:
        """Replicas gone for longer than `cluster.replacement_timeout`, as far as the role can do without them."""
        if self._fewest is None:
            return []
        timeout = self.supervisor.limits.replacement_timeout
        gone = [r for r in self.replicas if self.supervisor.down_seconds(r) > timeout]
        return gone[: max(0, len(self.replicas) - self._fewest)]

    # --- more of them, or fewer; no sampler may be at work ----------------------------------------------------

    def add(self, replica: Replica[A], pid: int) -> None:
        """Use a replica that knows all it must, in the process `pid`."""
        self.replicas = (*self.replicas, replica)
        self.supervisor.is_ready(replica, pid)

    def retire(self, replica: Replica[A]) -> None:
        """Use a replica no more; it lives until `end_retired`, since its records may be needed."""
        self._remove(replica)
        self._retired.append(replica)

    def end_retired(self) -> None:
        """End the replicas that were retired before, and give their places back."""
        for replica in self._retired:
            self._end(replica)
        self._retired.clear()

    def drop(self, replicas: Sequence[Replica[A]]) -> None:
        """Go on without replicas that are lost."""
        for replica in replicas:
            log.warning("%s finds no place any more: the run goes on without it", replica.name)
            self._remove(replica)
            self._end(replica)

    def _remove(self, replica: Replica[A]) -> None:
        self.replicas = tuple(r for r in self.replicas if r is not replica)
        self.supervisor.forget(replica)

    def _end(self, replica: Replica[A]) -> None:
        ray.kill(replica.handle)
        self._placement.release(replica.place)
