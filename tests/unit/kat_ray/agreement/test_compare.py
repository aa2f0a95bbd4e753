"""How far two engines are apart, and what is said."""

import numpy as np
import pytest

from kat_ray.agreement.compare import AgreementError, difference, require
from kat_ray.models.tolerance import LogprobDifference

ALLOWED = LogprobDifference(0.05, 0.5)


def rows(*values):
    return [np.array(v, dtype=np.float32) for v in values]


def test_means_and_maxima_are_over_all_tokens_and_the_worst_probe_is_named():
    found = difference(["short", "long"], rows([-1, -2], [-3.0]), rows([-1, -2.5], [-2.0]))
    assert (found.mean, found.largest, found.tokens, found.kind) == (0.5, 1.0, 3, "long")


@pytest.mark.parametrize("broken", [np.nan, -np.inf])
def test_what_is_not_finite_is_infinitely_far(broken):
    found = difference(["one"], rows([broken, -1]), rows([-1, -1]))
    assert found.mean == found.largest == np.inf
    assert not found.within(ALLOWED)


def test_two_sides_must_have_answered_the_same():
    with pytest.raises(ValueError, match="one"):
        difference(["one"], rows([-1, -1]), rows([-1]))
    with pytest.raises(ValueError, match="no tokens"):
        difference([], [], [])


@pytest.mark.parametrize(("gaps", "agrees"), [([0.01] * 20, True), ([0.06] * 20, False), ([0.6, *[0] * 19], False)])
def test_both_bounds_count(gaps, agrees):
    found = difference(["one"], rows(gaps), rows([0.0] * 20))
    if agrees:
        require(found, ALLOWED, "a", "b", "Change c")
        return
    with pytest.raises(AgreementError) as error:
        require(found, ALLOWED, "the sampler", "the learner", "Change c")
    for words in ("the sampler and the learner", "20 tokens", "0.05 and 0.5", "one", "Change c", "check_agreement"):
        assert words in str(error.value)
