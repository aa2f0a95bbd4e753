"""When samplers or scorers should become more or fewer: arithmetic on measured stage times, no Ray.

Two stages make a step's rollouts at the same time, sampling and scoring, the latter by a pool for each teacher, and
the learner waits for the slowest. A pool grows where the learner waits long and it is the busiest; it shrinks where
what would be left of it still idles, or where the learner hardly waits at all. One change at a time, on the same
evidence several steps in a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kat_ray.config.cluster import PoolsConfig


@dataclass(frozen=True)
class StageTimes:
    """One step as its stages saw it; all are shares between 0 and 1.

    `waiting`: of the step, that the learner waited for rollouts. `busy`: by role, of the time from the first token
    to the last decision, that a replica was at work, mean over replicas.
    """

    waiting: float
    busy: Mapping[str, float]

    @classmethod
    def of(cls, *, step: float, waited: float, sampling: float, busy: Mapping[str, float]) -> StageTimes:
        """From seconds: of the step, that the learner waited, of the sampling, and that each role was at work."""
        return cls(
            waiting=min(1.0, waited / step),
            busy={role: min(1.0, seconds / max(sampling, 1e-9)) for role, seconds in busy.items()},
        )


@dataclass(frozen=True)
class Change:
    """One replica more or less of a role, and why."""

    role: str
    by: int
    reason: str


class ScalingPolicy:
    """Counts evidence, step by step."""

    def __init__(self, settings: PoolsConfig, bounds: Mapping[str, tuple[int, int]]) -> None:
        """`bounds` are the fewest and most replicas by role."""
        self._settings, self._bounds = settings, bounds
        self._grow = dict.fromkeys(bounds, 0)  # steps in a row that spoke for it
        self._shrink = dict.fromkeys(bounds, 0)

    def observe(self, times: StageTimes, sizes: Mapping[str, int]) -> Change | None:
        """What one more step says; `sizes` count replicas that were asked for, too."""
        busiest = max(self._bounds, key=lambda role: times.busy[role])
        for role in self._bounds:
            grows, shrinks = self._evidence(role, times, sizes[role], busiest)
            self._grow[role] = self._grow[role] + 1 if grows else 0
            self._shrink[role] = self._shrink[role] + 1 if shrinks else 0
        change = self._due(times, sizes, busiest)
        if change is not None:  # what was measured until now was measured with other sizes
            self._grow, self._shrink = dict.fromkeys(self._bounds, 0), dict.fromkeys(self._bounds, 0)
        return change

    def _evidence(self, role: str, times: StageTimes, size: int, busiest: str) -> tuple[bool, bool]:
        """Whether the step speaks for a larger pool, and for a smaller one."""
        s, (fewest, most) = self._settings, self._bounds[role]
        grows = (
            size < most
            and role == busiest
            and times.waiting >= s.waiting_share
            and times.busy[role] >= s.busy_share
        )
        if size <= fewest:
            return grows, False
        left = size / (size - 1)  # by how much one less is busier
        shrinks = times.busy[role] * left < s.idle_share or times.waiting * left < s.waiting_share / 2
        return grows, shrinks

    def _due(self, times: StageTimes, sizes: Mapping[str, int], busiest: str) -> Change | None:
        s = self._settings
        if self._grow[busiest] >= s.grow_after:
            reason = (
                f"the learner waited {times.waiting:.0%} of the step for rollouts, and {busiest}s were at work "
                f"{times.busy[busiest]:.0%} of that time"
            )
            return Change(busiest, 1, reason)
        idle = [role for role in self._bounds if self._shrink[role] >= s.shrink_after]
        if not idle:
            return None
        role = min(idle, key=lambda r: times.busy[r])
        reason = (
            f"the learner waited {times.waiting:.0%} of the step for rollouts, and {sizes[role]} {role}s were at "
            f"work {times.busy[role]:.0%} of that time"
        )
        return Change(role, -1, reason)


def size_metrics(sizes: Mapping[str, int]) -> dict[str, float]:
    """Replicas at work in the step to come."""
    return {_metric(role, "replicas"): float(size) for role, size in sizes.items()}


def scaling_metrics(pending: Mapping[str, int], times: StageTimes, change: Change | None) -> dict[str, float]:
    """The decision of a step and what it was made from."""
    figures = {"pools/waiting_share": times.waiting}
    for role, count in pending.items():
        figures |= {
            _metric(role, "pending"): float(count),
            _metric(role, "busy_share"): times.busy[role],
            _metric(role, "change"): float(change.by if change is not None and change.role == role else 0),
        }
    return figures


def _metric(role: str, what: str) -> str:
    """`pools/sampler_replicas`; of a named teacher's scorers `pools/scorer_replicas/math`."""
    base, _, name = role.partition("-")
    return f"pools/{base}_{what}" + (f"/{name}" if name else "")
