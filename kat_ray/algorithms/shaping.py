"""What is added to a reward for the form of an answer, before it is held against others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kat_ray.algorithms.groups import Floats


def overlong_penalty(lengths: NDArray[np.int64], longest: int, buffer: int, factor: float) -> Floats:
    """From 0 down to -`factor` over the last `buffer` tokens [N] that a rollout may have (DAPO, arXiv 2503.14476).

    `lengths` [N] are tokens, at most `longest`.
    """
    over: Floats = np.maximum(lengths - (longest - buffer), 0) / buffer
    return 0.0 - factor * over
