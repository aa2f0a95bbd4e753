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

import itertools
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    OwnerDiedError,
    RayError,
    RayTaskError,
)

from kat_ray.errors import StateLost
from tests.support.virtual_time import START, Killed, Owner, Scheduler, Task, patched


class Ref:
    """A result that is there, or will be; `owner` and `home` are the processes that own it and made it."""

    __slots__ = ("done", "error", "futures", "home", "lanes", "owner", "value", "waiters")

    def __init__(self, owner: Process) -> None:
        self.owner, self.home = owner, owner
        self.done, self.value, self.error = False, None, None
        self.waiters: list[tuple[Task, int]] = []
        self.futures: list[Future[Any]] = []
        self.lanes: list[_Lane] = []  # whose next call it is an argument of
        owner.owned.append(self)

    def future(self) -> Future[Any]:
        future: Future[Any] = Future()
        if self.done:
            self._tell(future)
        else:
            self.futures.append(future)
        return future

    def _tell(self, future: Future[Any]) -> None:
        if self.error is None:
            future.set_result(self.value)
        else:
            future.set_exception(_raised(self.error))


class Process(Owner):
    """What an actor runs in, until it dies; or the driver."""

    def __init__(self, name: str, pid: int, actor: Actor | None = None) -> None:
        super().__init__()
        self.name, self.pid, self.actor = name, pid, actor
        self.instance: Any = None
        self.alive, self.ready = True, False
        self.tasks: list[Task] = []
        self.queues: dict[str, deque[_Call]] = {}  # by concurrency group, those that wait for their turn
        self.busy: set[str] = set()
        self.calls: dict[_Call, None] = {}  # without an answer
        self.owned: list[Ref] = []


@dataclass(eq=False)
class _Call:
    lane: _Lane
    actor: Actor
    method: str
    group: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    refs: list[Ref]
    found: list[tuple[Any, RayError | None]] = field(default_factory=list)  # its arguments, once they are fetched

    def fetch(self) -> None:
        """Get hold of the arguments: what is lost later does not matter any more."""
        refs = (a if isinstance(a, Ref) else None for a in self.args)
        pairs = zip(self.args, refs, strict=True)
        self.found = self.found or [(a, None) if r is None else (r.value, r.error) for a, r in pairs]


@dataclass(eq=False)
class _Lane:
    """One caller's calls on one actor, in their order, and the answers, in theirs."""

    waiting: deque[_Call] = field(default_factory=deque)
    last: float = 0.0  # delivery
    last_reply: float = 0.0


class Actor:
    """What stands behind a handle."""

    def __init__(self, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]) -> None:
        self.make = lambda: cls(*args, **kwargs)
        self.methods = {name for name in dir(cls) if not name.startswith("_")}
        self.name: str = options["name"].removeprefix("kat:")
        self.restarts = options.get("max_restarts", 0) != 0
        self.place = options.get("place")
        self.state = "pending"  # or alive, restarting, dead
        self.death: Any = None  # what its constructor raised
        self.process: Process | None = None
        self.launches = 0
        self.first: list[_Call] = []  # calls before it was there


class Handle:
    """What Ray gives for an actor."""

    def __init__(self, cluster: FakeCluster, actor: Actor) -> None:
        self._cluster, self._actor = cluster, actor
        self._actor_id = f"{actor.name}@{id(actor):x}"

    def __getattr__(self, name: str) -> _Method:
        if name not in self._actor.methods:
            raise AttributeError(name)
        return _Method(self, name)

    def __repr__(self) -> str:
        return f"<{self._actor.name}>"


class _Method:
    def __init__(self, handle: Handle, name: str, num_returns: int = 1, concurrency_group: str = "") -> None:
        self._of = (handle, name)
        self._num_returns, self._group = num_returns, concurrency_group

    def options(self, **options: Any) -> _Method:
        return _Method(*self._of, **options)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        handle, name = self._of
        cluster = handle._cluster
        refs = [Ref(cluster.here) for _ in range(self._num_returns)]
        lane = cluster._lanes.setdefault((cluster.here, handle._actor), _Lane())
        cluster._submit(_Call(lane, handle._actor, name, self._group, args, kwargs, refs))
        return refs[0] if self._num_returns == 1 else refs


