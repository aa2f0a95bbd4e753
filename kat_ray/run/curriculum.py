"""How hard the problems of a family are: its level, which moves by the share of answers that are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kat_ray.config import CurriculumConfig
from kat_ray.data.accounting import FinishedRollout
from kat_ray.types.records import StopReason


class Standing(NamedTuple):
    """Of a family between two steps."""

    level: int = 0
    right: int = 0  # answers since its level was last looked at
    answers: int = 0


@dataclass(frozen=True)
class Move:
    """A family that goes to another level."""

    family: str
    standing: Standing  # that it is moved for
    level: int

    def words(self, done: int, levels: int) -> str:
        """For the log, after so many steps."""
        before, right, answers = self.standing
        return (
            f"curriculum, after step {done}: {self.family} goes from level {before} to {self.level} (of 0 to "
            f"{levels - 1}): {right} of its last {answers} answers are right"
        )


def advanced(
    curriculum: CurriculumConfig, standings: Mapping[str, Standing], answers: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, Standing], list[Move]]:
    """The standings after a step, and who moved; `answers` are (right, all) of each family in the step.

    A level is looked at when `window` answers to it are there, and its count begins again whatever comes of it: so
    a move rests on answers at the level that it leaves.
    """
    found, moves = dict(standings), []
    for family, (right, count) in answers.items():
        before = found.get(family, Standing())
        now = Standing(before.level, before.right + right, before.answers + count)
        if now.answers >= curriculum.window:
            level = _level(curriculum, now)
            if level != now.level:
                moves.append(Move(family, now, level))
            now = Standing(level)
        found[family] = now
    return found, moves


def answers_by_family(
    rollouts: Sequence[FinishedRollout], families: Mapping[int, str], correct: Mapping[int, bool]
) -> dict[str, tuple[int, int]]:
    """Right answers and all of them, of each family that has any; both mappings are by rollout id.

    What an engine gave up is no answer, nor is one without a verdict: a slow machine says nothing of how hard a
    problem is. What a rule cut is an answer that is not right.
    """
    found: dict[str, tuple[int, int]] = {}
    for rollout in rollouts:
        outcome, passed = rollout.outcome, correct.get(rollout.rollout_id)
        if outcome.stop_reason is StopReason.FAILED or (outcome.cut is None and passed is None):
            continue
        right, count = found.get(families[rollout.rollout_id], (0, 0))
        found[families[rollout.rollout_id]] = right + bool(passed), count + 1
    return found


def _level(curriculum: CurriculumConfig, standing: Standing) -> int:
    share, bound = standing.right / standing.answers, curriculum.failure_threshold
    if share >= curriculum.success_threshold:
        return min(standing.level + 1, curriculum.levels - 1)
    if bound is not None and share <= bound:
        return max(standing.level - 1, 0)
    return standing.level
