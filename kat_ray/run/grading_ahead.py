"""Rollouts graded while the others of their step are still being sampled.

Nothing depends on when this happens, or on whether it does: what is found of a rollout is used where it ends with
the very tokens that were graded, and else it is graded again. One that a decision cuts after its engine had ended
it is not asked for at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import NamedTuple

from kat_ray.rewards.grader_pool import SLICE, Check
from kat_ray.rewards.limits import Fault, Outcome, Reply


class Ended(NamedTuple):
    """A rollout that its engine has ended."""

    prompt_id: str
    token_ids: Sequence[int]
    text: str = ""


@dataclass(frozen=True)
class Found:
    """What grading a rollout gave: the verdict and its worth, if it has a gold answer, and replies by function."""

    outcome: Outcome | None
    worth: float | None = None
    replies: Mapping[str, Reply] = field(default_factory=dict)
    verifier: Reply | None = None  # of the child that graded it, where one did

    @property
    def is_whole(self) -> bool:
        """Whether nothing was left out for want of time."""
        late = any(reply.fault is Fault.NOT_REACHED for reply in self.replies.values())
        return self.outcome is not Outcome.NOT_REACHED and not late


class _Abandoned(Exception):
    """What is found is of no use any more."""


class GradingAhead:
    """Batches of rollouts, one after the other, in a thread of their own; called from one other thread."""

    def __init__(self, grade: Callable[[Mapping[int, Ended], Check], Mapping[int, Found]]) -> None:
        """`grade(rollouts, check)` is called in the thread, and ends soon after `check` raises."""
        self._grade = grade
        self._thread = ThreadPoolExecutor(1, "grading ahead")
        self._waiting: dict[int, Ended] = {}
        self._running: Future[Mapping[int, Found]] | None = None
        self._batch: dict[int, Ended] = {}  # that is running
        self._found: dict[int, tuple[Ended, Found]] = {}
        self._abandon = False

    def begin(self, rollouts: Mapping[int, Ended]) -> None:
        """Grade these as soon as those before them are done; never waits, and raises nothing."""
        self._waiting |= rollouts
        if self._running is not None and self._running.done() and self._running.exception() is None:
            self._collect()
        if self._running is None and self._waiting:
            self._batch, self._waiting = self._waiting, {}
            self._running = self._thread.submit(self._grade, self._batch, self._check)

    def take(self, rollouts: Mapping[int, Ended], check: Check) -> dict[int, Found]:
        """What was found of rollouts that ended as they were graded, after what is being graded now is done.

        `check` is called every second meanwhile. Nothing is remembered afterwards. Raises what grading raised.
        """
        self._waiting.clear()
        try:
            while self._running is not None and wait([self._running], SLICE).not_done:
                check()
        except BaseException:
            self._end()
            raise
        self._collect()
        found, self._found = self._found, {}
        same = {i: found[i][1] for i, ended in rollouts.items() if i in found and found[i][0] == ended}
        return {i: one for i, one in same.items() if one.is_whole}

    def close(self) -> None:
        """End what is under way."""
        self._end()
        self._thread.shutdown()

    def _collect(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            self._found |= {i: (self._batch[i], one) for i, one in running.result().items()}

    def _end(self) -> None:
        self._abandon = True
        if self._running is not None:
            wait([self._running])
        self._running, self._abandon = None, False

    def _check(self) -> None:
        if self._abandon:
            raise _Abandoned