class _ActorClass:
    def __init__(self, cluster: FakeCluster, cls: type, options: dict[str, Any] | None = None) -> None:
        self._cluster, self._cls, self._options = cluster, cls, options or {}

    def options(self, **options: Any) -> _ActorClass:
        return _ActorClass(self._cluster, self._cls, options)

    def remote(self, *args: Any, **kwargs: Any) -> Handle:
        return self._cluster._make(Actor(self._cls, args, kwargs, self._options))


@dataclass
class Rule:
    """`do` happens when a method of an actor (or any of its role) comes there for the `nth` time."""

    actor: str
    method: str
    do: Callable[[], Any]
    nth: int = 1
    # Of its execution; or its end, before anybody learns of the result; or call, reply. At send and answer, `do`
    # may return how many seconds the message is under way.
    at: str = "begin"
    seen: int = 0


class FakeCluster:
    """The cluster, its seed's schedule, and what is done to it."""

    def __init__(self, seed: int = 0) -> None:
        self.scheduler = Scheduler(seed)
        self.driver = Process("driver", os.getpid())
        self.driver.ready = True
        self.scheduler.main.owner = self.driver
        self.actors: list[Actor] = []
        self.rules: list[Rule] = []
        self.log: list[str] = []  # what was done to it
        self.trace: Callable[[str], Any] | None = None  # takes a line for every call, its execution and its answer
        self.full: set[str] = set()  # actors that find no place
        self.draining: set[str] = set()  # actors whose nodes are about to go
        self.one_node = bool(seed % 2)  # arguments are at hand when a call goes out, not when it is carried out
        self.pings_in_store = False  # a scorer's other results, too: RAY_max_direct_call_object_size = 0 does it
        self.handlers: dict[int, Any] = {}  # of the driver's signals
        self.unfinished: list[str] = []  # threads that the driver left behind
        self._pids = itertools.count(70_001)
        self._lanes: dict[tuple[Process, Actor], _Lane] = {}

    # --- for scenarios -----------------------------------------------------------------------------------------

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
            (ray, "remote", lambda **_: partial(_ActorClass, self)), (ray, "is_initialized", lambda: True),
            (os, "getpid", lambda: self.here.pid), (signal, "signal", self._signal),
        ]  # fmt: skip
        with patched(patches):
            return self.scheduler.run(work)

    @property
    def here(self) -> Process:
        """The process that runs now."""
        owner = self.scheduler.current.owner
        assert isinstance(owner, Process)
        return owner

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
        self._die(actor, restart=True)
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
        self._die(actor, restart=True)
        for ref in [*self.driver.owned, *own, *(r for a in self.actors if a.process for r in a.process.owned)]:
            if ref.home is gone:
                self._resolve(ref, None, ObjectLostError("00", None, ""))
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

    def in_store(self, actor: str, method: str) -> bool:
        """Whether results go to the store of the actor's node: large ones, and all of a process that is told so.

        Others are handed to who called, and are lost with it only.
        """
        return method == "weights" or (actor.startswith("scorer") and (method == "score" or self.pings_in_store))

    def _note(self, what: str, whom: str) -> None:
        self.log.append(f"{self.scheduler.switches}:{what}:{whom}")
        if self.trace is not None:
            self.trace(self._line(f"***   {what} {whom}"))

    def _line(self, text: str) -> str:
        return f"{self.scheduler.switches:5d} {self.scheduler.now - START:8.3f} {self.here.name:10s} {text}"

    def _latency(self) -> float:
        """Of a message: short as a rule, at times longer than all that is waited for."""
        draw = self.scheduler.random
        if draw is None:
            return 0.001
        kind = draw.random()
        return 0.001 if kind < 0.5 else draw.random() * (0.02 if kind < 0.85 else 0.2 if kind < 0.97 else 3.0)

    # --- Ray's verbs -------------------------------------------------------------------------------------------

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
                raise _raised(ref.error)
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
                self._end(actor, None)
            return
        self._die(actor, restart=not no_restart)

    def _signal(self, number: int, handler: Any) -> Any:
        before, self.handlers[number] = self.handlers.get(number, signal.SIG_DFL), handler
        return before

    # --- calls -------------------------------------------------------------------------------------------------

    def _submit(self, call: _Call) -> None:
        self.scheduler.pause(0.1)
        self._happens("call", call)
        if not self.here.alive:
            raise Killed
        call.lane.waiting.append(call)
        self._pump(call.lane)

    def _pump(self, lane: _Lane) -> None:
        """Send what need not wait for its arguments."""
        while lane.waiting:
            missing = [a for a in lane.waiting[0].args if isinstance(a, Ref) and not a.done]
            if missing:
                missing[0].lanes.append(lane)
                return
            call = lane.waiting.popleft()
            if self.one_node:
                call.fetch()
            slow = self._happens("send", call)
            lane.last = max(lane.last, self.scheduler.now + (slow or self._latency()))
            self.scheduler.at(lane.last, partial(self._deliver, call))

    def _deliver(self, call: _Call) -> None:
        actor = call.actor
        if actor.state in ("dead", "restarting"):
            self._refuse(call)
        elif actor.state == "pending":
            actor.first.append(call)
        else:
            process = actor.process
            assert process is not None
            process.calls[call] = None
            process.queues.setdefault(call.group, deque()).append(call)
            if call.group not in process.busy:
                process.busy.add(call.group)
                work = partial(self._work_off, process, call.group)
                process.tasks.append(self.scheduler.spawn(f"{process.name} {call.method}", work, process))

    def _refuse(self, call: _Call) -> None:
        actor = call.actor
        words = f"{actor.name} is being started again"
        died = actor.state == "dead"
        self._answer(call, ActorDiedError(actor.death) if died else ActorUnavailableError(words, None))

    def _work_off(self, process: Process, group: str) -> None:
        queue = process.queues[group]
        while queue:
            call = queue.popleft()
            self._happens("begin", call)
            self.scheduler.pause(0.1)
            result = self._carry_out(process, call)
            self._happens("end", call)
            self.scheduler.pause(0.1)
            slow = self._happens("answer", call)
            call.lane.last_reply = max(call.lane.last_reply, self.scheduler.now + (slow or self._latency()))
            self.scheduler.at(call.lane.last_reply, partial(self._reply, process, call, result))
        process.busy.discard(group)

    def _carry_out(self, process: Process, call: _Call) -> Any:
        try:
            call.fetch()
            for _, error in call.found:
                if error is not None:
                    raise error
            return getattr(process.instance, call.method)(*(value for value, _ in call.found), **call.kwargs)
        except Exception as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            return _Failed(_task_error(call.method, cause))

    def _reply(self, process: Process, call: _Call, result: Any) -> None:
        if process.alive and process.calls.pop(call, 0) is None:
            if self.in_store(process.name, call.method):
                for ref in call.refs:
                    ref.home = process
            self._answer(call, result.error if isinstance(result, _Failed) else None, result)
            self._happens("reply", call)

    def _answer(self, call: _Call, error: RayError | None, result: Any = None) -> None:
        values = result if error is None and len(call.refs) > 1 else [result] * len(call.refs)
        assert len(values) == len(call.refs)
        for ref, value in zip(call.refs, values, strict=True):
            if not ref.done:
                self._resolve(ref, value, error)

    def _resolve(self, ref: Ref, value: Any, error: RayError | None) -> None:
        ref.done, ref.value, ref.error = True, value, error
        self.scheduler.wake_all(ref.waiters)
        for future in ref.futures:
            ref._tell(future)
        ref.futures.clear()
        lanes, ref.lanes = ref.lanes, []
        for lane in lanes:
            self._pump(lane)

    def _happens(self, at: str, call: _Call) -> float:
        if self.trace is not None and at in ("call", "begin", "reply"):
            value = f" -> {_short(call.refs[0])}" if at == "reply" else ""
            self.trace(
                self._line(f"{at:5s} {call.actor.name}.{call.method}({', '.join(map(_short, call.args))}){value}")
            )
        seconds = 0.0
        for rule in self.rules:
            if rule.method == call.method and rule.at == at and f"{call.actor.name}:".startswith(f"{rule.actor}:"):
                rule.seen += 1
                if rule.seen == rule.nth:
                    result = rule.do()
                    seconds = result if isinstance(result, float) else seconds
        return seconds

    # --- lives and deaths --------------------------------------------------------------------------------------

    def _make(self, actor: Actor) -> Handle:
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
                self._end(actor, _task_error("__init__", error))
                return
            process.ready, actor.state = True, "alive"
            first, actor.first = actor.first, []
            for call in first:
                self._deliver(call)

        process.tasks.append(self.scheduler.spawn(f"{actor.name} starts", work, process))

    def _die(self, actor: Actor, restart: bool) -> None:
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
            self._resolve(ref, None, OwnerDiedError("00", None, ""))
        if restart and actor.restarts:
            actor.state = "restarting"
            self._launch(actor)
        else:
            self._end(actor, None)

    def _end(self, actor: Actor, cause: Any) -> None:
        actor.state, actor.death = "dead", cause
        if actor.process is not None:
            actor.process.alive = False
        for call in actor.first:
            self._answer(call, ActorDiedError(cause))
        actor.first.clear()


