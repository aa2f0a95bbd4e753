"""Answers graded, and what a set of graded answers amounts to.

`integer` (kat_ray.rewards.integers) and `math` read the whole text of an answer. Mathematics is graded in child
processes (kat_ray.rewards.grader_pool): math-verify's own time limit is a signal, which only a main thread can
take, and some expressions (9^9^9) would never end without one, or take all memory.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kat_ray.errors import DataError
from kat_ray.rewards.grader_pool import Check, GraderPool, nothing
from kat_ray.rewards.integers import extract_integer, gold_integer
from kat_ray.rewards.limits import Call, GradingLimits, Outcome, Verdicts, last_line
from kat_ray.rewards.math_grader import as_latex
from kat_ray.types.records import Prompt

log = logging.getLogger("kat_ray.rewards")

Verifier = Literal["integer", "math", "environment"]

# What reads a gold answer, or refuses it, by verifier. One that is not here compares each with itself.
_GOLDS: dict[str, Callable[[str], str]] = {"integer": gold_integer}
_CHECKED = 2000  # different gold answers that are compared with themselves at the start
_PLAIN_RE = re.compile(r"-?[0-9]+(\.[0-9]+)?")  # equals itself without asking


@dataclass(frozen=True)
class EvalResult:
    """One evaluation: `k` answers to each of `problems` problems."""

    avg_at_k: float  # mean accuracy over all answers, 0 to 1
    pass_at_k: float  # share of problems with a right answer among k, 0 to 1
    k: int
    problems: int
    mean_length: float  # tokens of an answer, stop id included
    truncated_share: float  # answers that reached the token limit, 0 to 1
    right: tuple[int, ...] = ()  # right answers to each problem, of k
    ran_out: int = 0  # answers that count as wrong because grading them took too much time or memory
    sets: dict[str, EvalResult] | None = None  # of further held-out sets, and of greedy answers, by name
    errors: int = 0  # answers that count as wrong because grading them failed

    def as_dict(self) -> dict[str, Any]:
        """As JSON; `sets` where there are any."""
        own = {name: value for name, value in vars(self).items() if name != "sets"}
        return own if not self.sets else own | {"sets": {name: part.as_dict() for name, part in self.sets.items()}}


def avg_at_k(correct: Sequence[Sequence[bool]]) -> float:
    """Mean accuracy of a [problems][k] matrix; 0 where it is empty."""
    total = sum(len(row) for row in correct)
    return sum(sum(row) for row in correct) / total if total else 0.0


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k answers drawn without replacement from n, c of them right, hold a right one.

    1 - C(n - c, k) / C(n, k): the unbiased estimator of arXiv 2107.03374.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k: n = {n}, c = {c}, k = {k}: needs 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def grade(
    texts: Sequence[str],
    golds: Sequence[str],
    verifier: Verifier,
    pool: GraderPool,
    within: float | None = None,
    check: Check = nothing,
) -> Verdicts:
    """Whether each text answers with its gold answer. What cannot be read is wrong.

    `integer` looks at a text once, from its beginning to its end, and is graded here. What needs a child process is
    graded in `pool` (`pool_of`), in at most `within` seconds; None: those of its limits. The gold answers of
    `environment` are problems, as JSON (`Prompt.gold`). `check` is as for `GraderPool.ask`.
    """
    assert len(texts) == len(golds), f"{len(texts)} texts, {len(golds)} gold answers"
    if verifier == "integer":
        right = [extract_integer(text) == gold_integer(gold) for text, gold in zip(texts, golds, strict=True)]
        return Verdicts.of(right)
    if verifier == "environment":
        return _scored(texts, golds, pool, within, check)
    return pool.grade(texts, golds, within, check)


def pool_of(verifier: Verifier, limits: GradingLimits | None = None) -> GraderPool:
    """The child processes of a verifier; `integer` starts none."""
    return GraderPool(limits, ("environment",) if verifier == "environment" else ("math",))


def _scored(
    texts: Sequence[str], problems: Sequence[str], pool: GraderPool, within: float | None, check: Check
) -> Verdicts:
    """Scores by what made the problems; 1 alone is right."""
    asked = zip(texts, problems, strict=True)
    calls = [Call("environment", {"problem": problem, "text": text}) for text, problem in asked]
    return Verdicts.by(pool.ask(calls, within, check), scored=True)


def evaluate_answers(
    texts: Sequence[str],
    golds: Sequence[str | None],
    *,
    k: int,
    lengths: Sequence[int],
    finished: Sequence[bool],
    verifier: Verifier,
    limits: GradingLimits | None = None,
    within: float | None = None,
    check: Check = nothing,
    pool: GraderPool | None = None,
) -> EvalResult:
    """Grade k answers to each problem. `texts`, `lengths` (tokens) and `finished` hold problem after problem.

    `finished` is false for an answer that ended at the token limit. `within` bounds the seconds of grading them
    all; `check` is called every second meanwhile, and may raise. `pool` grades in place of one of its own.
    """
    assert len(texts) == len(lengths) == len(finished) == len(golds) * k, "k answers to each problem"
    given = [gold for gold in golds if gold is not None]
    if len(given) < len(golds):
        raise DataError(f"{len(golds) - len(given)} of {len(golds)} held-out problems have no gold answer")
    repeated = [gold for gold in given for _ in range(k)]
    if pool is None:
        with pool_of(verifier, limits) as own:
            verdicts = grade(texts, repeated, verifier, own, within, check)
    else:
        verdicts = grade(texts, repeated, verifier, pool, within, check)
    if raised := verdicts.raised:
        log.warning(
            "%d of %d answers could not be graded and count as wrong; the first: %s",
            len(raised), len(texts), raised[0],
        )  # fmt: skip
    right = verdicts.right
    correct = [right[i : i + k] for i in range(0, len(right), k)]
    passed = sum(pass_at_k(k, sum(row), k) for row in correct)
    return EvalResult(
        avg_at_k=avg_at_k(correct),
        pass_at_k=passed / max(1, len(correct)),
        k=k,
        problems=len(correct),
        mean_length=sum(lengths) / max(1, len(lengths)),
        truncated_share=sum(not f for f in finished) / max(1, len(finished)),
        right=tuple(sum(row) for row in correct),
        ran_out=verdicts.ran_out,
        errors=len(raised),
    )


def check_golds(problems: Sequence[Prompt], verifier: Verifier, limits: GradingLimits | None = None) -> None:
    """Refuse gold answers that no text could match; `DataError` names the first such problem and its answer."""
    for problem in problems:
        if problem.answer is None:
            raise DataError(f"problem {problem.prompt_id} has no gold answer")
    for problem, reason in unmatchable(problems, verifier, limits).items():
        raise DataError(f"problem {problem.prompt_id}: {reason}")


def unmatchable(
    problems: Sequence[Prompt], verifier: Verifier, limits: GradingLimits | None = None
) -> dict[Prompt, str]:
    """The problems whose gold answer no text could match, in their order, each with the reason.

    A mathematical answer is graded against itself; of a large data set the first 2,000 different ones are, as far
    as the time of a step's grading (`limits`) allows. Those of an environment were graded when they were made.
    """
    if verifier == "environment":
        return {}
    if (gold := _GOLDS.get(verifier)) is None:
        answers = list(dict.fromkeys(p.answer for p in problems if p.answer))
        # One at least is asked: that math-verify is missing is said before a run, not in its first step.
        asked = [a for a in answers if not _PLAIN_RE.fullmatch(a)] or answers[:1]
        found = _not_themselves(asked[:_CHECKED], limits)
        return {p: found[p.answer] for p in problems if p.answer in found}
    wrong = {}
    for problem in problems:
        try:
            gold(problem.answer or "")
        except DataError as error:
            wrong[problem] = str(error)
    return wrong


def _not_themselves(golds: Sequence[str], limits: GradingLimits | None) -> dict[str, str]:
    """Of these gold answers, those that math-verify does not find equal to themselves, with the reason."""
    with GraderPool(limits) as pool:
        verdicts = pool.grade([as_latex(gold) for gold in golds], golds)
    reasons = {
        Outcome.WRONG: "math-verify does not find it equal to itself",
        Outcome.RAN_OUT: "comparing it with itself takes too much time or memory (evaluation.grading_seconds, "
        "evaluation.grading_memory_gib)",
    }
    found = {}
    for gold, outcome, reply in zip(golds, verdicts.outcomes, verdicts.replies, strict=True):
        failed = f"comparing it with itself fails ({last_line(reply.error)})" if outcome is Outcome.RAISED else None
        if reason := reasons.get(outcome, failed):
            found[gold] = f"no answer could match the gold answer {gold!r}: {reason}; write it as LaTeX"
    return found
