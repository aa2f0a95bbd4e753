"""Threads in virtual time: one runs at any moment, a seed decides which is next, and no clock is waited for.

A task is a function in an OS thread of its own. It holds the baton until it parks: in a sleep, in a wait on a
condition (and so in one on an event, a future or a queue), or where its caller says so. Whoever parks picks the
next task that can run; if none can, the clock moves on to the next timer. So a run is a function of its seed.

Seed 0 is the plain schedule: first come, first served, and no switch that is not needed.
"""

from __future__ import annotations

import _thread
import heapq
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, TypeAlias

START = 1000.0  # of the clock: code that takes 0 for long ago is right, as on any machine
_EPOCH = 1.7e9
_MOST_SWITCHES = 200_000
_MOST_SPINS = 5_000

_wait, _notify, _notify_all = threading.Condition.wait, threading.Condition.notify, threading.Condition.notify_all
_submit, _shutdown = ThreadPoolExecutor.submit, ThreadPoolExecutor.shutdown
_monotonic, _time, _sleep, _thread_time = time.monotonic, time.time, time.sleep, time.thread_time


class Killed(BaseException):
    """Unwinds a task whose process was killed."""


class Stuck(AssertionError):
    """Nothing can run any more, or it never ends."""


class Owner:
    """What tasks belong to; a frozen one's do not run."""

    def __init__(self) -> None:
        self.frozen = False
        self.held: list[Task] = []  # could run, but for the freeze


class Task:
    """A function with a thread, while it runs."""

    __slots__ = ("done", "epoch", "error", "killed", "name", "owner", "parked", "run", "waiters", "worker")

    def __init__(self, name: str, run: Callable[[], Any], owner: Owner) -> None:
        self.name, self.run, self.owner = name, run, owner
        self.worker: _Worker | None = None
        self.parked = self.done = self.killed = False
        self.epoch = 0  # number of the parking: a timer of an earlier one wakes nobody
        self.error: BaseException | None = None  # to be raised where it parks
        self.waiters: Waiters = []  # for its end


Waiters: TypeAlias = list[tuple[Task, int]]  # tasks, each with the number of its parking


class _Worker:
    """An OS thread that runs one task after another; idle ones are kept for the next schedule."""

    idle: ClassVar[list[_Worker]] = []

    def __init__(self, own: bool = True) -> None:
        self.gate = _thread.allocate_lock()
        self.gate.acquire()
        self.job: tuple[Scheduler, Task] | None = None
        # Not `threading.Thread`: starting one waits on a condition.
        self.ident = _thread.start_new_thread(self._work, ()) if own else threading.get_ident()

    def _work(self) -> None:
        while True:
            self.gate.acquire()
            assert self.job is not None
            scheduler, task = self.job
            self.ident = threading.get_ident()
            while True:
                following = scheduler.finish(task)
                if following.worker is not None:
                    break
                task, following.worker = following, self
            self.job = None
            _Worker.idle.append(self)
            following.worker.gate.release()