class _Failed:
    def __init__(self, error: RayTaskError) -> None:
        self.error = error


def _task_error(method: str, cause: BaseException) -> RayTaskError:
    expected = isinstance(cause, (RayError, StateLost))  # told in one line: a trace of each would take long
    trace = repr(cause) if expected else "".join(traceback.format_exception(cause))
    return RayTaskError(method, trace, cause, proctitle="actor", pid=1, ip="127.0.0.1")


def _raised(error: RayError) -> RayError:
    """What arrives, which is made once: a new class each time would take long."""
    if not isinstance(error, RayTaskError):
        return error
    made: RayError = error.__dict__.setdefault("made", None) or error.as_instanceof_cause()
    error.made = made
    return made


def _short(value: Any) -> str:
    if isinstance(value, Ref):
        value = (value.value if value.error is None else value.error) if value.done else ...
    if isinstance(value, RayTaskError):
        return f"RayTaskError({type(value.cause).__name__})"
    if hasattr(value, "rollout_ids") and hasattr(value, "offsets"):
        rows = zip(value.rollout_ids.tolist(), value.start.tolist(), value.offsets[1:].tolist(), strict=True)
        return f"{type(value).__name__}({value.attempt}: {' '.join(f'{i}@{start}' for i, start, _ in rows)})"
    return " ".join(repr(value).split())[:70]


class FakePlacement:
    """`actors.cluster.placement.Placement`, with a place for everybody but those in `cluster.full`."""

    def __init__(self, cluster: FakeCluster, numbers: dict[str, int]) -> None:
        self._cluster = cluster
        self._numbers = dict(numbers)  # of the next replica
        self._places = {role: tuple(f"{role}:{i}" for i in range(count)) for role, count in numbers.items()}

    def places(self, role: str) -> tuple[str, ...]:
        return self._places[role]

    def options(self, role: str, number: int, place: str, label: str = "") -> dict[str, Any]:
        return {"name": f"kat:{label or role}:{number}", "max_restarts": -1, "place": place}

    def request(self, role: str) -> tuple[str, Ref]:
        place = f"{role}:{self._numbers[role]}"
        self._numbers[role] += 1
        ref = Ref(self._cluster.driver)
        if place not in self._cluster.full:
            self._cluster.after(3.0, lambda: self._cluster._resolve(ref, True, None))
        return place, ref

    def release(self, group: str) -> None:
        for actor in self._cluster.actors:
            if actor.place == group and actor.state != "dead":
                if actor.process is not None and actor.process.alive:
                    self._cluster._die(actor, restart=False)
                else:
                    self._cluster._end(actor, None)
