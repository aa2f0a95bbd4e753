"""What grading may take, what is asked of a child process that grades, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kat_ray.errors import RewardError

LARGEST_REWARD = 1e6  # by size; beyond it the sums and squares of a group would lose, or overflow, what differs


def unusable(value: float) -> str | None:
    """Why a number is no reward, to be said after it; None where it is one."""
    if not math.isfinite(value):
        return "which is no finite number"
    return f"which is beyond {LARGEST_REWARD:,.0f} in size" if abs(value) > LARGEST_REWARD else None


@dataclass(frozen=True)
class GradingLimits:
    """Bounds of child processes that grade answers; see the fields `evaluation.grading_...` and `reward`."""

    processes: int = 4  # at the same time
    seconds: float = 5.0  # for one answer; most take a millisecond
    total_seconds: float = 60.0  # for all answers of a step
    memory_gib: float = 1.0  # of one process
    fields: str = "evaluation.grading_"  # how the names of these fields begin, for messages
    calls_at_once: int = 1  # of an async function, in one process

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
    RAISED = "failed"  # with an exception, or the end of its process; the reply says which


_WORTH = {Outcome.RIGHT: 1.0, Outcome.WRONG: 0.0}


@dataclass(frozen=True)
class Verdicts:
    """The outcomes of some answers, in their order."""

    outcomes: tuple[Outcome, ...]
    scores: tuple[float | None, ...] = ()  # of a verifier that has more than right and wrong to say
    replies: tuple[Reply, ...] = ()  # of child processes, where these graded

    @classmethod
    def of(cls, right: list[bool]) -> Verdicts:
        """Where grading cannot run out of anything."""
        return cls(tuple(Outcome.RIGHT if r else Outcome.WRONG for r in right))

    @classmethod
    def by(cls, replies: Sequence[Reply], scored: bool = False) -> Verdicts:
        """What child processes replied; `scored` where the value says more than right and wrong."""
        scores = tuple(reply.value for reply in replies) if scored else ()
        return cls(tuple(map(outcome_of, replies)), scores, tuple(replies))

    @property
    def right(self) -> list[bool]:
        """Whether each answer is known to be right."""
        return [o is Outcome.RIGHT for o in self.outcomes]

    @property
    def values(self) -> list[float | None]:
        """What each answer is worth: 1 or 0, or its score; None where that was not found out."""
        return [*self.scores] or [_WORTH.get(o) for o in self.outcomes]

    @property
    def ran_out(self) -> int:
        """Answers without a verdict because time or memory ran out."""
        return sum(o in (Outcome.RAN_OUT, Outcome.NOT_REACHED) for o in self.outcomes)

    @property
    def raised(self) -> list[str]:
        """What went wrong with each answer whose grading failed in another way."""
        return [r.error for r in self.replies if outcome_of(r) is Outcome.RAISED]


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


class Again(Enum):
    """How a call is to be asked that has no reply yet."""

    ALONE = "alone"  # it was late, or under way when its process came to its end: others were beside it
    ANYHOW = "anyhow"  # it had not begun


def outcome_of(reply: Reply) -> Outcome:
    """What a child's reply says of an answer; a value of 1 (or True) alone is right."""
    match reply.fault:
        case None:
            return Outcome.RIGHT if reply.value >= 1 else Outcome.WRONG
        case Fault.NOT_REACHED:
            return Outcome.NOT_REACHED
        case Fault.TIME | Fault.MEMORY:
            return Outcome.RAN_OUT
        case Fault.RAISED | Fault.DIED:
            return Outcome.RAISED


def last_line(error: str) -> str:
    """What a traceback says at its end; all of an error that is one line."""
    return error.rpartition("\n")[2]


def no_verdict(outcome: Outcome, reply: Reply | None) -> Reply:
    """As a reply, why a verifier says nothing of an answer; `reply` is that of its child, where there is one."""
    if reply is None:
        return Reply(fault=Fault.TIME, error=f"grading {outcome.value}")
    return Reply(fault=reply.fault, error=f"grading {outcome.value}: {reply.error}")


@dataclass(frozen=True)
class Failures:
    """How many of some answers have no reward because grading them failed, and why the first of them has none."""

    answers: int = 0
    errors: int = 0  # an exception, a value that is no reward, too much memory, the end of a process
    timeouts: int = 0
    first: str = ""  # an exception, where there is one
    raised: bool = False  # whether it is one

    @classmethod
    def of(cls, found: Sequence[Mapping[str, Reply]]) -> Failures:
        """Of each answer's replies, by the name of what was asked."""
        failed = [{n: r for n, r in parts.items() if r.fault is not None} for parts in found]
        failed = [parts for parts in failed if parts]
        if not failed:
            return cls(len(found))
        late = sum(any(reply.is_late for reply in parts.values()) for parts in failed)
        raised = [(n, r) for parts in failed for n, r in parts.items() if r.fault is Fault.RAISED]
        name, reply = (raised or list(failed[0].items()))[0]
        return cls(len(found), len(failed) - late, late, f"the first error, of {name}: {reply.error}", bool(raised))

    def __add__(self, other: Failures) -> Failures:
        """Of both sets of answers."""
        own = self if self.raised or not other.raised else other
        first = own.first or other.first
        return Failures(
            self.answers + other.answers,
            self.errors + other.errors,
            self.timeouts + other.timeouts,
            first,
            self.raised or other.raised,
        )

    @property
    def failed(self) -> int:
        """Answers without a reward."""
        return self.errors + self.timeouts

    @property
    def metrics(self) -> dict[str, float]:
        """Counts of a step."""
        return {"reward/errors": float(self.errors), "reward/timeouts": float(self.timeouts)}

    def check(self, share: float) -> None:
        """`RewardError` where more of a step's answers failed than `share` (`max_error_share`) of them.

        A single one ends no run, however few answers a step has, unless none is allowed.
        """
        if self.failed > (max(1.0, share * self.answers) if share else 0):
            raise RewardError(
                f"{self.failed} of {self.answers} answers of a step could not be rewarded, more than "
                f"reward.max_error_share = {share:g} allows; {self.first}"
            )
