"""Penalties on long answers."""

import numpy as np
import pytest

from kat_ray.algorithms.shaping import overlong_penalty


def test_the_penalty_grows_over_the_last_tokens():
    lengths = np.array([2, 1, 3, 4])
    assert overlong_penalty(lengths, 4, 2, 1.0).tolist() == [0.0, 0.0, -0.5, -1.0]
    assert overlong_penalty(lengths, 4, 4, 0.5).tolist() == pytest.approx([-0.25, -0.125, -0.375, -0.5])
    assert overlong_penalty(lengths[:0], 4, 2, 1.0).tolist() == []
