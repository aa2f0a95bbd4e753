"""What grading may take, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class GradingLimits:
    """Bounds of child processes that grade answers; see the fields `evaluation.grading_...`."""

    processes: int = 4  # at the same time
    seconds: float = 5.0  # for one answer; most take a millisecond
    total_seconds: float = 60.0  # for all answers of a step
    memory_gib: float = 1.0  # of one process


class Outcome(Enum):
    """Of one answer. Only the first counts as right."""

    RIGHT = "right"
    WRONG = "wrong"
    RAN_OUT = "ran out"  # of its time, or of memory
    NOT_REACHED = "not reached"  # the time of all was over before it, or with it


@dataclass(frozen=True)
class Verdicts:
    """The outcomes of some answers, in their order."""

    outcomes: tuple[Outcome, ...]

    @classmethod
    def of(cls, right: list[bool]) -> Verdicts:
        """Where grading cannot run out of anything."""
        return cls(tuple(Outcome.RIGHT if r else Outcome.WRONG for r in right))

    @property
    def right(self) -> list[bool]:
        """Whether each answer is right; what ran out of time or memory is wrong."""
        return [o is Outcome.RIGHT for o in self.outcomes]

    @property
    def ran_out(self) -> int:
        """Answers that are wrong because time or memory ran out."""
        return sum(o in (Outcome.RAN_OUT, Outcome.NOT_REACHED) for o in self.outcomes)
