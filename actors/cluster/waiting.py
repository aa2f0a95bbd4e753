"""Waiting for what actors answer: one way, with a deadline that names its field."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ray
from ray.exceptions import ActorDiedError, ObjectLostError, RayActorError, RayTaskError

from actors.cluster.handles import R, Ref
from kat_ray.config.cluster import ClusterConfig
from kat_ray.errors import StateLost, UserError

log = logging.getLogger("kat_ray.waiting")

# What says that an actor is gone, or is a new process under the old name.
ACTOR_LOST = (RayActorError, StateLost)
SLICE = 1.0  # seconds between two checks of everything else while waiting
_FEW = 64  # references of which the first that is there is looked at, rather than all after a slice


class LearnersLost(Exception):
    """A learner's rank died, and with it the group: what it learnt since the newest checkpoint is gone.

    So it is where the weights that it published are gone: only it can publish them again.
    """


@dataclass(frozen=True)
class Limit:
    """How long to wait, and the field of the configuration that says so."""

    seconds: float
    field: str

    @classmethod
    def of(cls, cluster: ClusterConfig, name: str) -> Limit:
        """The limit `cluster.<name>`."""
        return cls(getattr(cluster, name), f"cluster.{name}")

    def error(self, what: str) -> UserError:
        """What to raise when it has passed."""
        return UserError(f"waited {self.seconds:g} s for {what} ({self.field})")


def wait(refs: Sequence[Ref[R]], what: str, limit: Limit, check: Callable[[], object]) -> list[R]:
    """The results of all references, in their order. The first that failed ends it at once.

    `check` is called every second, and may raise. What tells of lost actors and records passes through.
    """
    started = checked = time.monotonic()
    results: dict[Ref[R], R] = {}
    left = list(dict.fromkeys(refs))
    while left:
        number = 1 if len(left) <= _FEW else len(left)
        done, left = ray.wait(left, num_returns=number, timeout=SLICE)
        results |= zip(done, get(done, what), strict=True)
        now = time.monotonic()
        if left and now - checked >= SLICE:
            checked = now
            check()
            if now - started > limit.seconds:
                raise limit.error(what)
    return [results[ref] for ref in refs]


def ready(refs: Sequence[Ref[R]]) -> list[Ref[R]]:
    """Those of the references whose results are there, without waiting; Ray's own call refuses none at all."""
    if not refs:
        return []
    there: list[Ref[R]] = ray.wait(list(refs), num_returns=len(refs), timeout=0)[0]
    return there


def get(refs: Sequence[Ref[R]], what: str) -> list[R]:
    """`ray.get` of results that are there, with errors that say what was waited for.

    What tells of lost actors and records passes through: it can be mended.
    """
    try:
        results: list[R] = ray.get(list(refs))
    except (*ACTOR_LOST, ObjectLostError):
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


def wait_for_start(
    calls: Sequence[Callable[[], Ref[R]]], what: str, limit: Limit, check: Callable[[], object] = lambda: None
) -> list[R]:
    """Results of calls on actors that are being started; one that dies meanwhile is called again."""
    deadline = time.monotonic() + limit.seconds
    refs = [call() for call in calls]
    results: list[R] = []
    for i, call in enumerate(calls):
        while True:
            if not ray.wait([refs[i]], timeout=max(0.0, min(SLICE, deadline - time.monotonic())))[0]:
                check()
                if time.monotonic() > deadline:
                    raise limit.error(what)
                continue
            try:
                results += get([refs[i]], what)
                break
            except (RayActorError, ObjectLostError) as error:
                # Ray does not start an actor again whose constructor raised.
                if time.monotonic() > deadline or is_for_good(error):
                    raise UserError(death_message(error, what)) from error
                log.warning("an actor died while waiting for %s; it is started again", what)
                time.sleep(0.5)
                refs[i] = call()
    return results


def is_for_good(error: BaseException) -> bool:
    """Whether Ray says that it does not start an actor again, and why.

    Where a node is lost after a notice that it goes (`drain_node`), calls on its actors fail for seconds with an
    `ActorDiedError` whose last line, the reason, is empty; the actors come back on another node.
    """
    text = str(error)
    known = text != ActorDiedError.BASE_ERROR_MSG and bool(text.rsplit("\n", 1)[-1].strip())
    return isinstance(error, ActorDiedError) and known


def death_message(error: BaseException, what: str) -> str:
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


def last_line(error: BaseException) -> str:
    """The last line of an error's text, or its type."""
    return str(error).splitlines()[-1] if str(error) else type(error).__name__
