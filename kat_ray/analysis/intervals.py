"""95 % intervals of one model's accuracy on held-out problems."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kat_ray.analysis.bootstrap import bootstrap

_Z = 1.959964  # 97.5 % quantile of the normal distribution


def wilson(share: float, n: int) -> tuple[float, float]:
    """The Wilson score interval of a share of n independent trials (JASA 22, 1927); (0, 1) of none.

    It is not empty where all trials had the same outcome.
    """
    if n < 1:
        return 0.0, 1.0
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * (share * (1 - share) / n + _Z**2 / (4 * n**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy_interval(right: Sequence[int], k: int) -> tuple[float, float]:
    """Of avg@k, where `right` [problems] are right answers of k each: what is drawn is problems.

    A bootstrap over problems; with one answer each, or where all problems have the same share and a bootstrap would
    know no spread, Wilson's interval with as many trials as there are problems.
    """
    shares = np.asarray(right, dtype=float) / k
    if k == 1 or len({*right}) < 2:
        return wilson(float(shares.mean()) if len(shares) else 0.0, len(shares))
    found = bootstrap(shares[None])
    return found.low, found.high
