"""Intervals of one model's accuracy: values by hand, and how often they hold the truth."""

import numpy as np
import pytest

from kat_ray.analysis.bootstrap import bootstrap
from kat_ray.analysis.intervals import accuracy_interval, wilson


def test_wilsons_interval_by_hand():
    # z^2 = 3.8415. 0 of 10: high = z^2 / (n + z^2). 5 of 10: 0.5 -+ z / (1 + z^2 / n) sqrt(0.025 + z^2 / 400).
    assert wilson(0.0, 10) == pytest.approx((0.0, 3.841459 / 13.841459), abs=1e-6)
    assert wilson(0.5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    assert wilson(1.0, 10)[1] == pytest.approx(1.0) and wilson(0.3, 0) == (0.0, 1.0)


def test_with_one_answer_or_without_spread_it_is_wilsons_else_the_bootstraps():
    assert accuracy_interval((1, 0, 1, 1), 1) == wilson(0.75, 4)
    assert accuracy_interval((2, 2, 2), 4) == wilson(0.5, 3), "no more trials than problems"
    found = bootstrap(np.array([[0.0, 1.0, 0.5, 0.75]]))
    assert accuracy_interval((0, 4, 2, 3), 4) == (found.low, found.high)
    assert accuracy_interval((), 4) == (0.0, 1.0)


@pytest.mark.parametrize("k", [1, 4])
def test_it_holds_the_truth_as_often_as_it_says(k):
    """Problems of different difficulty, 60 of them, the truth 0.3."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        right = rng.binomial(k, rng.beta(0.6, 1.4, size=60))
        low, high = accuracy_interval(tuple(right.tolist()), k)
        held += low <= 0.3 <= high
    assert 0.90 <= held / 200 <= 0.99
