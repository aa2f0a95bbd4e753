"""Several child processes that grade, with a bound on the time that all answers take together."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType

from kat_ray.rewards.child import START_SECONDS, GradingChild
from kat_ray.rewards.libraries import answers_worth_a_start
from kat_ray.rewards.limits import Call, Fault, GradingLimits, Reply, Verdicts
from kat_ray.rewards.math_grader import question

SLICE = 1.0  # seconds between two checks of everything else while waiting

Check = Callable[[], object]


def nothing() -> None:
    """There is nothing to look at while waiting."""


class GraderPool:
    """Children are started when they are needed and kept until `close` or the end of a `with` block."""

    def __init__(
        self, limits: GradingLimits | None = None, graders: Sequence[str] = ("math",), pattern: str = ""
    ) -> None:
        """`graders` and `pattern` as for `GradingChild`."""
        self._limits = limits or GradingLimits()
        self._graders, self._pattern = tuple(graders), pattern
        self._worth_a_child = max(map(answers_worth_a_start, self._graders), default=1)
        self._children: list[GradingChild] = []
        self._free = threading.Lock()  # steps are graded in a thread, evaluations in another, each child by one

    def grade(
        self, texts: Sequence[str], golds: Sequence[str], within: float | None = None, check: Check = nothing
    ) -> Verdicts:
        """Grade each text's mathematics against its gold answer; `within` and `check` as for `ask`.

        There is no verdict on an answer that is not reached in time, takes too long or too much memory, or fails.
        """
        assert len(texts) == len(golds), f"{len(texts)} texts, {len(golds)} gold answers"
        asked = [question(text, gold) for text, gold in zip(texts, golds, strict=True)]
        return Verdicts.by(self.ask(asked, within, check))

    def ask(self, calls: Sequence[Call], within: float | None = None, check: Check = nothing) -> list[Reply]:
        """The replies to all calls, in their order, in at most `within` seconds; None: those of a step.

        `check` is called every second meanwhile. What it raises ends the calls, with their processes.
        """
        end = time.monotonic() + (self._limits.total_seconds if within is None else within)
        late = Reply(fault=Fault.NOT_REACHED, error=f"not reached within {self._limits.words('step_seconds')}")
        replies = [late] * len(calls)
        todo = deque(range(len(calls)))

        def work(child: GradingChild) -> None:
            while (left := end - time.monotonic()) > 0:
                try:
                    i = todo.popleft()
                except IndexError:  # another thread took the last
                    return
                replies[i] = child.ask(calls[i], left)

        if calls:
            self._on_each(self._of(len(calls)), work, check, todo)
        return replies

    def start(self, calls: int, check: Check = nothing) -> None:
        """Wait until the children that so many calls get are ready; `UserError` where one cannot be."""
        self._on_each(self._of(calls), lambda child: child.start(START_SECONDS), check, deque())

    def _on_each(
        self,
        children: Sequence[GradingChild],
        work: Callable[[GradingChild], object],
        check: Check,
        todo: deque[int],
    ) -> None:
        """Do the work with all children at the same time, each in a thread that takes from `todo`."""
        while not self._free.acquire(timeout=SLICE):
            check()
        try:
            self._with_each(children, work, check, todo)
        finally:
            self._free.release()

    @staticmethod
    def _with_each(
        children: Sequence[GradingChild],
        work: Callable[[GradingChild], object],
        check: Check,
        todo: deque[int],
    ) -> None:
        with ThreadPoolExecutor(len(children), "grader") as threads:
            left = {threads.submit(work, child) for child in children}
            while left:
                done, left = wait(left, SLICE)
                try:
                    for future in done:
                        future.result()
                    if left:
                        check()
                except BaseException:
                    todo.clear()
                    while wait(left, SLICE / 10).not_done:
                        for child in children:
                            child.interrupt()
                    for child in children:  # killed ones among them that nothing was asked of
                        child.close()
                    raise

    def _of(self, calls: int) -> list[GradingChild]:
        count = max(1, min(self._limits.processes, math.ceil(calls / self._worth_a_child)))
        while len(self._children) < count:
            self._children.append(GradingChild(self._limits, self._graders, self._pattern))
        return self._children[:count]

    def close(self) -> None:
        """End all children."""
        for child in self._children:
            child.close()

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
