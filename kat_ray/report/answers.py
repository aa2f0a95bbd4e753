"""What rollouts answered, in the words of the run's verifier."""

from __future__ import annotations

from collections.abc import Sequence

from kat_ray.errors import UserError
from kat_ray.rewards.extraction import Reading, extract_answer
from kat_ray.rewards.integers import extract_integer
from kat_ray.rewards.limits import GradingLimits
from kat_ray.rewards.verifiers import Verifier

_TAIL = 60  # characters
_LIMITS = GradingLimits(seconds=1.0)  # an answer is only shown


def answers_of(texts: Sequence[str], verifier: Verifier, reading: Reading = "stated") -> list[str | None]:
    """What the verifier reads as each text's answer, None where it reads none.

    `reading` is an environment's. Without math-verify the last characters of a text stand for a mathematical
    answer.
    """
    if verifier == "integer":
        return [extract_integer(text) for text in texts]
    if verifier == "environment":
        return [extract_answer(text, reading) for text in texts]
    from kat_ray.rewards.math_grader import MathGrader

    try:
        with MathGrader(_LIMITS) as grader:
            return [grader.extract(text) for text in texts]
    except UserError:
        return [_tail(text) for text in texts]


def _tail(text: str) -> str | None:
    text = text.strip()
    return f"…{text[-_TAIL:]}" if len(text) > _TAIL else text or None