class Scheduler:
    """The baton, the clock and the seed's choices."""

    def __init__(self, seed: int = 0) -> None:
        self.now = START
        self.random = random.Random(seed) if seed else None
        self.switches = 0
        self._spins = 0  # verbs since the clock last moved
        self.agenda: dict[int, list[Callable[[], Any]]] = {}  # what happens at which switch
        self.tasks: set[Task] = set()
        self._runnable: list[Task] = []
        self._timers: list[tuple[float, int, Callable[[], Any]]] = []
        self._order = itertools.count()
        self._closing = False
        self.main = Task("main", lambda: None, Owner())
        self.current: Task = self.main

    # --- tasks -------------------------------------------------------------------------------------------------

    def run(self, function: Callable[[], Any]) -> Any:
        """`function()` as the main task; all others are unwound at its end."""
        self.main.worker = _Worker(own=False)
        with self._installed():
            try:
                return function()
            finally:
                self._close()

    def spawn(self, name: str, run: Callable[[], Any], owner: Owner) -> Task:
        """A new task, which can run."""
        task = Task(name, run, owner)
        self.tasks.add(task)
        self._ready(task)
        return task

    def at(self, when: float, call: Callable[[], Any]) -> None:
        """Have `call`, which must not park, happen at this time."""
        heapq.heappush(self._timers, (when, next(self._order), call))

    def park(self, until: float | None = None) -> None:
        """Run others until `wake`, or that time."""
        task = self.current
        if task.killed:
            raise Killed
        task.epoch += 1
        task.parked = True
        if until is not None:
            self.at(until, partial(self.wake, task, task.epoch))
        self._pass_on(task)

    def pause(self, chance: float = 0.25) -> None:
        """A moment at which others may run first, at times for long: a busy machine."""
        task = self.current
        if task.killed:
            raise Killed
        self._spins += 1
        if self._spins > _MOST_SPINS:
            self._spins = 0
            raise Stuck(f"{task.name} spins: {_MOST_SPINS} calls of Ray, and none of them waited")
        draw = self.random
        if task.owner.frozen or (draw is not None and draw.random() < chance):
            kind = draw.random() if draw is not None else 0.0
            if kind > 0.8 and draw is not None:
                self.park(self.now + draw.random() * (0.02 if kind < 0.98 else 2.0))
            else:
                task.parked = True
                self.wake(task, task.epoch)
                self._pass_on(task)

    def wake(self, task: Task, epoch: int) -> None:
        """Let a task run that is still parked there."""
        if task.parked and task.epoch == epoch:
            task.parked = False
            self._ready(task)

    def wait_until(self, done: Callable[[], bool], waiters: list[Waiters], until: float | None) -> bool:
        """Park until `done()`; whoever may make it so wakes those in `waiters`. False: it was too late."""
        while not done():
            if until is not None and self.now >= until:
                return False
            own = (self.current, self.current.epoch + 1)
            for listing in waiters:
                listing.append(own)
            self.park(until)
        return True

    def wake_all(self, waiters: Waiters) -> None:
        """Wake whoever is listed, and empty the list."""
        for task, epoch in waiters:
            self.wake(task, epoch)
        waiters.clear()

    def kill(self, task: Task) -> None:
        """Have a task unwind."""
        task.killed = True
        if task.parked or task in task.owner.held:
            task.parked = False
            self._runnable.append(task)
        if task in task.owner.held:
            task.owner.held.remove(task)

    def freeze(self, owner: Owner) -> None:
        """Let none of the owner's tasks run."""
        owner.frozen = True
        owner.held += [t for t in self._runnable if t.owner is owner]
        self._runnable = [t for t in self._runnable if t.owner is not owner]

    def thaw(self, owner: Owner) -> None:
        """Let them run again."""
        owner.frozen = False
        self._runnable += owner.held
        owner.held = []

    def finish(self, task: Task) -> Task:
        """Run a task to its end; returns who has the baton next."""
        try:
            if not task.killed:
                task.run()
        except Killed:
            pass
        except BaseException as error:
            self._fail(error)
        task.done = True
        self.tasks.discard(task)
        self.wake_all(task.waiters)
        following = self._next()
        self.current = following
        return following

    def _ready(self, task: Task) -> None:
        (task.owner.held if task.owner.frozen else self._runnable).append(task)

    def _pass_on(self, task: Task) -> None:
        following = self._next()
        self.current = following
        if following is not task:
            if following.worker is None:
                following.worker = worker = _Worker.idle.pop() if _Worker.idle else _Worker()
                worker.job = (self, following)
            following.worker.gate.release()
            assert task.worker is not None
            task.worker.gate.acquire()
        if task.error is not None:
            error, task.error = task.error, None
            raise error
        if task.killed:
            raise Killed

    def _next(self) -> Task:
        while True:
            self.switches += 1
            self.now += 1e-6  # or a loop that waits for a deadline with no time left would never pass it
            for happening in self.agenda.pop(self.switches, ()) if not self._closing else ():
                happening()
            if self._runnable:
                if self.switches > _MOST_SWITCHES and not self._closing:
                    self._fail(Stuck(f"{self.switches} switches, and no end"))
                many = len(self._runnable)
                return self._runnable.pop(int(self.random.random() * many) if self.random and many > 1 else 0)
            if self._closing:
                return self.main
            if not self._timers:
                self._fail(Stuck("nothing can run: " + ", ".join(sorted(t.name for t in self.tasks))))
                continue
            self._spins = 0
            when, _, call = heapq.heappop(self._timers)
            self.now = max(self.now, when)
            try:
                call()
            except BaseException as error:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """The simulation itself is at fault, or found one: the main task says so."""
        self.main.error = self.main.error or error
        if self.main.parked:
            self.main.parked = False
            self._runnable.append(self.main)

    def _close(self) -> None:
        self._closing = True
        for task in list(self.tasks):
            self.kill(task)
        self.main.error = None
        while self._runnable:
            self._pass_on(self.main)

    # --- what the code under test knows of time and threads ------------------------------------------------------

    def _inside(self) -> bool:
        worker = self.current.worker
        return worker is not None and worker.ident == threading.get_ident()

    @contextmanager
    def _installed(self) -> Iterator[None]:
        patches = [
            (time, "monotonic", lambda: self.now if self._inside() else _monotonic()),
            (time, "time", lambda: _EPOCH + self.now if self._inside() else _time()),
            (time, "thread_time", lambda: 0.0 if self._inside() else _thread_time()),
            (time, "sleep", self._sleep),
            (threading.Condition, "wait", _as_method(self._condition_wait)),
            (threading.Condition, "notify", _as_method(self._notify)),
            (threading.Condition, "notify_all", _as_method(self._notify_all)),
            (ThreadPoolExecutor, "submit", _as_method(self._submit)),
            (ThreadPoolExecutor, "shutdown", _as_method(self._shutdown)),
        ]
        with patched(patches):
            yield

    def _sleep(self, seconds: float) -> None:
        if not self._inside():
            return _sleep(seconds)
        self.park(self.now + seconds)

    def _condition_wait(self, condition: Any, timeout: float | None = None) -> bool:
        if not self._inside():
            return _wait(condition, timeout)
        waiters = condition.__dict__.setdefault("virtual_waiters", [])
        own = (self.current, self.current.epoch + 1, woken := [])
        waiters.append(own)
        saved = condition._release_save()
        try:
            self.park(None if timeout is None else self.now + timeout)
        finally:
            condition._acquire_restore(saved)
            if own in waiters:
                waiters.remove(own)
        return bool(woken)

    def _notify(self, condition: Any, n: int = 1) -> None:
        waiters = condition.__dict__.get("virtual_waiters")
        for task, epoch, woken in [waiters.pop(0) for _ in range(min(n, len(waiters)))] if waiters else ():
            woken.append(True)
            self.wake(task, epoch)
        _notify(condition, n)

    def _notify_all(self, condition: Any) -> None:
        self._notify(condition, 1_000_000)

    def _submit(self, pool: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if not self._inside():
            return _submit(pool, function, *args, **kwargs)
        future: Future[Any] = Future()

        def work() -> None:
            try:
                result = function(*args, **kwargs)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        name = f"{pool._thread_name_prefix}-{len(pool.__dict__.setdefault('virtual_tasks', []))}"
        pool.virtual_tasks.append(self.spawn(name, work, self.current.owner))
        return future

    def _shutdown(self, pool: Any, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if not self._inside():
            return _shutdown(pool, wait, cancel_futures=cancel_futures)
        for task in pool.__dict__.get("virtual_tasks", ()) if wait else ():
            self.wait_until(lambda task=task: task.done, [task.waiters], None)


def _as_method(bound: Callable[..., Any]) -> Callable[..., Any]:
    return lambda own, *args, **kwargs: bound(own, *args, **kwargs)


@contextmanager
def patched(patches: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Attributes replaced inside."""
    before = [(where, name, getattr(where, name)) for where, name, _ in patches]
    for where, name, value in patches:
        setattr(where, name, value)
    try:
        yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)
