"""What the fake cluster's Ray hands out: handles, references, and what stands behind them.

A call waits in its caller's lane, then in a queue of the actor's process; `tests.support.fake_calls` carries it.
"""

from __future__ import annotations

import traceback
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError, RayTaskError

from kat_ray.errors import StateLost
from tests.support.virtual_time import Owner, Task

if TYPE_CHECKING:
    from tests.support.fake_ray import FakeRay


class Ref:
    """A result that is there, or will be; `owner` and `home` are the processes that own it and made it."""

    __slots__ = ("done", "error", "futures", "home", "lanes", "owner", "value", "waiters")

    def __init__(self, owner: Process) -> None:
        self.owner, self.home = owner, owner
        self.done, self.value, self.error = False, None, None
        self.waiters: list[tuple[Task, int]] = []
        self.futures: list[Future[Any]] = []
        self.lanes: list[Lane] = []  # whose next call it is an argument of
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
            future.set_exception(raised(self.error))


class Process(Owner):
    """What an actor runs in, until it dies; or the driver."""

    def __init__(self, name: str, pid: int, actor: Actor | None = None) -> None:
        super().__init__()
        self.name, self.pid, self.actor = name, pid, actor
        self.instance: Any = None
        self.alive, self.ready = True, False
        self.tasks: list[Task] = []
        self.queues: dict[str, deque[Call]] = {}  # by concurrency group, those that wait for their turn
        self.busy: set[str] = set()
        self.calls: dict[Call, None] = {}  # without an answer
        self.owned: list[Ref] = []


@dataclass(eq=False)
class Call:
    lane: Lane
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
class Lane:
    """One caller's calls on one actor, in their order, and the answers, in theirs."""

    waiting: deque[Call] = field(default_factory=deque)
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
        self.first: list[Call] = []  # calls before it was there


class Handle:
    """What Ray gives for an actor."""

    def __init__(self, cluster: FakeRay, actor: Actor) -> None:
        self._cluster, self._actor = cluster, actor
        self._actor_id = f"{actor.name}@{id(actor):x}"

    def __getattr__(self, name: str) -> Method:
        if name not in self._actor.methods:
            raise AttributeError(name)
        return Method(self, name)

    def __repr__(self) -> str:
        return f"<{self._actor.name}>"


class Method:
    def __init__(self, handle: Handle, name: str, num_returns: int = 1, concurrency_group: str = "") -> None:
        self._of = (handle, name)
        self._num_returns, self._group = num_returns, concurrency_group

    def options(self, **options: Any) -> Method:
        return Method(*self._of, **options)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        handle, name = self._of
        cluster = handle._cluster
        refs = [Ref(cluster.here) for _ in range(self._num_returns)]
        lane = cluster.lanes.setdefault((cluster.here, handle._actor), Lane())
        cluster.submit(Call(lane, handle._actor, name, self._group, args, kwargs, refs))
        return refs[0] if self._num_returns == 1 else refs


class ActorClass:
    def __init__(self, cluster: FakeRay, cls: type, options: dict[str, Any] | None = None) -> None:
        self._cluster, self._cls, self._options = cluster, cls, options or {}

    def options(self, **options: Any) -> ActorClass:
        return ActorClass(self._cluster, self._cls, options)

    def remote(self, *args: Any, **kwargs: Any) -> Handle:
        return self._cluster.make(Actor(self._cls, args, kwargs, self._options))


class Failed:
    def __init__(self, error: RayTaskError) -> None:
        self.error = error


def task_error(method: str, cause: BaseException) -> RayTaskError:
    expected = isinstance(cause, (RayError, StateLost))  # told in one line: a trace of each would take long
    trace = repr(cause) if expected else "".join(traceback.format_exception(cause))
    return RayTaskError(method, trace, cause, proctitle="actor", pid=1, ip="127.0.0.1")


def raised(error: RayError) -> RayError:
    """What arrives, which is made once: a new class each time would take long."""
    if not isinstance(error, RayTaskError):
        return error
    made: RayError = error.__dict__.setdefault("made", None) or error.as_instanceof_cause()
    error.made = made
    return made


def short(value: Any) -> str:
    if isinstance(value, Ref):
        value = (value.value if value.error is None else value.error) if value.done else ...
    if isinstance(value, RayTaskError):
        return f"RayTaskError({type(value.cause).__name__})"
    if hasattr(value, "rollout_ids") and hasattr(value, "offsets"):
        rows = zip(value.rollout_ids.tolist(), value.start.tolist(), value.offsets[1:].tolist(), strict=True)
        return f"{type(value).__name__}({value.attempt}: {' '.join(f'{i}@{start}' for i, start, _ in rows)})"
    return " ".join(repr(value).split())[:70]
