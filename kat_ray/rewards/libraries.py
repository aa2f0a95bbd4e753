"""Libraries that some graders need: what a child process that grades with them imports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Library:
    """One of them, and what asks for it."""

    name: str
    extra: str  # ours, that installs it
    field: str  # of the configuration, with the value that needs it
    answers_worth_a_start: int  # so few that a further child, which has to import it first, gains nothing by them


# Both take a second or more to import, and most answers a millisecond to grade.
_LIBRARIES = {
    "math": Library("math-verify", "math", "evaluation.verifier = math", 4),
    "environment": Library("reasoning-gym", "reasoning-gym", "evaluation.verifier = environment", 4),
    "problems": Library("reasoning-gym", "reasoning-gym", "environment.type = reasoning_gym", 4),
}


def library_of(grader: str) -> Library | None:
    """The library that a grader needs, by its name of `serve.load`; None where it needs none of these."""
    return _LIBRARIES.get(grader)


def answers_worth_a_start(grader: str) -> int:
    """Answers for which it pays to start a child with this grader beside others."""
    library = library_of(grader)
    return 1 if library is None else library.answers_worth_a_start
