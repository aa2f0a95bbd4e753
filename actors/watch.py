"""Waiting, with deadlines: for results, for actors to come back, and for signs that one hangs.

An actor that dies is started anew by Ray under the same handle, empty. One that hangs is killed here, and so
becomes one that died: what recovers from the one recovers from the other.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ObjectLostError, RayActorError, RayTaskError

from kat_ray.config_cluster import ClusterConfig
from kat_ray.errors import Forgotten, UserError
from kat_ray.pulse import Beat

log = logging.getLogger("kat_ray.watch")

# What says that an actor is gone, or is a new process under the old name.
LOST = (RayActorError, Forgotten)
_SLICE = 1.0  # seconds between two looks at everything else while waiting


class Preempted(Exception):
    """The process was told to end (SIGTERM, Ctrl-C) at a moment at which it can be stopped."""


class StopRequest:
    """SIGTERM or a first Ctrl-C: remembered until the run can stop; the second Ctrl-C stops at once."""

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._deadline: float | None = None
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take over the two signals for as long as this lasts."""
        before = {s: signal.signal(s, self._take) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self._deadline = number, time.monotonic() + self._grace

    def check(self, interruptible: bool = True) -> None:
        """Raise `Preempted` if the run is to stop here, `UserError` if it should have stopped long ago."""
        if self._deadline is None:
            return
        if interruptible:
            raise Preempted
        if time.monotonic() > self._deadline:
            raise UserError(
                f"told to end, and {self._grace:g} s later (run.grace_seconds) the step was still not finished: it "
                "is lost, the newest checkpoint is intact"
            )


class Watch:
    """Asks all actors how they are, a few at a time, and kills those that hang."""

    def __init__(self, limits: ClusterConfig, stop: StopRequest) -> None:
        self._limits, self._stop = limits, stop
        self._pings: dict[str, tuple[Any, float]] = {}
        self._down: dict[str, float] = {}  # actors that are being started, and since when
        self._due = 0.0
        self.pids: dict[str, int] = {}  # of the processes that were told all they must know
        self._given_up: set[Any] = set()  # ids of actors that nobody waits for any more

    def check(self, actors: Mapping[str, Any]) -> None:
        """Look at every actor, at most every few seconds."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + min(10.0, self._limits.hang_timeout / 4)
        for name, actor in actors.items():
            self._look(name, actor, now)

    def _look(self, name: str, actor: Any, now: float) -> None:
        ping, since = self._pings.get(name) or (_ping(actor), now)
        self._pings[name] = (ping, since)
        if ray.wait([ping], timeout=0)[0]:
            del self._pings[name]
            try:
                beat: Beat = ray.get(ping)
            except RayActorError:
                self._down.setdefault(name, now)
            else:
                self._down.pop(name, None)
                if beat.stalled > self._limits.hang_timeout:
                    self._kill(name, actor, f"no progress for {beat.stalled:.0f} s in '{beat.task}'")
            return
        limit = self._limits.start_timeout if name in self._down else self._limits.hang_timeout
        if now - since > limit:
            self._kill(name, actor, f"no answer for {now - since:.0f} s")

    def _kill(self, name: str, actor: Any, why: str) -> None:
        log.warning("%s hangs (%s; cluster.hang_timeout): it is killed and replaced", name, why)
        self._pings.pop(name, None)
        self._down[name] = time.monotonic()
        ray.kill(actor, no_restart=False)

    def down(self, name: str) -> float:
        """For how many seconds an actor has been gone; 0 where it is there."""
        return time.monotonic() - self._down[name] if name in self._down else 0.0

    def give_up(self, role: str, index: int, actor: Any) -> None:
        """An actor is gone for good; those of its role behind it move up by one."""
        self._given_up.add(actor._actor_id)
        for book in (self.pids, self._pings, self._down):
            _move_up(book, role, index)

    def until_new(
        self,
        name: str,
        actor: Any,
        unless: Callable[[], bool] = lambda: False,
        interruptible: bool = False,
    ) -> bool:
        """Wait until another process than the one last seen answers; one that still lives is killed.

        False if it is not waited for any more: it was given up, or `unless` says so. `UserError` if it did not come
        back in time, or never will.
        """
        deadline = time.monotonic() + self._limits.start_timeout
        self._down[name] = time.monotonic()
        killed = False
        gone = 0  # answers in a row that it is dead for good
        ping, since = _ping(actor), time.monotonic()
        while actor._actor_id not in self._given_up and not unless():
            self._stop.check(interruptible)
            if time.monotonic() > deadline:
                raise UserError(
                    f"{name} did not come back within {self._limits.start_timeout:g} s (cluster.start_timeout)"
                )
            if not ray.wait([ping], timeout=_SLICE)[0]:
                if time.monotonic() - since < self._limits.hang_timeout:
                    continue
                ray.kill(actor, no_restart=False)
            else:
                beat = _answer(ping)
                if isinstance(beat, Beat) and beat.pid != self.pids.get(name):
                    self._stands(name, beat.pid)
                    return True
                if isinstance(beat, Beat) and not killed:
                    ray.kill(actor, no_restart=False)
                    killed = True
                # A call that was under way when the process died may say so of one that comes back.
                gone = gone + 1 if isinstance(beat, ActorDiedError) else 0
                if isinstance(beat, ActorDiedError) and gone > 1:
                    raise UserError(lost_words(beat, f"{name} to come back"))
                time.sleep(0.2)
            ping, since = _ping(actor), time.monotonic()
        return False

    def _stands(self, name: str, pid: int) -> None:
        self.pids[name] = pid
        self._pings.pop(name, None)
        self._down.pop(name, None)


def _answer(ping: Any) -> Beat | RayActorError:
    try:
        beat: Beat = ray.get(ping)
    except RayActorError as error:
        return error
    return beat


def _move_up(book: dict[str, Any], role: str, index: int) -> None:
    book.pop(f"{role}:{index}", None)
    behind = sorted(i for name in book if name.startswith(f"{role}:") and (i := int(name.split(":")[1])) > index)
    for i in behind:
        book[f"{role}:{i - 1}"] = book.pop(f"{role}:{i}")


def _ping(actor: Any) -> Any:
    return actor.health.options(concurrency_group="health").remote()


def remote_class(cls: Callable[..., Any]) -> Any:
    """A plain class as an actor class that answers `health` while it works."""
    return ray.remote(concurrency_groups={"health": 1})(cls)


def get(refs: Sequence[Any], what: str) -> list[Any]:
    """`ray.get` of results that are there, with errors that say what was waited for.

    What tells of lost actors and records passes through: it can be mended.
    """
    try:
        results: list[Any] = ray.get(list(refs))
    except (*LOST, ObjectLostError):
        raise
    except RayTaskError as error:
        cause: BaseException = error
        while isinstance(cause, RayTaskError):  # from a scorer it comes by way of a monitor and a sampler
            cause = cause.cause
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from error
        if isinstance(cause, OSError):  # a full disk, a directory that cannot be written
            reason = cause.strerror or cause
            raise UserError(f"{what}: {reason}; what was written before is intact") from error
        raise
    return results


def started(
    calls: Sequence[Callable[[], Any]], timeout: float, what: str, check: Callable[[], object] = lambda: None
) -> list[Any]:
    """Results of calls on actors that are being started; one that dies meanwhile is called again.

    `check` is called every second, and may raise.
    """
    deadline = time.monotonic() + timeout
    refs = [call() for call in calls]
    results: list[Any] = []
    for i, call in enumerate(calls):
        while True:
            if not ray.wait([refs[i]], timeout=max(0.0, min(_SLICE, deadline - time.monotonic())))[0]:
                check()
                if time.monotonic() > deadline:
                    raise UserError(f"waited {timeout:g} s for {what}")
                continue
            try:
                results += get([refs[i]], what)
                break
            except RayActorError as error:
                if time.monotonic() > deadline or _is_gone(error):
                    raise UserError(lost_words(error, what)) from error
                log.warning("an actor died while waiting for %s; it is started again", what)
                time.sleep(0.5)
                refs[i] = call()
    return results


def _is_gone(error: RayActorError) -> bool:
    """Whether Ray does not start it again: its constructor raised."""
    return isinstance(error, ActorDiedError)


def lost_words(error: BaseException, what: str) -> str:
    """One line about an actor's death."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "No module named 'kat_ray'" in str(error) or "No module named 'actors'" in str(error):
        return (
            f"an actor died while waiting for {what}: its node lacks the package kat-ray. Use an image built from "
            "docker/Dockerfile for all nodes, or submit a working tree: kat-ray submit"
        )
    return (
        f"an actor died while waiting for {what}: {lines[-1] if lines else type(error).__name__}. "
        "Its output is in Ray's session logs (/tmp/ray/session_latest/logs/worker-*)."
    )


def slices(timeout: float, what: str, limit: str = "step_timeout") -> Iterator[float]:
    """Seconds to wait, again and again; `UserError` once all of them add up to the deadline `cluster.<limit>`."""
    deadline = time.monotonic() + timeout
    while True:
        yield _SLICE
        if time.monotonic() > deadline:
            raise UserError(f"waited {timeout:g} s for {what} (cluster.{limit})")
