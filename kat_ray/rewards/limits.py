"""What grading may take, what is asked of a child process that grades, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


@dataclass(frozen=True)
class GradingLimits:
    """Bounds of child processes that grade answers; see the fields `evaluation.grading_...` and `reward`."""

    processes: int = 4  # at the same time
    seconds: float = 5.0  # for one answer; most take a millisecond
    total_seconds: float = 60.0  # for all answers of a step
    memory_gib: float = 1.0  # of one process
    fields: str = "evaluation.grading_"  # how the names of these fields begin, for messages

    def words(self, field: str) -> str:
        """A field of the configuration and its value: `seconds`, `step_seconds` or `memory_gib`."""
        value = self.total_seconds if field == "step_seconds" else getattr(self, field)
        return f"{self.fields}{field} = {value:g}"


class Outcome(Enum):
    """Of one answer. Only the first counts as right."""

    RIGHT = "right"
    WRONG = "wrong"
    RAN_OUT = "ran out"  # of its time, or of memory
    NOT_REACHED = "not reached"  # the time of all was over before it, or with it


_WORTH = {Outcome.RIGHT: 1.0, Outcome.WRONG: 0.0}


@dataclass(frozen=True)
class Verdicts:
    """The outcomes of some answers, in their order."""

    outcomes: tuple[Outcome, ...]
    scores: tuple[float | None, ...] = ()  # of a verifier that has more than right and wrong to say

    @classmethod
    def of(cls, right: list[bool]) -> Verdicts:
        """Where grading cannot run out of anything."""
        return cls(tuple(Outcome.RIGHT if r else Outcome.WRONG for r in right))

    @property
    def right(self) -> list[bool]:
        """Whether each answer is right; what ran out of time or memory is wrong."""
        return [o is Outcome.RIGHT for o in self.outcomes]

    @property
    def values(self) -> list[float | None]:
        """What each answer is worth: 1 or 0, or its score; None where that was not found out."""
        return [*self.scores] or [_WORTH.get(o) for o in self.outcomes]

    @property
    def ran_out(self) -> int:
        """Answers that are wrong because time or memory ran out."""
        return sum(o in (Outcome.RAN_OUT, Outcome.NOT_REACHED) for o in self.outcomes)


@dataclass(frozen=True)
class Call:
    """One question for a child process: what is to grade, and with what (all of it JSON)."""

    grader: str
    arguments: Mapping[str, Any]


class Fault(Enum):
    """Why a call has no value."""

    RAISED = "raised"  # an exception, or a value that cannot be used; `Reply.error` says which
    TIME = "took too long"
    MEMORY = "took too much memory"
    DIED = "ended its process"
    NOT_REACHED = "not reached"  # the time of all calls was over before it, or with it


@dataclass(frozen=True)
class Reply:
    """What a call gave; `error` is for people, with a traceback where there is one."""

    value: Any = None
    fault: Fault | None = None
    error: str = ""

    @property
    def is_late(self) -> bool:
        """Whether time ran out: that of the call, or that of all."""
        return self.fault in (Fault.TIME, Fault.NOT_REACHED)
