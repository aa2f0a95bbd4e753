"""The rollouts of a step: sampled when their turn comes, or while the step before is learnt (staleness 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from ray.exceptions import ObjectLostError

from actors.cluster.signals import Preempted
from kat_ray.errors import RewardError

Sampling = TypeVar("Sampling")  # under way
Sampled = TypeVar("Sampled")


class Prefetch(Generic[Sampling, Sampled]):
    """Holds at most one step's rollouts: those that are being sampled, or that were sampled ahead."""

    def __init__(
        self,
        start: Callable[[int, Mapping[str, Any]], Sampling],
        finish: Callable[[Sampling], Sampled],
        records_lost: Callable[[int, BaseException], None],
    ) -> None:
        """`start(step, rule_state)` and `finish` sample; `records_lost(step, error)` counts what a node took."""
        self._start, self._finish, self._records_lost = start, finish, records_lost
        self._under_way: tuple[int, Sampling] | None = None
        self._ahead: Sampled | None = None
        self._failed: RewardError | None = None  # of what was sampled ahead

    def get(self, step: int, rule_state: Mapping[str, Any]) -> Sampled:
        """The rollouts of a step that begins with this calibration: those sampled ahead, else sampled now."""
        sampled, self._ahead = self._ahead, None
        if self._failed is not None:
            raise self._failed
        if sampled is None:
            self.start(step, rule_state)
            sampled = self._finished()
        return sampled

    def start(self, step: int, rule_state: Mapping[str, Any]) -> None:
        """Begin to sample a step's rollouts; `wait` or `get` has them."""
        self._under_way = step, self._start(step, rule_state)

    def wait(self) -> bool:
        """Wait for what is sampled ahead, if anything is; False if the run is to stop instead."""
        if self._under_way is None:
            return True
        step, _ = self._under_way
        try:
            self._ahead = self._finished()
        except ObjectLostError as error:  # they are sampled when their turn comes
            self._records_lost(step, error)
            self._under_way = None
        except RewardError as error:  # said when their turn comes: the step that was learnt meanwhile is done first
            self._failed, self._under_way = error, None
        except Preempted:
            return False
        return True

    def cancel(self) -> bool:
        """Forget all of it; whether samplers are still at work on it."""
        at_work, self._under_way, self._ahead = self._under_way is not None, None, None
        self._failed = None
        return at_work

    def _finished(self) -> Sampled:
        assert self._under_way is not None
        sampled = self._finish(self._under_way[1])
        self._under_way = None
        return sampled
