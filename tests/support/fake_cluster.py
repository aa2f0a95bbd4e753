"""Ray in one process, in virtual time: real actor classes, whose processes are killed, frozen and started anew.

What the control plane may rely on, as Ray 2.60 does it with `max_restarts=-1` and no retries of calls:
- An actor's methods run one at a time in the order in which one caller made the calls; other concurrency groups run
  beside them. A call goes out when all references among its arguments are there, calls before it first; answers
  come back in the order in which they were ready (one connection).
- A process that dies takes with it what it is at, and every object whose owner it is: what it `put`, and the
  results of its calls. Results of its own methods live on. It is started anew, empty, under the same handle. Until
  then a call fails at once; before an actor's first start it waits.
- What a method raises arrives as a RayTaskError that is also an instance of its cause, however far it travelled.
Not modelled: serialisation (records are shared, not copied), resources, the reference counts of objects.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from tests.support.fake_actors import Actor, ActorClass, Ref
from tests.support.fake_calls import Rule
from tests.support.fake_ray import FakeRay
from tests.support.virtual_time import patched


class FakeCluster(FakeRay):
    """The cluster, its seed's schedule, and what is done to it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.draining: set[str] = set()  # actors whose nodes are about to go
        self.unfinished: list[str] = []  # threads that the driver left behind

    def run(self, driver: Callable[[], Any]) -> Any:
        """`driver()` as the driver of this cluster."""

        def work() -> Any:
            try:
                return driver()
            finally:
                left = [t for t in self.scheduler.tasks if t.owner is self.driver]
                self.unfinished = [t.name for t in left]

        patches = [
            (ray, "put", self.put), (ray, "get", self.get), (ray, "wait", self.wait), (ray, "kill", self._ray_kill),
            (ray, "remote", lambda **_: partial(ActorClass, self)), (ray, "is_initialized", lambda: True),
            (os, "getpid", lambda: self.here.pid), (signal, "signal", self._signal),
        ]  # fmt: skip
        with patched(patches):
            return self.scheduler.run(work)

    def when(self, actor: str, method: str, do: Callable[[], Any], nth: int = 1, at: str = "begin") -> None:
        """Have something happen at a method's `nth` call, execution or result; `actor` may name a role."""
        self.rules.append(Rule(actor, method, do, nth, at))

    def delay(self, actor: str, method: str, seconds: float, nth: int = 1, at: str = "send") -> None:
        """Have the `nth` call of a method, or its `answer`, be under way for so long."""
        self.when(actor, method, lambda: seconds, nth, at)

    def after(self, seconds: float, do: Callable[[], Any]) -> None:
        """Have something happen later."""
        self.scheduler.at(self.scheduler.now + seconds, do)

    def kill(self, name: str) -> bool:
        """SIGKILL; False if there is no such process at the moment."""
        actor = self._running(name)
        if actor is None:
            return False
        self._note("kill", name)
        self.die(actor, restart=True)
        return True

    def freeze(self, name: str) -> bool:
        """SIGSTOP, for a process that has started."""
        actor = self._running(name)
        if actor is None or actor.state != "alive" or actor.process is None or actor.process.frozen:
            return False
        self._note("freeze", name)
        self.scheduler.freeze(actor.process)
        return True

    def lose(self, name: str) -> bool:
        """Kill an actor together with its node's objects: what it made that went into the object store is gone."""
        actor = self._running(name)
        if actor is None:
            return False
        self._note("lose", name)
        self.draining.discard(name)
        gone, own = actor.process, actor.process.owned if actor.process else []
        self.die(actor, restart=True)
        for ref in [*self.driver.owned, *own, *(r for a in self.actors if a.process for r in a.process.owned)]:
            if ref.home is gone:
                self.resolve(ref, None, ObjectLostError("00", None, ""))
        return True

    def evict(self, name: str) -> bool:
        """As `lose`, and there is no other place for it."""
        if self._running(name) is None:
            return False
        self.full.add(name)
        return self.lose(name)

    def drain(self, name: str) -> bool:
        """Say that an actor's node is about to go."""
        if name in self.draining or self._running(name) is None:
            return False
        self._note("drain", name)
        self.draining.add(name)
        return True

    def terminate(self) -> bool:
        """SIGTERM to the driver."""
        handler = self.handlers.get(signal.SIGTERM)
        if not callable(handler):
            return False
        self._note("terminate", "driver")
        handler(signal.SIGTERM, None)
        return True

    def make_room(self, name: str) -> bool:
        """There is a place again for an actor that found none."""
        if name not in self.full:
            return False
        self._note("make_room", name)
        self.full.discard(name)
        for actor in self.actors:
            if actor.name == name and actor.state == "restarting":
                self._launch(actor)
        return True

    def names(self, role: str = "") -> list[str]:
        """Actors that have not ended."""
        return [a.name for a in self.actors if a.state != "dead" and a.name.startswith(role)]

    def instances(self, role: str) -> list[tuple[str, Any]]:
        """What stands in the processes of a role."""
        ready = [a.process for a in self.actors if a.process and a.process.alive and a.process.ready]
        return [(p.name, p.instance) for p in ready if p.name.startswith(role) and not p.frozen]

    def _running(self, name: str) -> Actor | None:
        found = [a for a in self.actors if a.name == name and a.process is not None and a.process.alive]
        return found[-1] if found else None


class FakePlacement:
    """`actors.cluster.placement.Placement`, with a place for everybody but those in `cluster.full`."""

    def __init__(self, cluster: FakeCluster, numbers: dict[str, int]) -> None:
        self._cluster = cluster
        self._numbers = dict(numbers)  # of the next replica
        self._places = {role: tuple(f"{role}:{i}" for i in range(count)) for role, count in numbers.items()}

    def places(self, role: str) -> tuple[str, ...]:
        return self._places.get(role, ())

    def options(self, role: str, number: int, place: str, label: str = "") -> dict[str, Any]:
        return {"name": f"kat:{label or role}:{number}", "max_restarts": -1, "place": place}

    def request(self, role: str) -> tuple[str, Ref]:
        place = f"{role}:{self._numbers[role]}"
        self._numbers[role] += 1
        ref = Ref(self._cluster.driver)
        if place not in self._cluster.full:
            self._cluster.after(3.0, lambda: self._cluster.resolve(ref, True, None))
        return place, ref

    def release(self, group: str) -> None:
        for actor in self._cluster.actors:
            if actor.place == group and actor.state != "dead":
                if actor.process is not None and actor.process.alive:
                    self._cluster.die(actor, restart=False)
                else:
                    self._cluster.end(actor, None)
