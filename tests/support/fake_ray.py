"""Ray's verbs in one process, and what Ray does with actors' processes."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Sequence
from functools import partial
from typing import Any

from ray.exceptions import ActorDiedError, GetTimeoutError, OwnerDiedError

from tests.support.fake_actors import Actor, Handle, Process, Ref, raised, task_error
from tests.support.fake_calls import Calls


class FakeRay(Calls):
    """`put`, `get`, `wait`, `kill`; actors that are started, die, and are started again."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.driver = Process("driver", os.getpid())
        self.driver.ready = True
        self.scheduler.main.owner = self.driver
        self.actors: list[Actor] = []
        self.log: list[str] = []  # what was done to it
        self.full: set[str] = set()  # actors that find no place
        self.handlers: dict[int, Any] = {}  # of the driver's signals
        self._pids = itertools.count(70_001)

    def put(self, value: Any) -> Ref:
        self.scheduler.pause()
        ref = Ref(self.here)
        ref.done, ref.value = True, value
        return ref

    def get(self, refs: Any, timeout: float | None = None) -> Any:
        self.scheduler.pause()
        listed: Sequence[Ref] = [refs] if isinstance(refs, Ref) else refs
        until = None if timeout is None else self.scheduler.now + timeout
        for ref in listed:
            if not self.scheduler.wait_until(lambda ref=ref: ref.done, [ref.waiters], until):
                raise GetTimeoutError
            if ref.error is not None:
                raise raised(ref.error)
        values = [ref.value for ref in listed]
        return values[0] if isinstance(refs, Ref) else values

    def wait(
        self, refs: Sequence[Ref], *, num_returns: int = 1, timeout: float | None = None, fetch_local: bool = True
    ) -> tuple[list[Ref], list[Ref]]:
        self.scheduler.pause()
        assert len({*refs}) == len(refs) >= num_returns > 0
        until = None if timeout is None else self.scheduler.now + timeout
        enough = lambda: sum(r.done for r in refs) >= num_returns  # noqa: E731
        self.scheduler.wait_until(enough, [r.waiters for r in refs if not r.done], until)
        there = [r for r in refs if r.done][:num_returns]
        return there, [r for r in refs if r not in there]

    def _ray_kill(self, handle: Handle, *, no_restart: bool = True) -> None:
        self.scheduler.pause()
        actor = handle._actor
        if actor.state == "dead":
            return
        self._note("ray.kill", actor.name)
        if actor.process is None or not actor.process.alive:  # not there yet, or not again
            if no_restart:
                self.end(actor, None)
            return
        self.die(actor, restart=not no_restart)

    def _signal(self, number: int, handler: Any) -> Any:
        before, self.handlers[number] = self.handlers.get(number, signal.SIG_DFL), handler
        return before

    def _note(self, what: str, whom: str) -> None:
        self.log.append(f"{self.scheduler.switches}:{what}:{whom}")
        if self.trace is not None:
            self.trace(self._line(f"***   {what} {whom}"))

    # --- lives and deaths --------------------------------------------------------------------------------------

    def make(self, actor: Actor) -> Handle:
        self.actors.append(actor)
        self._launch(actor)
        return Handle(self, actor)

    def _launch(self, actor: Actor) -> None:
        actor.launches += 1
        if actor.name in self.full:
            return
        draw = self.scheduler.random
        seconds = 2.0 if draw is None else draw.uniform(0.5, 5.0)
        self.scheduler.at(self.scheduler.now + seconds, partial(self._construct, actor, actor.launches))

    def _construct(self, actor: Actor, launch: int) -> None:
        if actor.state == "dead" or actor.launches != launch:
            return
        actor.process = process = Process(actor.name, next(self._pids), actor)

        def work() -> None:
            try:
                process.instance = actor.make()
            except Exception as error:
                self.end(actor, task_error("__init__", error))
                return
            process.ready, actor.state = True, "alive"
            first, actor.first = actor.first, []
            for call in first:
                self._deliver(call)

        process.tasks.append(self.scheduler.spawn(f"{actor.name} starts", work, process))

    def die(self, actor: Actor, restart: bool) -> None:
        process = actor.process
        assert process is not None
        process.alive, process.frozen = False, False
        for task in process.tasks:
            if not task.done:
                self.scheduler.kill(task)
        for call in (*process.calls, *actor.first):
            delay = self._latency() + (self.scheduler.random.random() if self.scheduler.random else 0.1)
            self.scheduler.at(self.scheduler.now + delay, partial(self._refuse, call))
        process.calls.clear()
        actor.first.clear()
        for ref in process.owned:
            self.resolve(ref, None, OwnerDiedError("00", None, ""))
        if restart and actor.restarts:
            actor.state = "restarting"
            self._launch(actor)
        else:
            self.end(actor, None)

    def end(self, actor: Actor, cause: Any) -> None:
        actor.state, actor.death = "dead", cause
        if actor.process is not None:
            actor.process.alive = False
        for call in actor.first:
            self._answer(call, ActorDiedError(cause))
        actor.first.clear()
