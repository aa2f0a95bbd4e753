"""When a family of a curriculum goes to another level."""

import numpy as np
import pytest

from kat_ray.config import CurriculumConfig
from kat_ray.data.accounting import FinishedRollout, count_tokens
from kat_ray.run.curriculum import Standing, advanced, answers_by_family
from kat_ray.types.records import RolloutOutcome, StopReason

RULE = CurriculumConfig(levels=3, window=10, success_threshold=0.7, failure_threshold=0.2)


@pytest.mark.parametrize(
    ("before", "answers", "after", "level"),
    [
        (Standing(), (6, 8), Standing(0, 6, 8), None),  # too few to say
        (Standing(0, 6, 8), (1, 2), Standing(1), 1),  # 7 of 10
        (Standing(0, 6, 8), (1, 3), Standing(0), None),  # 7 of 11
        (Standing(1, 0, 0), (24, 24), Standing(2), 2),  # one level at a time
        (Standing(2, 0, 0), (24, 24), Standing(2), None),  # the last
        (Standing(1, 1, 9), (1, 1), Standing(0), 0),  # 2 of 10
        (Standing(0, 0, 0), (0, 10), Standing(0), None),  # the first
    ],
)
def test_by_hand(before, answers, after, level):
    found, moves = advanced(RULE, {"gcd": before, "lcm": Standing(2, 1, 1)}, {"gcd": answers})
    assert found == {"gcd": after, "lcm": Standing(2, 1, 1)}
    assert [move.level for move in moves] == ([] if level is None else [level])


def ended(rollout_id, reason=StopReason.EOS, cut=None):
    outcome = RolloutOutcome(rollout_id, reason, 4, cut, cut, None, None, False, None)
    return FinishedRollout(outcome, np.zeros(4, np.int32), count_tokens(outcome, 4))


def test_an_answer_without_a_verdict_is_none():
    """A slow machine moved levels down: what took too long to grade counted as wrong."""
    rollouts = [ended(0), ended(1), ended(2), ended(3, StopReason.TRAPPED, 2), ended(4, StopReason.FAILED)]
    families = dict.fromkeys(range(5), "gcd")
    assert answers_by_family(rollouts, families, {0: True, 1: False}) == {"gcd": (1, 3)}, (
        "2 is not graded, 3 was cut"
    )
    assert answers_by_family(rollouts[2:3], families, {}) == {}


def test_it_goes_down_only_where_that_is_asked():
    up = RULE.model_copy(update={"failure_threshold": None})
    assert advanced(up, {"gcd": Standing(1)}, {"gcd": (0, 10)}) == ({"gcd": Standing(1)}, [])


def test_what_is_said_of_a_move():
    _, (move,) = advanced(RULE, {}, {"gcd": (9, 12)})
    words = "curriculum, after step 4: gcd goes from level 0 to 1 (of 0 to 2): 9 of its last 12 answers are right"
    assert move.words(4, RULE.levels) == words


def test_thresholds_that_cross_are_refused():
    with pytest.raises(ValueError, match=r"failure_threshold = 0.7: must be below success_threshold = 0.7"):
        CurriculumConfig(levels=2, failure_threshold=0.7)
