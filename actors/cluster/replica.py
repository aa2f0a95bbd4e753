"""One actor of a role, and an actor class as all roles are made of."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Generic

import ray

from actors.cluster.handles import A, Handle, P
from actors.cluster.placement import Place
from kat_ray.cluster.fatal_errors import fatal_reason
from kat_ray.errors import StateLost

log = logging.getLogger("kat_ray.actors")

_DYING = "_kat_ray_dying"  # attribute of an actor whose process is about to end
_LAST_WORDS = 1.0  # seconds in which the error reaches who called, before the process ends


@dataclass(frozen=True, eq=False)
class Replica(Generic[A]):
    """One actor of a role. Its number is its own for as long as the run lasts, whoever leaves before it."""

    role: str
    number: int
    handle: Handle[A]
    place: Place

    @property
    def name(self) -> str:
        """As in logs and messages: `sampler:0`."""
        return f"{self.role}:{self.number}"


def remote_class(cls: type) -> Any:
    """A plain class as an actor class that answers `health` while it works, and dies of what is fatal."""
    return ray.remote(concurrency_groups={"health": 1})(dies_of_fatal_errors(cls))


def start(cls: Callable[P, A], options: Mapping[str, Any], /, *args: P.args, **kwargs: P.kwargs) -> Handle[A]:
    """An actor of a class, with Ray's options, that is constructed with these arguments."""
    assert isinstance(cls, type)
    handle: Handle[A] = remote_class(cls).options(**options).remote(*args, **kwargs)
    return handle


@functools.lru_cache(maxsize=8)  # the fake cluster's runs make thousands of actors of the same classes
def dies_of_fatal_errors(cls: type) -> type:
    """A class whose process ends where a method raises what `kat_ray.cluster.fatal_errors` calls fatal.

    Who called is told `StateLost` with the reason, and everybody else's calls fail with the process, as if it had
    been killed: Ray starts another. What is raised by the constructor stays an error, as Ray has it: a model that
    does not fit does not fit the next time either.
    """
    methods = {
        name: _guarded(method)
        for name in dir(cls)
        if not name.startswith("_") and isinstance(method := inspect.getattr_static(cls, name), FunctionType)
    }
    own = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), own | methods)


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        while getattr(self, _DYING, False):  # its state is not to be trusted: no answer but the process's end
            time.sleep(_LAST_WORDS)
        try:
            return method(self, *args, **kwargs)
        except Exception as error:  # of any type: the reason may be its cause's
            reason = fatal_reason(error)
            if reason is None:
                raise
            setattr(self, _DYING, True)
            log.exception("this process cannot go on and ends: %s", reason)
            _end_soon()
            raise StateLost(f"its process cannot go on: {reason}") from None

    return call


def _end_soon() -> None:
    """End this process without any clean-up, which could hang in what is broken."""
    timer = threading.Timer(_LAST_WORDS, os._exit, (1,))
    timer.daemon = True
    timer.start()
