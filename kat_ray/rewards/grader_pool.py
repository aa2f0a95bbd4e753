"""Several child processes that grade, with a bound on the time that all answers take together."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType

from kat_ray.rewards.child import START_SECONDS, GradingChild
from kat_ray.rewards.libraries import answers_worth_a_start
from kat_ray.rewards.limits import Again, Call, Fault, GradingLimits, Reply, Verdicts
from kat_ray.rewards.math_grader import question

_FAILURES = 3  # batches that were broken off, after which calls are made one after the other
SLICE = 1.0  # seconds between two checks of everything else while waiting

Check = Callable[[], object]


def nothing() -> None:
    """There is nothing to look at while waiting."""


class _Todo:
    """Which of some calls are still to be asked; several threads take from it."""

    def __init__(self, calls: Sequence[Call] = (), children: int = 1, at_once: int = 1, end: float = 0.0) -> None:
        self._calls, self._children, self._at_once, self._end = calls, children, at_once, end
        self._most = math.ceil(len(calls) / children)  # for one child at once: none shall be without
        self._left = deque(range(len(calls)))
        self._alone: set[int] = set()
        self._asked = 0  # calls that a thread has taken and not brought back
        self._failures = 0
        self._changed = threading.Condition()

    def wait(self) -> bool:
        """Whether there is something to take, once there is; False when all is done, or time is over."""
        with self._changed:
            while not self._left and self._asked and (left := self._end - time.monotonic()) > 0:
                self._changed.wait(left)
            return bool(self._left) and time.monotonic() < self._end

    def take(self, together: Container[str]) -> list[int]:
        """The next call; of graders of `together` as many as one child should get; nothing where none is left."""
        with self._changed:
            taken = self._next(together)
            self._asked += len(taken)
            return taken

    def _next(self, together: Container[str]) -> list[int]:
        if not self._left:
            return []
        first = self._left.popleft()
        grader = self._calls[first].grader
        at_once = self._at_once if self._failures < _FAILURES else 1
        if at_once == 1 or grader not in together or first in self._alone:
            return [first]
        others = [i for i in self._left if self._calls[i].grader == grader and i not in self._alone]
        # Half of a child's share, so that one that is slow gets fewer in the end.
        half = math.ceil((len(others) + 1) / (2 * self._children))
        more = others[: min(max(at_once, half), self._most) - 1]
        taken = set(more)
        self._left = deque(i for i in self._left if i not in taken)
        return [first, *more]

    def bring_back(self, answers: Mapping[int, Reply | Again]) -> dict[int, Reply]:
        """What a thread found of all that it took: what is to be asked again is left, the rest returned."""
        again = {i: answer for i, answer in answers.items() if isinstance(answer, Again)}
        with self._changed:
            self._asked -= len(answers)
            if self._end:
                self._left.extend(again)
                self._alone.update(i for i, how in again.items() if how is Again.ALONE)
                self._failures += Again.ANYHOW in again.values()
            self._changed.notify_all()
        return {i: answer for i, answer in answers.items() if isinstance(answer, Reply)}

    def end(self) -> None:
        """Nothing is to be asked any more."""
        with self._changed:
            self._end = 0.0
            self._left.clear()
            self._changed.notify_all()


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
        if not calls:
            return []
        end = time.monotonic() + (self._limits.total_seconds if within is None else within)
        late = Reply(fault=Fault.NOT_REACHED, error=f"not reached within {self._limits.words('step_seconds')}")
        replies = [late] * len(calls)
        children = self._of(len(calls))
        todo = _Todo(calls, len(children), self._limits.calls_at_once, end)

        def work(child: GradingChild) -> None:
            while todo.wait() and child.start(end - time.monotonic()):
                if not (taken := todo.take(child.together)):  # another thread was quicker
                    continue
                asked, left = [calls[i] for i in taken], end - time.monotonic()
                answers = [child.ask(asked[0], left)] if len(taken) == 1 else child.ask_together(asked, left)
                for i, reply in todo.bring_back(dict(zip(taken, answers, strict=True))).items():
                    replies[i] = reply

        self._on_each(children, work, check, todo)
        return replies

    def start(self, calls: int, check: Check = nothing) -> None:
        """Wait until the children that so many calls get are ready; `UserError` where one cannot be."""
        self._on_each(self._of(calls), lambda child: child.start(START_SECONDS), check, _Todo())

    def _on_each(
        self,
        children: Sequence[GradingChild],
        work: Callable[[GradingChild], object],
        check: Check,
        todo: _Todo,
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
        todo: _Todo,
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
                    todo.end()
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
