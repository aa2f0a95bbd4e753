"""Several child processes that grade mathematics, with a bound on the time that all answers take together."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from kat_ray.rewards.limits import GradingLimits, Outcome, Verdicts
from kat_ray.rewards.math_grader import MathGrader

_WORTH_A_CHILD = 4  # answers; a child takes a second or more to start


class GraderPool:
    """Children are started when they are needed and kept until `close` or the end of a `with` block."""

    def __init__(self, limits: GradingLimits | None = None) -> None:
        self._limits = limits or GradingLimits()
        self._graders: list[MathGrader] = []

    def grade(self, texts: Sequence[str], golds: Sequence[str], within: float | None = None) -> Verdicts:
        """Grade each text against its gold answer, in at most `within` seconds; None: those of a step.

        An answer that is not reached in time is wrong, as is one that takes too long or too much memory.
        """
        assert len(texts) == len(golds), f"{len(texts)} texts, {len(golds)} gold answers"
        end = time.monotonic() + (self._limits.total_seconds if within is None else within)
        found = [Outcome.NOT_REACHED] * len(texts)
        todo = deque(range(len(texts)))

        def work(grader: MathGrader) -> None:
            while (left := end - time.monotonic()) > 0:
                try:
                    i = todo.popleft()
                except IndexError:  # another thread took the last
                    return
                found[i] = grader.grade(texts[i], golds[i], left)

        count = min(self._limits.processes, math.ceil(len(texts) / _WORTH_A_CHILD))
        while len(self._graders) < count:
            self._graders.append(MathGrader(self._limits))
        if count:
            with ThreadPoolExecutor(count, "grader") as threads:
                list(threads.map(work, self._graders[:count]))
        return Verdicts(tuple(found))

    def close(self) -> None:
        """End all children."""
        for grader in self._graders:
            grader.close()

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
