"""Calls on actors that mypy can check: handles and references that know what they are of.

Ray has types of its own for this (`ray.method`). They have to be declared on every method, and a method that has
them can no longer be called directly, as tests and benchmarks do. `Handle` and `Ref` are names for mypy alone:
behind them are Ray's handles and references, or a test's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from kat_ray.cluster.heartbeat import HeartbeatReport
from kat_ray.observability.timeline import Span


class Actor(Protocol):
    """What an actor of any role answers."""

    def health(self) -> HeartbeatReport: ...

    def spans(self) -> tuple[Span, ...]: ...


class Loading(Actor, Protocol):
    """What samplers and scorers answer beside: once their model is loaded."""

    def ready(self) -> dict[str, Any]: ...


A = TypeVar("A", bound=Actor)
P = ParamSpec("P")
R = TypeVar("R", covariant=True)
First = TypeVar("First")
Second = TypeVar("Second")


class Handle(Generic[A]):
    """Ray's handle of an actor of the class `A`."""


class Ref(Generic[R]):
    """Ray's reference to a result."""


def remote(
    actor: Handle[A], method: Callable[Concatenate[A, P], R], concurrency_group: str | None = None
) -> Callable[P, Ref[R]]:
    """A method of an actor, to be called: `remote(sampler, StudentSampler.generate)(request)`.

    Called it returns at once. Where it is given references, the actor is given their values.
    """
    found: Any = getattr(actor, method.__name__)
    if concurrency_group is not None:
        found = found.options(concurrency_group=concurrency_group)
    call: Callable[P, Ref[R]] = found.remote
    return call


def remote_pair(
    actor: Handle[A], method: Callable[Concatenate[A, P], tuple[First, Second]]
) -> Callable[P, tuple[Ref[First], Ref[Second]]]:
    """As `remote`, of a method whose two results have a reference each."""
    found: Any = getattr(actor, method.__name__)
    call: Callable[P, tuple[Ref[First], Ref[Second]]] = found.options(num_returns=2).remote
    return call
